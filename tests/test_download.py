"""Finding and downloading models, against a hub on this machine."""

import pytest
from hub_server import HubServer, run

pytestmark = pytest.mark.slow

REPO = "someone/tiny-vl"


@pytest.fixture
def hub(mllm_folder, tmp_path):
    import shutil

    folder = tmp_path / "repo"
    shutil.copytree(mllm_folder("qwen2_5_vl"), folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    server = HubServer({REPO: folder})
    yield server
    server.close()


DOWNLOAD = """
import json, sys
from decaf.mllm.download import download_mllm
from decaf.mllm.folder import missing_files
from pathlib import Path
seen = []
folder = download_mllm(sys.argv[1], Path(sys.argv[2]), lambda done, total, what: seen.append((done, total, what)))
print(json.dumps({"files": sorted(p.name for p in folder.iterdir() if p.is_file()), "missing": missing_files(folder), "seen": seen}))
"""


def test_download_into_a_folder(hub, tmp_path):
    result = run(DOWNLOAD, hub, tmp_path, REPO, tmp_path / "models" / "tiny-vl")
    assert result["missing"] == [] and "model.safetensors" in result["files"]
    assert not {"modeling_evil.py", "pytorch_model.bin"} & set(result["files"])
    assert not any("evil" in path or ".bin" in path for path in hub.requests if "/resolve/" in path)
    size = (hub.repositories[REPO] / "model.safetensors").stat().st_size
    done, total, what = result["seen"][-1]
    assert REPO in what and done == total >= size


def test_a_repository_is_found_locally_without_a_connection(hub, tmp_path):
    find = "import sys, json; from decaf.mllm import find_mllm; print(json.dumps(str(find_mllm(sys.argv[1]))))"
    first = run(find, hub, tmp_path, REPO)
    hub.requests.clear()
    assert run(find, hub, tmp_path, REPO) == first
    assert hub.requests == []


def test_cancel_stops_a_download_and_it_goes_on_later(hub, tmp_path):
    hub.delay = 0.05
    cancel = """
import json, sys, time, threading
from decaf.mllm.download import download_mllm
from pathlib import Path
class Stop(BaseException): pass
start = time.perf_counter()
def progress(done, total, what):
    if done > 50_000: raise Stop
try:
    download_mllm(sys.argv[1], Path(sys.argv[2]), progress)
    stopped = False
except Stop:
    stopped = True
print(json.dumps({"stopped": stopped, "complete": (Path(sys.argv[2]) / "model.safetensors").is_file()}))
"""
    result = run(cancel, hub, tmp_path, REPO, tmp_path / "m")
    assert result == {"stopped": True, "complete": False}
    hub.delay = 0
    assert run(DOWNLOAD, hub, tmp_path, REPO, tmp_path / "m")["missing"] == []


FAIL = """
import json, sys
from decaf.errors import DecafError
from decaf.mllm import find_mllm
try:
    find_mllm(sys.argv[1]); print(json.dumps(None))
except DecafError as error:
    print(json.dumps(str(error)))
"""


def test_unknown_repository(hub, tmp_path):
    message = run(FAIL, hub, tmp_path, "someone/nothing")
    assert "someone/nothing could not be downloaded" in message and "\n" not in message


def test_no_connection(hub, tmp_path):
    hub.close()
    message = run(FAIL, hub, tmp_path, REPO)
    assert f"{REPO} could not be downloaded" in message and "by hand" in message


@pytest.mark.parametrize("name", ["/nowhere/model", "justaname", "a/b/c", "../x"])
def test_what_is_neither_folder_nor_repository(hub, tmp_path, name):
    assert "no model folder" in run(FAIL, hub, tmp_path, name)
