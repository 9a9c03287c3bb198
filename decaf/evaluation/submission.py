"""Zip files of masks for the servers that have the truth of a set."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import DecafError, reason, shown
from ..files import atomic_write
from .datasets.base import Dataset, Item
from .scoring import MASKS

_DATE = (1980, 1, 1, 0, 0, 0)


def write_submission(path: Path, folder: Path, dataset: Dataset, items: Sequence[Item]) -> list[str]:
    """Packs the masks of `items` that are in `folder`, grey pictures of 0 and 255, as the set's server names them.

    The same masks make the same file. Returns what is missing of them, in sentences. DecafError: a mask cannot be read, or the disk is full.
    """
    missing = []
    with atomic_write(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for item in items:
            names = item.clip.frame_names(0) if item.clip is not None else ()
            files = [folder / MASKS / item.name / f"{name}.png" for name in names]
            gone = sum(not file.is_file() for file in files)
            if gone or not files:
                missing.append(
                    f"{item.name}: " + (f"{gone} of {len(files)} masks are not there." if files else item.problem or "it has no frames.")
                )
                continue
            for name, file in zip(names, files, strict=True):
                entry = zipfile.ZipInfo(dataset.submission(item, name), _DATE)
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, _content(file))
    return missing


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DecafError(f"{shown(file)} cannot be read ({reason(error)}). Change its permissions.") from error
