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

from .contours import edge_alpha, near_contour, packed_edge
from .errors import DecafError

HELD = 128 << 20
"""Bytes of compressed masks that are held in memory."""


class Masks(Protocol):
    """Masks of objects on the T frames of a clip, read a few frames at a time."""

    length: int
    frame_size: tuple[int, int]
    finished: bool
    """Whether somebody has given the edges their softness: then a mask made of these has it, too. Else it is 0 and 1, as the segmenter's."""

    def union(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) bool: pixels of any of these objects, on these frames."""

    def alpha(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """The same as uint8 0..255, with soft edges where there are any: at least 128 just where `union` is true."""

    def any(self) -> bool:
        """Whether any mask may have a pixel."""


class MaskStore:
    """(H, W) bool masks of N objects on T frames, in any order; unset masks are empty.

    Each is packed to bits and compressed by zlib, without loss: about 5 kB and half a millisecond for an object on a full HD frame. What its
    soft edge is made of takes 2 kB more (see `decaf.contours`). Beyond `held` bytes all of them move to a temporary file, which goes when the
    store does.
    """

    finished = False

    def __init__(self, objects: int, length: int, frame_size: tuple[int, int], *, held: int = HELD):
        self.length, self.frame_size = length, tuple(frame_size)
        self._spans = np.zeros((objects, length, 3), np.int64)  # first byte, bytes of the mask, none for an empty one, and of its edge
        self._file = tempfile.SpooledTemporaryFile(max_size=held)
        self._lock = threading.Lock()  # the file has one position

    def put(self, index: int, frame: int, mask: Tensor, logits: Tensor | None = None) -> None:
        """Keeps the mask, on any device, of object `index`. `logits`: (h, w) that were enlarged to make it, for a soft edge; None leaves the
        edge hard. DecafError: the disk is full."""
        packed = pack_bits(mask).numpy()
        if not packed.any():
            self._spans[index, frame] = 0
            return
        data = zlib.compress(packed, 1)
        edge = b"" if logits is None else packed_edge(logits, self.frame_size)
        with self._lock:
            try:
                start = self._file.seek(0, os.SEEK_END)
                self._file.write(data + edge)
                self._file.flush()  # else the error of a full disk would come to whoever reads next
            except OSError as error:
                with contextlib.suppress(OSError):  # closing writes what is left, which fails again
                    self._file.close()
                raise DecafError(
                    f"The masks outgrew {HELD >> 20} MB and could not be kept in a temporary file ({error.strerror}). Free space in "
                    f"{tempfile.tempdir or 'a folder for temporary files'}, or set TMPDIR to another folder."
                ) from error
        self._spans[index, frame] = start, len(data), len(edge)

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
        """(len(frames), H, W) uint8 0..255: soft at the contour of all these objects together, so that there is no seam between neighbours."""
        return _alpha_of([(self, index) for index in objects], self.union(objects, frames), frames)

    def any(self, objects: Sequence[int] | None = None) -> bool:
        """Whether any mask, or any of these objects, has a pixel."""
        return bool((self._spans if objects is None else self._spans[list(objects)]).any())

    @property
    def objects(self) -> int:
        """N."""
        return len(self._spans)

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed masks, in memory or in the file."""
        return int(self._spans[..., 1:].sum())

    def edge(self, index: int, frame: int) -> bytes:
        """What `decaf.contours` keeps of the logits; nothing for a hard edge."""
        start, size, more = self._spans[index, frame].tolist()
        return self._read(start + size, more)

    def _packed(self, index: int, frame: int) -> np.ndarray:
        start, size, _ = self._spans[index, frame].tolist()
        return np.frombuffer(zlib.decompress(self._read(start, size)), np.uint8).reshape(self.frame_size[0], -1)

    def _read(self, start: int, size: int) -> bytes:
        with self._lock:
            self._file.seek(start)
            return self._file.read(size)


def _alpha_of(objects: Sequence[tuple[MaskStore, int]], union: Tensor, frames: Sequence[int]) -> Tensor:
    """(len(frames), H, W) uint8 of objects, of each its store and its index there, which together are `union`."""
    alpha = union.to(torch.uint8).mul_(255)
    for mask, pixels, frame in zip(union.numpy(), alpha.numpy(), frames, strict=True):
        edges = [store.edge(index, frame) for store, index in objects]
        if any(edges):
            rows, cols = near_contour(mask)
            soft = np.maximum.reduce([edge_alpha(edge, mask.shape, rows, cols) for edge in edges if edge])
            for (store, index), edge in zip(objects, edges, strict=True):
                if not edge:
                    soft = np.maximum(soft, store.union([index], [frame])[0].numpy()[rows, cols] * np.uint8(255))
            # The logits that are kept are rounded; the contour is that of the mask.
            pixels[rows, cols] = np.where(mask[rows, cols], np.maximum(soft, 128), np.minimum(soft, 127))
    return alpha


class JoinedMasks:
    """Objects of several masks of one length and frame size, as they are there. `objects`: of each its masks and its index in them."""

    def __init__(self, objects: Sequence[tuple[Masks, int]], length: int, frame_size: tuple[int, int]):
        self.length, self.frame_size = length, tuple(frame_size)
        self._objects = [masks._objects[index] if isinstance(masks, JoinedMasks) else (masks, index) for masks, index in objects]
        self.finished = any(masks.finished for masks, _ in self._objects)

    def union(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) bool."""
        joined = torch.zeros(len(frames), *self.frame_size, dtype=torch.bool)
        for masks, indices in self._sources(objects):
            joined |= masks.union(indices, frames)
        return joined

    def alpha(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) uint8 0..255."""
        stored, made = [], []
        for masks, indices in self._sources(objects):
            if isinstance(masks, MaskStore):
                stored += [(masks, index) for index in indices]
            else:
                made.append(masks.alpha(indices, frames))
        union = torch.zeros(len(frames), *self.frame_size, dtype=torch.bool)
        for store, index in stored:
            union |= store.union([index], frames)
        joined = _alpha_of(stored, union, frames)
        for alpha in made:
            joined = torch.maximum(joined, alpha)
        return joined

    def any(self) -> bool:
        """Whether any mask may have a pixel."""
        sources = self._sources(range(len(self._objects)))
        return any(masks.any(indices) if isinstance(masks, MaskStore) else masks.any() for masks, indices in sources)

    def _sources(self, objects: Sequence[int]) -> list[tuple[Masks, list[int]]]:
        """The masks in which these objects are, each once, with their indices in them."""
        found: dict[int, tuple[Masks, list[int]]] = {}
        for masks, index in (self._objects[place] for place in objects):
            found.setdefault(id(masks), (masks, []))[1].append(index)
        return list(found.values())


def pack_bits(masks: Tensor) -> Tensor:
    """(..., H, W) bool on any device -> (..., H, ceil(W / 8)) uint8 on the CPU: eight pixels a byte, the leftmost in the highest bit."""
    return torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=-1))


def unpack_bits(packed: Tensor, width: int) -> Tensor:
    """(..., H, ceil(width / 8)) uint8 on the CPU -> (..., H, width) bool."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=width).view(bool))
