"""Masks that datasets store as run lengths, as COCO defines them: column by column, runs of 0 and 1 in turn, the first one of 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import DecafError


def decode(stored: object) -> np.ndarray:
    """(height, width) bool of a mask such as {"size": [height, width], "counts": ...}. `counts` is COCO's packed text, or a list of run lengths.

    A list of such masks gives what any of them covers. DecafError: it is no such mask, or its runs do not add up to its size.
    """
    if isinstance(stored, Sequence) and not isinstance(stored, str | bytes) and stored:
        first, *others = map(decode, stored)
        if any(other.shape != first.shape for other in others):
            raise DecafError(f"Masks of one object have different sizes: {size_of(stored[0])} and others.")
        return np.logical_or.reduce([first, *others])
    height, width = size_of(stored)
    runs = _runs(stored["counts"])
    if len(runs) and int(runs.min()) < 0 or int(runs.sum()) != height * width:
        raise DecafError(f"A mask of {width}x{height} pixels is damaged: its runs cover {int(runs.sum())} of {height * width} pixels.")
    values = np.zeros(len(runs), bool)
    values[1::2] = True
    return np.repeat(values, runs).reshape(width, height).T


def size_of(stored: object) -> tuple[int, int]:
    """(height, width) as it is written. DecafError: it is no mask of run lengths."""
    if isinstance(stored, Sequence) and not isinstance(stored, str | bytes) and stored:
        return size_of(stored[0])
    size = stored.get("size") if isinstance(stored, Mapping) else None
    whole = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) and 0 < side <= 1 << 15 for side in size)
    if not whole or "counts" not in stored:
        raise DecafError('A mask is not written as {"size": [height, width], "counts": ...}; it is damaged, or of another format.')
    return int(size[0]), int(size[1])


def _runs(counts: object) -> np.ndarray:
    """Run lengths (n,) int64."""
    if isinstance(counts, str | bytes):
        try:
            packed = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
        except UnicodeEncodeError as error:
            raise DecafError("The packed run lengths of a mask hold letters that COCO's format does not have; it is damaged.") from error
        return _unpacked(packed)
    if isinstance(counts, Sequence) and all(isinstance(run, int) for run in counts):
        return np.array(counts, np.int64)
    raise DecafError("The run lengths of a mask are neither COCO's packed text nor a list of whole numbers; it is damaged.")


def _unpacked(packed: np.ndarray) -> np.ndarray:
    """Each number is written in groups of five bits, the lowest first; 32 says that another group follows, 16 in the last one that it is
    negative. From the fourth number on, what is written is the difference to the number before the last."""
    if len(packed) == 0:
        return packed
    if int(packed.min()) < 0 or int(packed.max()) > 63 or packed[-1] & 32:
        raise DecafError("The packed run lengths of a mask are cut off, or hold letters that COCO's format does not have; it is damaged.")
    last = (packed & 32) == 0
    ends = np.flatnonzero(last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if int(lengths.max()) > 7:
        raise DecafError("The packed run lengths of a mask hold a number that no picture has; it is damaged.")
    place = np.arange(len(packed)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((packed & 31) << (5 * place), starts)
    numbers -= np.where(packed[ends] & 16, np.int64(1) << (5 * lengths), 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers
