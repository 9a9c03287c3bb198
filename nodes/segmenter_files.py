"""Checkpoints of segmenters on the user's disk, which may lie where other packs and ComfyUI's own nodes look for them."""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from pathlib import Path

from ..decaf.errors import DecafError
from ..decaf.sam3.names import whose
from . import host

OWN = "sam2"
"""The folder whose checkpoints are all listed."""

OTHERS = ("sam3", "sams", "checkpoints")
"""Folders in which other kinds of models lie, too: what is listed of them bears such a name, and is no SAM 1 or SAM 3.1."""

SUFFIXES = (".safetensors", ".pt", ".pth")
_NAMED = re.compile(r"sam[ _.-]?[23]", re.IGNORECASE)
_ANOTHER = re.compile(r"sam[ _.-]?3[._-]1|multiplex", re.IGNORECASE)
_LARGEST_HEADER = 16 << 20

for name in (OWN, *OTHERS[:2]):
    host.register_folder(name)


def segmenter_files() -> dict[str, Path]:
    """The name that a combo shows -> the file."""
    found = host.files(OWN, SUFFIXES)
    for folder in OTHERS:
        for name, path in host.files(folder, SUFFIXES).items():
            if name not in found and _NAMED.search(f"{folder}/{name}" if folder == "sam3" else name) and _is_usable(path):
                found[name] = path
    return found


def _is_usable(path: Path) -> bool:
    """As far as a look can tell: a .pt file is opened by nobody who only lists files."""
    if path.suffix.lower() != ".safetensors":
        return not _ANOTHER.search(path.name)
    try:
        state = os.stat(path)
        return _holds_tracker(str(path), state.st_mtime_ns, state.st_size)
    except OSError:
        return False


@lru_cache(maxsize=64)
def _holds_tracker(path: str, changed: int, length: int) -> bool:
    """Whether the header of a safetensors file names the weights of SAM 2's or SAM 3's tracker."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(_LARGEST_HEADER, length - 8):
            return False
        try:
            names = list(json.loads(file.read(size)))
            return "image_encoder.trunk.pos_embed" in names or whose(names) is not None
        except (ValueError, TypeError, RecursionError, DecafError):
            return False
