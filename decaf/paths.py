"""Paths as users give them. What they lead to is known before anything is opened: opening a pipe waits for ever, and some devices never
end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import DecafError, reason, shown

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def look_at(path: str | os.PathLike, name: str) -> str | None:
    """ "file" or "folder", or None if nothing is there; links are followed, nothing is opened.

    `name`: what the user calls it, for the message. DecafError: no path at all (a NUL, too long, a circle of links), not permitted to look,
    or a pipe, device or socket.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL, or what the file system's encoding lacks
        raise DecafError(f"{name} {shown(path)} cannot be used as a path ({reason(error)}). Correct it.") from error
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise DecafError(f"{name} {shown(path)} is {kind}, which is not read. Copy what it holds to a file, and give that.")
    return "file"


def real_path(path: str | os.PathLike) -> Path:
    """Absolute and with links followed. Unlike `Path.resolve`, it leaves a circle of links as it stands."""
    return Path(os.path.realpath(path))
