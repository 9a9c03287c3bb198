"""Files that are either complete or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from .errors import OutputError, reason, shown

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path in the same folder to write to, with the same suffix; it takes the name `path` when the block ends without an error.

    An error or a cancel leaves what was at `path` before. The folder is made if need be. Whoever writes the same file at the same time has
    another part, so that one of the two stays, whole.
    OutputError: no permission, not a folder, no possible name, or the disk is full.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.open("xb").close()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _explained(path, error) from error
    try:
        yield part
        try:
            os.replace(part, path)
        except FileNotFoundError as error:  # the folder has gone meanwhile
            raise _explained(path, error) from error
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        full = _full_disk(error)
        if full:
            raise _explained(path, full) from error
        if isinstance(error, IsADirectoryError | PermissionError):  # what is at `path` cannot be replaced
            raise _explained(path, error) from error
        raise


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes `value` as indented JSON in UTF-8, all or nothing."""
    with atomic_write(path) as part:
        # What is no UTF-8, in the name of a file for example, is escaped the way JSON reads it back.
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace")


def write_image(path: str | os.PathLike, image, **options) -> None:
    """Writes a PIL image in the format of the suffix, all or nothing. `options`: of that format's encoder."""
    with atomic_write(path) as part:
        image.save(part, **options)


def _full_disk(error: BaseException | None) -> BaseException | None:
    """The full disk behind `error`: a library that then fails to close its file raises an error of its own about that."""
    while error is not None and getattr(error, "errno", None) not in _FULL:
        error = error.__cause__ or error.__context__
    return error


def _explained(path: Path, error: Exception) -> OutputError:
    if getattr(error, "errno", None) in _FULL:
        return OutputError(f"The disk is full: {shown(path)} could not be written. Free space there or choose another output folder.")
    return OutputError(f"{shown(path)} could not be written ({reason(error)}); choose another output folder or change its permissions.")
