"""Masks of many objects on many frames in little memory."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import DecafError

HELD = 128 << 20
"""Bytes of compressed masks that are held in memory."""


class Masks(Protocol):
    """Masks of objects on the T frames of a clip, read a few frames at a time."""

    length: int
    frame_size: tuple[int, int]

    def union(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) bool: pixels of any of these objects, on these frames."""

    def alpha(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """The same as uint8 0..255, with soft edges where there are any: at least 128 just where `union` is true."""

    def any(self) -> bool:
        """Whether any mask may have a pixel."""


class PickedMasks:
    """Some objects of `source`, at the indices `picked`, as masks of their own."""

    def __init__(self, source: Masks, picked: Sequence[int]):
        self.length, self.frame_size = source.length, source.frame_size
        self._source, self._picked = source, list(picked)

    def union(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        return self._source.union([self._picked[index] for index in objects], frames)

    def alpha(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        return self._source.alpha([self._picked[index] for index in objects], frames)

    def any(self) -> bool:
        return bool(self._picked) and self._source.any()


class MaskStore:
    """(H, W) bool masks of N objects on T frames, in any order; unset masks are empty.

    Each is packed to bits and compressed by zlib, without loss: about 6 kB and half a millisecond for an object on a full HD frame. Beyond
    `held` bytes all of them move to a temporary file, which goes when the store does.
    """

    def __init__(self, objects: int, length: int, frame_size: tuple[int, int], *, held: int = HELD):
        self.length, self.frame_size = length, tuple(frame_size)
        self._spans = np.zeros((objects, length, 2), np.int64)  # first byte and number of bytes; none for an empty mask
        self._file = tempfile.SpooledTemporaryFile(max_size=held)
        self._lock = threading.Lock()  # the file has one position

    def put(self, index: int, frame: int, mask: Tensor) -> None:
        """Keeps the mask, on any device, of object `index`. DecafError: the disk is full."""
        packed = pack_bits(mask).numpy()
        if not packed.any():
            self._spans[index, frame] = 0
            return
        self._write(index, frame, zlib.compress(packed, 1))

    def _write(self, index: int, frame: int, data: bytes) -> None:
        with self._lock:
            try:
                start = self._file.seek(0, os.SEEK_END)
                self._file.write(data)
                self._file.flush()  # else the error of a full disk would come to whoever reads next
            except OSError as error:
                with contextlib.suppress(OSError):  # closing writes what is left, which fails again
                    self._file.close()
                raise DecafError(
                    f"The masks outgrew {HELD >> 20} MB and could not be kept in a temporary file ({error.strerror}). Free space in "
                    f"{tempfile.tempdir or 'a folder for temporary files'}, or set TMPDIR to another folder."
                ) from error
        self._spans[index, frame] = start, len(data)

    def union(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) bool: pixels of any of these objects, on these frames."""
        height, width = self.frame_size
        masks = np.zeros((len(frames), height, width), bool)
        for mask, frame in zip(masks, frames, strict=True):
            found = [self._packed(index, frame) for index in objects if self._spans[index, frame, 1]]
            if found:
                mask[:] = np.unpackbits(np.bitwise_or.reduce(found), axis=-1, count=width).view(bool)
        return torch.from_numpy(masks)

    def alpha(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) uint8: 255 in pixels of any of these objects, 0 elsewhere."""
        return self.union(objects, frames).to(torch.uint8).mul_(255)

    @classmethod
    def joined(cls, objects: Sequence[tuple[Masks, int]], length: int, frame_size: tuple[int, int]) -> MaskStore:
        """A store of these objects, each given as its masks of that length and frame size and its index there. Compressed bytes are copied as
        they are; soft edges become hard."""
        store = cls(len(objects), length, frame_size)
        for index, (other, place) in enumerate(objects):
            for frame in range(length):
                if not isinstance(other, MaskStore):
                    store.put(index, frame, other.union([place], [frame])[0])
                elif other._spans[place, frame, 1]:
                    store._write(index, frame, other._read(place, frame))
        return store

    def any(self) -> bool:
        """Whether any mask has a pixel."""
        return bool(self._spans.any())

    @property
    def objects(self) -> int:
        """N."""
        return len(self._spans)

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed masks, in memory or in the file."""
        return int(self._spans[..., 1].sum())

    def _packed(self, index: int, frame: int) -> np.ndarray:
        return np.frombuffer(zlib.decompress(self._read(index, frame)), np.uint8).reshape(self.frame_size[0], -1)

    def _read(self, index: int, frame: int) -> bytes:
        start, size = self._spans[index, frame].tolist()
        with self._lock:
            self._file.seek(start)
            return self._file.read(size)


def pack_bits(masks: Tensor) -> Tensor:
    """(..., H, W) bool on any device -> (..., H, ceil(W / 8)) uint8 on the CPU: eight pixels a byte, the leftmost in the highest bit."""
    return torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=-1))


def unpack_bits(packed: Tensor, width: int) -> Tensor:
    """(..., H, ceil(width / 8)) uint8 on the CPU -> (..., H, width) bool."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=width).view(bool))
