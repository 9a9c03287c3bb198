"""Tracks whose masks are refined when they are asked for, so that nothing of the clip's size is made."""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from ..contours import REACH, WIDTH
from ..data import Tracks
from ..errors import DecafError
from ..masks import Masks
from ..settings import REFINE_RANGES, RefineSettings
from .edges import box_of, extended_to_border, feathered, grown, part_finder, ramp, softened, without_holes_and_specks


def refine(tracks: Tracks, settings: RefineSettings) -> Tracks:
    """The same objects with finished masks. The work is done frame by frame, whenever masks are asked for.

    DecafError: a setting is out of its range, or scipy, which finds holes and specks, is not installed.
    """
    check_refine(settings)
    return replace(tracks, store=RefinedMasks(tracks.store, len(tracks.tracks), settings))


def check_refine(settings: RefineSettings) -> None:
    """DecafError as in `refine`."""
    for field in fields(settings):
        value, (low, high) = getattr(settings, field.name), REFINE_RANGES[field.name]
        if not low <= value <= high:  # never true of NaN
            raise DecafError(f"'{field.name}' is {value:g}, which is not between {low:g} and {high:g}. Give such a number.")
    if settings.holes or settings.specks:
        part_finder()  # now, not half way through a clip


class RefinedMasks:
    """The masks of N objects on T frames, refined: see `RefineSettings` for the steps. Those up to `shortest` are each object's own; growing
    and the soft edge come last and are those of all objects that are asked for together, so that there is no seam between neighbours. Without
    a feather, the edge is as soft as it was in the source.

    Frames may be asked for in any order, from any thread; in the order of the clip, every step is done once.
    """

    finished = True

    def __init__(self, source: Masks, objects: int, settings: RefineSettings):
        self.length, self.frame_size = source.length, source.frame_size
        self._source, self._settings = source, settings
        self._lock = threading.RLock()
        self._kept: OrderedDict[tuple, np.ndarray] = OrderedDict()  # packed to bits
        self._most = max(objects, 1) * 4 * (settings.smooth + settings.shortest + 1)
        self._edges = _Kept(_HELD)
        self._seen: dict[tuple[int, int], bool] = {}  # whether a mask has pixels, before short appearances are dropped

    def union(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) bool."""
        masks = np.zeros((len(frames), *self.frame_size), bool)
        for place, frame in enumerate(frames):
            masks[place] = self._union(objects, frame)
        return torch.from_numpy(masks)

    def alpha(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) uint8 0..255."""
        alpha = np.zeros((len(frames), *self.frame_size), np.uint8)
        for place, frame in enumerate(frames):
            if not self._edges.copy_to(alpha[place], (*objects, frame)):
                alpha[place] = self._alpha(objects, frame)
                self._edges.keep((*objects, frame), alpha[place])
        return torch.from_numpy(alpha)

    def _alpha(self, objects: Sequence[int], frame: int) -> np.ndarray:
        mask, width = self._union(objects, frame), self._settings.feather
        as_soft = self._as_soft(mask, objects, frame)
        if not width:
            return mask * np.uint8(255) if as_soft is None else as_soft
        return feathered(mask, width) if as_soft is None else softened(as_soft, mask, width)

    def _as_soft(self, mask: np.ndarray, objects: Sequence[int], frame: int) -> np.ndarray | None:
        """(H, W) uint8: the mask, refined, with the soft edge that the source has; where the contour is another one, with one as narrow. None if
        the source has none."""
        source = self._source.alpha(objects, [frame])[0].numpy() if mask.any() else mask
        if not ((source > 0) & (source < 255)).any():
            return None
        whole = source >= 128
        changed = mask != whole
        if not changed.any():
            return source
        reach = ramp(source, whole) if self._source.finished else REACH
        anew = grown(changed, reach + 1)
        box = box_of(anew, 8)  # what lies farther away changes no narrow edge
        source = source.copy()
        source[box] = np.where(anew[box], feathered(mask[box], WIDTH / 2), source[box])
        return source

    def any(self) -> bool:
        """Whether any mask may have a pixel: whether one of the source has."""
        return self._source.any()

    def _union(self, objects: Sequence[int], frame: int) -> np.ndarray:
        with self._lock:
            found = [self._steady(index, frame) for index in objects if self._lasts(index, frame)]
        if not found:
            return np.zeros(self.frame_size, bool)
        return grown(np.logical_or.reduce(found), self._settings.grow)

    def _cleaned(self, index: int, frame: int) -> np.ndarray:
        """Border, specks and holes."""

        def make() -> np.ndarray:
            mask = self._source.union([index], [frame])[0].numpy()
            mask = extended_to_border(mask, self._settings.border)
            return without_holes_and_specks(mask, self._settings.holes, self._settings.specks)

        return self._once("cleaned", index, frame, make)

    def _steady(self, index: int, frame: int) -> np.ndarray:
        """And smoothed over time."""
        around = self._settings.smooth
        if not around:
            return self._cleaned(index, frame)
        frames = range(max(frame - around, 0), min(frame + around + 1, self.length))
        return self._once(
            "steady", index, frame,
            lambda: majority(self._cleaned(index, frame), [self._cleaned(index, one) for one in frames if one != frame])
        )  # fmt: skip

    def _is_seen(self, index: int, frame: int) -> bool:
        if (index, frame) not in self._seen:
            self._seen[index, frame] = bool(self._steady(index, frame).any())
        return self._seen[index, frame]

    def _lasts(self, index: int, frame: int) -> bool:
        """Whether the object is seen here, and for as many frames in a row as it must be."""
        if not self._is_seen(index, frame):
            return False
        run, shortest = 1, self._settings.shortest
        for step in (1, -1):
            place = frame + step
            while run < shortest and 0 <= place < self.length and self._is_seen(index, place):
                run, place = run + 1, place + step
        return run >= shortest

    def _once(self, step: str, index: int, frame: int, make) -> np.ndarray:
        key = step, index, frame
        if key in self._kept:
            self._kept.move_to_end(key)
            return np.unpackbits(self._kept[key], axis=-1, count=self.frame_size[1]).view(bool)
        mask = make()
        self._kept[key] = np.packbits(mask, axis=-1)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return mask


_HELD = 16 << 20
"""Bytes of finished masks that are kept, compressed, for whoever asks next: another style, or a cut-out after a preview."""


class _Kept:
    """Alphas (H, W) uint8 by key, up to so many bytes; the oldest go first."""

    def __init__(self, held: int):
        self._left, self._lock = held, threading.Lock()
        self._kept: OrderedDict[tuple, tuple[tuple[slice, slice] | None, bytes]] = OrderedDict()

    def keep(self, key: tuple, alpha: np.ndarray) -> None:
        box = box_of(alpha > 0)
        data = b"" if box is None else zlib.compress(np.ascontiguousarray(alpha[box]), 1)
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = box, data
            self._left -= len(data) + _ENTRY
            while self._left < 0:
                self._left += len(self._kept.popitem(last=False)[1][1]) + _ENTRY

    def copy_to(self, alpha: np.ndarray, key: tuple) -> bool:
        """Whether there is one; `alpha` was 0 everywhere."""
        found = self._kept.get(key)
        if found is None:
            return False
        box, data = found
        if box is not None:
            alpha[box] = np.frombuffer(zlib.decompress(data), np.uint8).reshape(alpha[box].shape)
        return True


_ENTRY = 300
"""Bytes that an entry takes beside its data, about."""


def majority(mask: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """The pixels that most of these masks have, `mask` and those of frames around it; where they are even, those of `mask`.

    Each of the others is first moved to where the object is in `mask`, so that what moves fast keeps its shape. In a frame that lost the object,
    the others decide.
    """
    boxes = [box for one in (mask, *others) if (box := box_of(one)) is not None]
    if not boxes:
        return mask
    box = tuple(slice(min(one[axis].start for one in boxes), max(one[axis].stop for one in boxes)) for axis in (0, 1))
    here = mask[box]
    votes = here.astype(np.int16)
    for other in others:
        votes += _moved_to(other[box], here)
    votes *= 2
    total = len(others) + 1
    changed = np.zeros_like(mask)
    changed[box] = (votes > total) | ((votes == total) & here)
    return changed


def _moved_to(other: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`other`, moved by whole pixels to where it has most in common with `mask`.

    Searched for from where it is and from where the centres of both lie on each other, in steps that get smaller: a part that is missing in
    one of the two moves its centre, but not the best place.
    """
    if not other.any() or not mask.any():
        return other
    centre = tuple(round(float(_centre(mask, axis) - _centre(other, axis))) for axis in (0, 1))
    best = max(((0, 0), centre), key=lambda by: _common(other, mask, by))
    most = _common(other, mask, best)
    step = 4
    while step:
        tried = [(best[0] + y * step, best[1] + x * step) for y, x in ((0, 1), (0, -1), (1, 0), (-1, 0))]
        common = [_common(other, mask, by) for by in tried]
        if max(common) > most:
            best, most = tried[common.index(max(common))], max(common)
        else:
            step //= 2
    moved = np.zeros_like(other)
    into, out_of = _slices(best, mask.shape)
    moved[into] = other[out_of]
    return moved


def _centre(mask: np.ndarray, axis: int) -> float:
    counts = np.count_nonzero(mask, axis=1 - axis)
    return (counts * np.arange(len(counts))).sum() / counts.sum()


def _common(other: np.ndarray, mask: np.ndarray, by: tuple[int, int]) -> int:
    """Pixels of `mask` that `other` has when it is moved."""
    into, out_of = _slices(by, mask.shape)
    return np.count_nonzero(mask[into] & other[out_of])


def _slices(by: tuple[int, int], shape: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of the frame into which something comes that is moved, and the part that it comes from."""
    into = tuple(slice(min(max(one, 0), size), max(size + min(one, 0), 0)) for one, size in zip(by, shape, strict=True))
    out_of = tuple(slice(min(max(-one, 0), size), max(size + min(-one, 0), 0)) for one, size in zip(by, shape, strict=True))
    return into, out_of
