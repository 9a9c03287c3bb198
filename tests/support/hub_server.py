"""A model hub on this machine: just enough of its interface to list a repository and hand out its files."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 39 + "1"


class HubServer:
    """Serves the folders `repositories` {"owner/name": folder}. `requests` holds the paths asked for, `ranges` the bytes; `delay`: seconds
    per 64 KB sent. `large`: endings of the files that are announced with their checksum and handed out under another address, as a hub does
    with large ones. `harm(data)`: what is done to those underway."""

    def __init__(self, repositories: dict[str, Path], delay: float = 0.0, large: tuple[str, ...] = ()):
        self.repositories, self.delay, self.large, self.requests, self.ranges = repositories, delay, large, [], []
        self.harm = lambda data: data
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                hub._answer(self, body=False)

            def do_GET(self):
                hub._answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def _answer(self, request, body: bool):
        self.requests.append(request.path)
        path = request.path.split("?")[0].strip("/")
        for name, folder in self.repositories.items():
            if path.startswith(f"api/models/{name}"):
                return self._list(request, name, folder, path, body)
            if path.startswith(f"{name}/resolve/"):
                file = folder / path.split("/", 4)[4]
                return self._moved(request, name, file, body) if file.name.endswith(self.large) else self._file(request, file, body)
            if path.startswith(f"large/{name}/"):
                return self._file(request, folder / path.split("/", 3)[3], body)
        return self._send(request, 404, b'{"error": "Repository not found"}', body, {"X-Error-Code": "RepoNotFound"})

    def _list(self, request, name, folder, path, body):
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        if "/tree/" in path:
            listed = [
                {"type": "file", "path": f.relative_to(folder).as_posix(), "size": f.stat().st_size, "oid": self._etag(f)} for f in files
            ]
        else:
            siblings = [{"rfilename": f.relative_to(folder).as_posix(), "size": f.stat().st_size, "blobId": self._etag(f)} for f in files]
            listed = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        self._send(request, 200, json.dumps(listed).encode(), body, {"Content-Type": "application/json"})

    @staticmethod
    def _etag(file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def _moved(self, request, name: str, file: Path, body: bool):
        if not file.is_file():
            return self._send(request, 404, b"Entry not found", body, {"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        headers = {"X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": COMMIT}
        elsewhere = self.url.replace("127.0.0.1", "localhost")  # another host: libraries look no further for what it is
        self._send(request, 302, b"", body, headers | {"Location": f"{elsewhere}/large/{name}/{file.name}"})

    def _file(self, request, file: Path, body: bool):
        if not file.is_file():
            return self._send(request, 404, b"Entry not found", body, {"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        if file.name.endswith(self.large):
            data = self.harm(data)
        status, headers = 200, {"ETag": f'"{self._etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            whole, last = len(data), int(last) if last else len(data) - 1
            data, status = data[int(first) : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{whole}"
        self._send(request, status, data, body, headers)

    def _send(self, request, status, data, body, headers):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        try:
            for start in range(0, len(data) if body else 0, 1 << 16):
                request.wfile.write(data[start : start + (1 << 16)])
                time.sleep(self.delay)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was cancelled


def run(code, hub, tmp_path, *arguments):
    """Run Python code in a process of its own, whose hub is ours: libraries read the address when they are imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    environment |= {"no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
