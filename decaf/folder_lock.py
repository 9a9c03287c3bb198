"""One run at a time per output folder."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from .errors import DecafError, reason, shown
from .paths import real_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

log = logging.getLogger(__name__)

NAME = ".decaf.lock"
"""The file in the folder that is locked. It is removed when the run ends. One that a killed run left behind holds no lock: the operating
system releases a lock with its process."""


class FolderLocks:
    """Locks on folders, held until the block ends."""

    def __init__(self):
        self._held: dict[Path, int | None] = {}

    def __enter__(self) -> FolderLocks:
        return self

    def __exit__(self, *_) -> None:
        for folder in list(self._held):
            self.release(folder)

    def take(self, folder: Path) -> None:
        """Locks an existing folder; does nothing if it is held already. On a file system without locks, a warning in the log is all.

        DecafError: another run holds it, or it takes no files.
        """
        folder = real_path(folder)
        if folder in self._held:
            return
        try:
            self._held[folder] = _acquire(folder / NAME)
        except BlockingIOError as error:
            raise DecafError(
                f"Another run is writing into {shown(folder)}. Wait until it ends, or give another folder as --out."
            ) from error
        except OSError as error:
            raise DecafError(f"--out {shown(folder)} cannot be written to ({reason(error)}). Give another folder.") from error

    def release(self, folder: Path) -> None:
        """Gives back the lock on a folder that is held."""
        folder = real_path(folder)
        descriptor = self._held.pop(folder, None)
        if descriptor is None:
            return
        # While it is locked, so that nobody locks a file that is about to go. Windows removes no open file: there it is the other way round.
        if fcntl:
            with contextlib.suppress(OSError):
                os.unlink(folder / NAME)
        os.close(descriptor)
        if not fcntl:
            with contextlib.suppress(OSError):
                os.unlink(folder / NAME)


def _acquire(file: Path) -> int | None:
    """A descriptor that holds the lock, or None where there are no locks. BlockingIOError: another process or thread holds it."""
    while True:
        descriptor = _open(file)
        try:
            _lock(descriptor)
            if _is_at(descriptor, file):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:  # some network file systems have no locks
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(file)
            log.warning("%s cannot be locked (%s): start no second run into it.", shown(file.parent), reason(error))
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the run that held it has just removed the file; the next one has another


def _open(file: Path) -> int:
    # Never through a link, and never waiting for the other end of a pipe of that name.
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:  # left behind by another user
        if not fcntl or not file.exists():
            raise
        return os.open(file, os.O_RDONLY | flags)


def _lock(descriptor: int) -> None:
    if fcntl:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:  # what Windows says when it is locked
            raise BlockingIOError(*error.args) from error


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether the open file still bears its name."""
    if not fcntl:
        return True  # Windows keeps the name of an open file
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except FileNotFoundError:
        return False
