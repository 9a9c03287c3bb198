"""What is told of a ComfyUI that cannot run: one reason. And of a pack that it cannot run with: a failure."""

from __future__ import annotations

import sys

import pytest
from comfy_host import Host, HostBroken, PackBroken, Server, check_requirements, running

MAIN = """
import http.server, pathlib, sys
value = lambda name: sys.argv[sys.argv.index(name) + 1]
base = pathlib.Path(value("--base-directory"))
with_pack = (base / "custom_nodes" / "ComfyUI-DecAF").exists()
{check}
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write({answer})
http.server.HTTPServer(("127.0.0.1", int(value("--port"))), Answers).serve_forever()
"""
LAZY = """
def __getattr__(name):
    if name[0] == "_":
        raise AttributeError(name)
    try:
        raise OSError("libtorchaudio.so: undefined symbol")
    except OSError as error:
        raise ModuleNotFoundError(f"Could not import module {name!r}") from error
"""
WITH_NODES, WITHOUT = b'{"LoadMLLM": {}}', b"{}"


@pytest.fixture
def fake(tmp_path):
    """fake(check, answer) -> a ComfyUI that is nothing but a main.py, which runs `check` first."""
    from pathlib import Path

    def made(check: str = "", answer: bytes = WITH_NODES) -> Server:
        root = tmp_path / "ComfyUI"
        root.mkdir()
        (root / "main.py").write_text(MAIN.format(check=check, answer=answer))
        return Server(Host(root, Path(sys.executable)), tmp_path / "base")

    return made


def test_a_host_that_starts_is_given_and_ended(fake, tmp_path):
    with running(fake(), tmp_path / "bare") as server:
        assert server.get("/system_stats") == {"LoadMLLM": {}} and not (tmp_path / "bare").exists()
    assert server.process.poll() is not None


def test_a_host_that_never_starts_is_its_own_fault(fake, tmp_path):
    with (
        pytest.raises(HostBroken, match="(?s)also not without this pack.*no libGL here"),
        running(fake("sys.exit('no libGL here')"), tmp_path / "b"),
    ):
        pass


def test_a_host_that_falls_over_the_pack_is_the_packs_fault(fake, tmp_path):
    server = fake("if with_pack: sys.exit('the pack broke it')")
    with pytest.raises(PackBroken, match="the pack broke it"), running(server, tmp_path / "bare"):
        pass


def test_a_pack_without_nodes_is_the_packs_fault(fake, tmp_path):
    server = fake(answer=WITHOUT)
    with pytest.raises(PackBroken, match="could not import"), running(server, tmp_path / "bare"):
        pass
    assert server.process.poll() is not None


def test_requirements_that_cannot_be_imported_are_named_with_their_cause(fake):
    host = fake().host
    for name in ("comfy", "comfy_api", "sam2", "av"):
        (host.root / name).mkdir()
        (host.root / name / "__init__.py").touch()
    (host.root / "comfy" / "cli_args.py").write_text("class args: pass")
    (host.root / "comfy" / "model_management.py").touch()
    (host.root / "comfy_api" / "latest.py").touch()
    lazy = host.root / "transformers.py"
    lazy.write_text("AutoModelForImageTextToText = AutoProcessor = None")
    check_requirements(host)
    lazy.write_text(LAZY)
    with pytest.raises(HostBroken, match="AutoModelForImageTextToText.*libtorchaudio.so: undefined symbol"):
        check_requirements(host)
