"""What SAM 2 has made of a clip, kept from one run to the next, so that nothing is computed twice."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from ..decaf.tracking import TrackMemo, feature_cache
from ..decaf.tracking.frames import FeatureCache
from ..decaf.tracking.segmenter import SegmenterModel

KEPT_BYTES = 1 << 30
"""Bytes that image features may take between runs, in host memory: 60 frames at 1024 pixels in float32. They are those of the first frames that
were looked at; a frame that does not fit is encoded again."""


class KeptClip:
    """`features`: of the images. `memo`: objects of the latest queries, with their masks."""

    def __init__(self, model: SegmenterModel, budget: int):
        self.features: FeatureCache = feature_cache(model, aside=budget)
        self.memo = TrackMemo()


class Kept:
    """Of the latest clip that a model has seen. Whoever frees the model frees this with it."""

    def __init__(self):
        self._clip: KeptClip | None = None
        self._is_same: Callable[[object], bool] = lambda frames: False

    def of(self, frames, stamp: tuple | None, model: SegmenterModel, free: int) -> KeptClip:
        """For IMAGE or VIDEO `frames`: what was kept, if they are those of the last time. `stamp`: says which file they are, and which part of
        it; None if they are no file. `free`: bytes of host memory that nobody uses; a quarter of them is taken at most."""
        if self._clip is None or not self._is_same((frames, stamp)):
            self.drop()
            self._clip = KeptClip(model, min(KEPT_BYTES, free // 4))
            self._is_same = (lambda other: other[1] == stamp) if stamp else _identity(frames, self)
        return self._clip

    def drop(self) -> None:
        self._clip = None

    @property
    def nbytes(self) -> int:
        return 0 if self._clip is None else self._clip.features.nbytes


def _identity(frames, kept: Kept) -> Callable[[object], bool]:
    """Whether others are the very same object. What was kept of them goes with them."""
    clip, me = weakref.ref(kept._clip), weakref.ref(kept)

    def gone(_) -> None:
        holder = me()
        if holder is not None and holder._clip is clip():
            holder.drop()

    known = weakref.ref(frames, gone)
    return lambda other: other[1] is None and known() is other[0]

