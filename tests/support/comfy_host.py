"""Finds a ComfyUI on this machine and runs its server with this pack in it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
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


@dataclass
class Server:
    """ComfyUI's server on a free port over a folder of its own: `base`/models, input, output, temp and custom_nodes with this pack."""

    host: Host
    base: Path
    arguments: tuple[str, ...] = ()
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
        pack = self.base / "custom_nodes" / "ComfyUI-DecAF"
        if not pack.exists():
            pack.symlink_to(PACK, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [self.host.python, "main.py", "--cpu", "--base-directory", self.base, "--port", self.port, "--disable-auto-launch"]
        command += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:", *self.arguments]
        with (self.base / "server.log").open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command], cwd=self.host.root, env=self.host.environment(), stdout=log, stderr=subprocess.STDOUT
            )
        self._wait(120)
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

    def post(self, path: str, content: dict) -> dict:
        """The server's answer; also that to a prompt it refuses, which names the nodes and why."""
        request = urllib.request.Request(self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def queue(self, prompt: dict) -> str:
        """Queue a workflow in API form: its id."""
        answer = self.post("/prompt", {"prompt": prompt})
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
