"""What travels from stage to stage: small frozen records of CPU tensors.

A frame is named in two ways: by its *clip index* (0..T-1, a frame of the clip) and by its *key index* (0..K-1, a place in `ClipInfo.key_frames`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .masks import MaskStore


@dataclass(frozen=True)
class ClipInfo:
    """The clip that attention was taken from, so that later stages can tell whether they were given the same one.

    `key_frames`: K ascending clip indices. `thumbnails`: (K, 16, 16, 3) uint8, the key frames area-averaged.
    """

    length: int
    frame_size: tuple[int, int]
    key_frames: tuple[int, ...]
    thumbnails: Tensor


@dataclass(frozen=True)
class Attention:
    """Attention rollout of the last prompt token over the visual tokens (see `decaf.rollout`): float32, non-negative, not normalised.

    `kind`: "object", "background", or "contrast" (their normalised difference, 0..1). `video`: (slots, rows, cols), all key frames asked as
    one video; a slot covers one or two key frames. `frame`: (K, rows', cols'), each key frame asked alone. `question`: the text asked.
    `answers`: what the model said to the video and to each key frame; empty when nothing was generated. `presence`: the
    model's "yes" against "no" to whether the clip shows the object, 0..1 (see `decaf.presence`); None if it was not asked.
    """

    kind: str
    video: Tensor
    frame: Tensor
    clip: ClipInfo
    query: str
    question: str
    answers: tuple[str, ...] = ()
    presence: float | None = None


@dataclass(frozen=True)
class FusedAttention:
    """Video and frame maps in one: `map` (K, rows', cols') float32 in 0..1. All zero means that nothing was attended. `presence` as in
    `Attention`."""

    map: Tensor
    clip: ClipInfo
    query: str = ""
    presence: float | None = None


@dataclass(frozen=True)
class SAM2Prompts:
    """Points for SAM 2, one object each. `key`: (n,) int64 key indices; `xy`: (n, 2) float32 in 0..1, x to the right, y down;
    `value`: (n,) float32 fused attention in 0..1 there. Ordered by frame, then row, then column. `message`: why there are none, if that was
    decided."""

    key: Tensor
    xy: Tensor
    value: Tensor
    fused: FusedAttention
    message: str = ""


@dataclass(frozen=True)
class Track:
    """Scores of one kept object. `frame`: clip index of its prompt frame; `xy`: its point in 0..1; `predicted_iou` of SAM 2,
    `attention` at the point, `consistency` (attention consistency, at most 1): their mean is `score`."""

    id: int
    frame: int
    xy: tuple[float, float]
    predicted_iou: float
    attention: float
    consistency: float

    @property
    def score(self) -> float:
        return (self.predicted_iou + self.attention + self.consistency) / 3


@dataclass(frozen=True)
class Tracks:
    """Masks of all kept objects over the whole clip. `store`: masks of N objects on T frames. `tracks`: N records in the same order. N may
    be 0: nothing was found, and `message` says so in a sentence. It also says so if the only track is a best guess that passed no
    threshold."""

    store: MaskStore
    tracks: tuple[Track, ...]
    message: str = ""

    @property
    def length(self) -> int:
        return self.store.length

    @property
    def frame_size(self) -> tuple[int, int]:
        return self.store.frame_size

    def masks(self, index: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Masks of the object at place `index`: (stop - start, H, W) bool."""
        return self.union(start, stop, [index])

    def union(self, start: int = 0, stop: int | None = None, objects: Sequence[int] | None = None) -> Tensor:
        """(stop - start, H, W) bool: pixels of any object, or of any at these places."""
        places = range(len(self.tracks)) if objects is None else objects
        return self.store.union(places, range(self.length)[start:stop])
