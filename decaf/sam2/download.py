"""Fetching a published checkpoint, when the user asked for it."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from pathlib import Path

from ..errors import DecafError, reason
from ..report import Progress, Report, silent

PUBLISHED = {
    f"facebook/sam2.1-hiera-{size.replace('_', '-')}": f"sam2.1_hiera_{size}.pt" for size in ("tiny", "small", "base_plus", "large")
}
"""Repositories with SAM 2.1's checkpoints, smallest first, and the file in each."""

_BLOCK = 1 << 20
_LOOK = 0.2  # seconds between two looks at the download


def download_checkpoint(repo: str, folder: Path, progress: Progress | Report = silent) -> Path:
    """The checkpoint of a repository in `PUBLISHED`, in `folder`. A file of that name which is there already is taken as it is.

    Until it is complete and its checksum is right it has another name, which ends in ".part"; a later call goes on from there. `progress`
    counts bytes and may raise to stop, also while the server is silent.

    Raises DecafError: no connection, no such file, no room, or what came is damaged.
    """
    target, report = folder / PUBLISHED[repo], Report.of(progress)
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _fetched(repo, target, report)
    except Exception as error:  # connection errors, a full disk: each library below has kinds of its own
        if report.cancelled_by(error) or isinstance(error, DecafError):
            raise
        raise DecafError(
            f"{target.name} of {repo} could not be downloaded into {folder}: {reason(error)}. Check the connection and the free space and run "
            "it again, which goes on where it stopped; or copy the file there by hand."
        ) from error


def _fetched(repo: str, target: Path, report: Report) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url, step = hf_hub_url(repo, target.name), f"Downloading {target.name}"
    about = get_hf_file_metadata(url)
    # Named after what the server has: what is left of another version of the file is not gone on with.
    part = target.with_name(f"{target.name}.{re.sub('[^0-9A-Za-z]', '', about.etag or '')[:16]}.part")
    file = _Part(part)
    try:
        _run(lambda: _get(url, file, about.size), lambda: report.progress(file.written, about.size or 0, step))
    finally:
        file.stop()
    report.progress(file.written, about.size or file.written, step)
    if len(about.etag or "") == 64 and _sha256(part, report) != about.etag:
        part.unlink()
        raise DecafError(f"What came of {target.name} from {repo} is damaged. Run it again to download it anew.")
    os.replace(part, target)
    return target


def _get(url: str, file: _Part, size: int | None) -> None:
    from huggingface_hub.file_download import http_get

    # With a range of its own the hub's library writes through `file`, and not through a faster downloader past it.
    http_get(url, file, resume_size=file.written, expected_size=size, headers={"Range": "bytes=0-"}, displayed_filename=file.path.name)


class _Part:
    """The unfinished file, as what writes in another thread sees it. `written`: bytes in it."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("r+b" if path.exists() else "w+b")
        self.written = self._file.seek(0, os.SEEK_END)
        self._open = threading.Lock()
        self._stopped = False

    def write(self, data: bytes) -> int:
        with self._open:
            if self._stopped:
                raise InterruptedError("cancelled")
            count = self._file.write(data)
            self.written = self._file.tell()
        return count

    def tell(self) -> int:
        return self.written

    def seek(self, position: int) -> int:
        self.written = self._file.seek(position)
        return self.written

    def truncate(self) -> int:
        return self._file.truncate()

    def stop(self) -> None:
        """What is in it stays; nothing is added any more."""
        with self._open:
            self._stopped = True
            self._file.close()


def _run(work, look) -> None:
    """`work` in a thread of its own, with `look` called again and again meanwhile; it may raise, and then nobody waits for the thread."""
    failed = []

    def run():
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        look()
        thread.join(_LOOK)
    if failed:
        raise failed[0]


def _sha256(path: Path, report: Report) -> str:
    total, done, digest = path.stat().st_size, 0, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            report.progress(done, total, f"Checking {path.name.split('.pt.')[0]}.pt")
    return digest.hexdigest()
