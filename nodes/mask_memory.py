"""Memory for a MASK of a long clip, which ComfyUI holds as 4 bytes a pixel for as long as it keeps the node's results."""

from __future__ import annotations

import math
import mmap
import os
import shutil
import tempfile
from contextlib import suppress

import comfy.model_management as mm
import folder_paths
import torch

LARGE = 256 << 20
"""Bytes from which a mask lies in a file of ComfyUI's temporary folder."""

_UNSETTLED = 64 << 20
_SPARE = 2 << 30
"""Bytes of the disk that are left free."""


class MaskMemory:
    """A float32 tensor of zeros, to be filled from its beginning to its end.

    On a CPU a page counts only once something is written into it: most of a mask is 0. A large mask is a mapped file, whose pages the system takes
    back when it needs room, and which are given back as they are filled: a mask that nobody reads takes none. Where the disk has no room for
    it, it lies in memory as usual.

    Attributes:
        tensor: of the shape that was given, on the device where ComfyUI keeps results. The file goes when it does.
    """

    def __init__(self, shape: tuple[int, ...]):
        self._pages, self._mapped, self._since = None, False, 0
        size, device = 4 * math.prod(shape), mm.intermediate_device()
        if device.type != "cpu" or not size:
            self.tensor = torch.zeros(shape, dtype=torch.float32, device=device)
            return
        self._pages = _file_pages(size) if size >= LARGE else None
        self._mapped = self._pages is not None
        self._pages = self._pages or _memory_pages(size)
        self.tensor = torch.frombuffer(self._pages, dtype=torch.float32).view(shape)

    def filled(self, count: int) -> None:
        """So many bytes more have been filled."""
        self._since += count
        if self._since >= _UNSETTLED:
            self.settle()

    def settle(self) -> None:
        """Gives the pages of a mapped file back. They are read from it again when they are looked at."""
        self._since = 0
        if self._mapped and hasattr(mmap, "MADV_DONTNEED"):
            with suppress(OSError, ValueError):
                self._pages.madvise(mmap.MADV_DONTNEED)


def _file_pages(size: int) -> mmap.mmap | None:
    """None if there is no room on the disk, or no such file can be made."""
    folder = folder_paths.get_temp_directory()
    try:
        os.makedirs(folder, exist_ok=True)
        if shutil.disk_usage(folder).free < size + _SPARE:
            return None
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # else a disk that fills up later would end the process
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)
    except (OSError, ValueError):
        return None


def _memory_pages(size: int) -> mmap.mmap:
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    pages = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)  # of 2 MB, of which each row of an object would touch one
    return pages
