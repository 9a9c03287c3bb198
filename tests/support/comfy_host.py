"""Finds a ComfyUI on this machine and runs its server with this pack in it."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
WORKFLOWS = PACK / "workflows"


@dataclass(frozen=True)
class Host:
    """A checkout of ComfyUI and the Python that runs it."""

    root: Path
    python: Path

    def environment(self) -> dict[str, str]:
        # One thread: tiny tensors, on a machine shared with a browser. Offline: nothing may be looked up in a hub.
        return {**os.environ, "PYTHONPATH": str(self.root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def find_host() -> Host | str:
    """The ComfyUI to test with, or why there is none.

    $COMFYUI_PATH, else the checkout whose custom_nodes hold this pack, else comfy-cli's default place.
    """
    if "COMFYUI_PATH" in os.environ:
        root = Path(os.environ["COMFYUI_PATH"]).expanduser()
    elif PACK.parent.name == "custom_nodes":
        root = PACK.parents[1]
    else:
        root = Path("~/comfy/ComfyUI").expanduser()
    if not (root / "main.py").is_file():
        return f"no ComfyUI in {root}; set COMFYUI_PATH to a checkout"
    places = [root / ".venv" / "bin" / "python", root / ".venv" / "Scripts" / "python.exe"]
    if "COMFYUI_PYTHON" in os.environ:
        places = [Path(os.environ["COMFYUI_PYTHON"]).expanduser()]
    python = next((place for place in places if place.is_file()), None)
    if python is None:
        return f"no Python for the ComfyUI in {root}; set COMFYUI_PYTHON to the one it runs with"
    return Host(root, python)


class HostBroken(Exception):
    """This ComfyUI cannot run, whatever this pack does."""


class PackBroken(Exception):
    """ComfyUI runs, but not with this pack in it."""


_NEEDED = """
import comfy.cli_args
comfy.cli_args.args.cpu = True
import av, sam2
import comfy.model_management
from transformers import AutoModelForImageTextToText, AutoProcessor
import comfy_api.latest
"""  # transformers finds only what is asked for, and then what that needs: a broken torchaudio, for example


def check_requirements(host: Host) -> None:
    """HostBroken: ComfyUI's Python cannot import what ComfyUI or this pack needs; the message says what is behind it."""
    probe = subprocess.run([host.python, "-c", _NEEDED], capture_output=True, text=True, env=host.environment(), cwd=host.root)
    if probe.returncode:
        errors = [line for line in probe.stderr.splitlines() if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Exit)\b", line)]
        causes = dict.fromkeys([*errors[-1:], *errors[:1]]) or [f"exit code {probe.returncode}"]
        raise HostBroken(f"what ComfyUI or this pack needs is not in {host.python}: {' Behind it: '.join(causes)}")


@contextmanager
def running(server: Server, bare: Path):
    """The server with this pack. HostBroken: it does not start; in the folder `bare`, without the pack, neither. PackBroken: there it does, or
    the pack's nodes are missing."""
    try:
        server.__enter__()
    except RuntimeError as error:
        try:
            with Server(server.host, bare, server.arguments, with_pack=False):
                pass
        except RuntimeError as without:
            raise HostBroken(f"ComfyUI in {server.host.root} does not start, also not without this pack: {without}") from None
        raise PackBroken(f"ComfyUI starts without this pack, but not with it: {error}") from None
    try:
        if "LoadMLLM" not in server.get("/object_info"):
            raise PackBroken(f"ComfyUI could not import this pack:\n{server.log[-4000:]}")
        yield server
    finally:
        server.__exit__()


@dataclass
class Server:
    """ComfyUI's server on a free port over a folder of its own: `base`/models, input, output, temp and custom_nodes with this pack.
    `device`: the argument that says where it computes; empty for where it finds best. `folder`: the name of the pack's folder."""

    host: Host
    base: Path
    arguments: tuple[str, ...] = ()
    with_pack: bool = True
    device: tuple[str, ...] = ("--cpu",)
    folder: str = "ComfyUI-DecAF"
    port: int = 0
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.base / "server.log").read_text(errors="replace")

    def __enter__(self) -> Server:
        for name in ("models/LLM", "models/sam2", "models/checkpoints", "input", "output", "temp", "user", "custom_nodes"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        settings = self.base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(exist_ok=True)
        settings.write_text('{"Comfy.TutorialCompleted": true, "Comfy.Minimap.Visible": false}')  # else the page opens with its templates
        pack = self.base / "custom_nodes" / self.folder
        if self.with_pack and not pack.exists():
            pack.symlink_to(PACK, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [self.host.python, "main.py", *self.device, "--base-directory", self.base, "--port", self.port, "--disable-auto-launch"]
        command += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:", *self.arguments]
        with (self.base / "server.log").open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command], cwd=self.host.root, env=self.host.environment(), stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait(120)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        raise RuntimeError(f"ComfyUI's server did not come up:\n{self.log[-4000:]}")

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())

    def post(self, path: str, content: dict | str) -> dict:
        """The server's answer; also that to a prompt it refuses, which names the nodes and why. `content`: also as JSON text, right or
        wrong. An answer that is no JSON, of a server that failed, comes as {"status": number, "text": ...}."""
        text = content if isinstance(content, str) else json.dumps(content)
        request = urllib.request.Request(self.url + path, text.encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            body = error.read().decode(errors="replace")
            try:
                return json.loads(body)
            except json.JSONDecodeError:
                return {"status": error.code, "text": body}

    def queue(self, prompt: dict, client_id: str | None = None) -> str:
        """Queue a workflow in API form: its id. `client_id`: of the `Events` that shall be told of it."""
        answer = self.post("/prompt", {"prompt": prompt} | ({"client_id": client_id} if client_id else {}))
        if "prompt_id" not in answer:
            raise AssertionError(json.dumps(answer, indent=1)[:4000])
        return answer["prompt_id"]

    def result(self, prompt_id: str, seconds: float = 180) -> dict:
        """The history entry of a prompt that has ended: `outputs` by node id, `status`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history and history[prompt_id]["status"]["completed"] is not None:
                return history[prompt_id]
            time.sleep(0.2)
        raise AssertionError(f"the prompt did not end in {seconds} s:\n{self.log[-2000:]}")

    def run(self, prompt: dict) -> dict:
        """Execute a workflow in API form to its end: outputs by node id. A node that fails is an AssertionError with its message."""
        entry = self.result(self.queue(prompt))
        if entry["status"]["status_str"] != "success":
            raise AssertionError(json.dumps(entry["status"]["messages"][-1], indent=1)[:4000])
        return entry["outputs"]


class Events:
    """What the server tells a page over its websocket: `with Events(server) as events: server.queue(prompt, events.client_id)`."""

    def __init__(self, server: Server):
        self.client_id = uuid.uuid4().hex
        self._port = server.port

    def __enter__(self) -> Events:
        self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=60)
        self._file = self._socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId={self.client_id} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        if b" 101 " not in self._file.readline():
            raise ConnectionError("the server opened no websocket")
        while self._file.readline().strip():
            pass
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._socket.close()

    def wait(self, kind: str, seconds: float = 60, **wanted) -> dict:
        """The data of the next message of that kind that holds these values. The messages before it are gone."""
        end = time.monotonic() + seconds
        seen = []
        while time.monotonic() < end:
            message = self._message()
            if message is None:
                continue
            seen.append(message["type"])
            if message["type"] == kind and all(message["data"].get(name) == value for name, value in wanted.items()):
                return message["data"]
        raise AssertionError(f"no {kind} with {wanted} in {seconds} s, but {seen[-20:]}")

    def until(self, kind: str, seconds: float = 60, **wanted) -> list[tuple[float, str, object]]:
        """All messages up to that one: when it came, its type and its data. What is no JSON has the type "text" or "picture"."""
        end, seen = time.monotonic() + seconds, []
        while time.monotonic() < end:
            frame, content = self._frame()
            if frame == 2:
                number = int.from_bytes(content[:4], "big")
                seen.append((time.monotonic(), "text" if number == 3 else "picture", content[4:]))
            elif frame == 1:
                message = json.loads(content)
                seen.append((time.monotonic(), message["type"], message["data"]))
                if message["type"] == kind and all(message["data"].get(name) == value for name, value in wanted.items()):
                    return seen
        raise AssertionError(f"no {kind} with {wanted} in {seconds} s, but {[name for _, name, _ in seen[-20:]]}")

    def _message(self) -> dict | None:
        """The next message, None for a frame that is no text."""
        frame, content = self._frame()
        return json.loads(content) if frame == 1 else None

    def _frame(self) -> tuple[int, bytes]:
        """Its kind, 1 for text and 2 for bytes, and its content. The server sends frames unmasked and whole."""
        kind, length = self._file.read(2)
        length &= 127
        if length > 125:
            length = int.from_bytes(self._file.read(2 if length == 126 else 8), "big")
        return kind & 15, self._file.read(length)
