"""What was found for the latest queries about a clip, and what was corrected, so that another threshold costs only what was not tracked before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data import SAM2Prompts
from ..masks import JoinedMasks, Masks, MaskStore
from .candidates import Candidate
from .segmenter import Clicks


@dataclass(frozen=True)
class Tracklet:
    """A candidate followed over the key frames. `coverage`: (K, rows, cols); `mask`: (H, bytes) packed, on its prompt frame."""

    candidate: Candidate
    coverage: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Found:
    """All tracklets of one query, with `nms_iou` as the overlap of suppression, and the masks on every frame of those that were tracked
    through the clip so far: by tracklet, their store and their place in it."""

    prompts: SAM2Prompts
    nms_iou: float
    tracklets: list[Tracklet]
    masks: dict[int, tuple[MaskStore, int]] = field(default_factory=dict)

    def store(self, chosen: Sequence[int], length: int, frame_size: tuple[int, int]) -> Masks:
        """Masks of these tracklets, which all have been tracked."""
        stores = [self.masks[i] for i in chosen]
        whole, places = stores[0][0], [place for _, place in stores]
        if all(store is whole for store, _ in stores) and places == list(range(whole.objects)):
            return whole
        return JoinedMasks(stores, length, frame_size)


@dataclass(frozen=True)
class Correction:
    """All that the masks of a corrected object follow from, besides model and clip: `frames` that were asked about, `frame` that was marked and
    what was marked there, the (H, W) mask `base` that it changes, and the masks of other key frames by frame."""

    frames: range
    frame: int
    clicks: Clicks | None
    base: Tensor | None
    anchors: Mapping[int, Tensor]

    def equals(self, other: Correction) -> bool:
        if (self.frames, self.frame, [*self.anchors]) != (other.frames, other.frame, [*other.anchors]):
            return False
        masks = zip([self.base, *self.anchors.values()], [other.base, *other.anchors.values()], strict=True)
        return _same_clicks(self.clicks, other.clicks) and all(_same(first, second) for first, second in masks)


class TrackMemo:
    """Of one model and one clip. `most`: queries whose objects are kept, and corrections; the latest."""

    def __init__(self, most: int = 4):
        self._most = most
        self._kept: list[Found] = []
        self._corrected: list[tuple[Correction, tuple[MaskStore, float | None]]] = []

    def corrected(self, correction: Correction) -> tuple[MaskStore, float | None] | None:
        """The masks that an equal correction has made, and their predicted IoU."""
        return next((made for kept, made in self._corrected if kept.equals(correction)), None)

    def keep_corrected(self, correction: Correction, made: tuple[MaskStore, float | None]) -> None:
        self._corrected = [*self._corrected, (correction, made)][-self._most :]

    def found(self, prompts: SAM2Prompts, nms_iou: float) -> Found | None:
        """What was found for equal prompts."""
        return next((found for found in self._kept if found.nms_iou == nms_iou and _equal(found.prompts, prompts)), None)

    def keep(self, found: Found) -> None:
        self._kept = [*self._kept, found][-self._most :]


def _equal(first: SAM2Prompts, second: SAM2Prompts) -> bool:
    pairs = [(first.key, second.key), (first.xy, second.xy), (first.value, second.value), (first.fused.map, second.fused.map)]
    clips = first.fused.clip, second.fused.clip
    same_frames = clips[0].key_frames == clips[1].key_frames and clips[0].part == clips[1].part
    return first is second or (same_frames and all(torch.equal(a, b) for a, b in pairs))


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    return first is second or (first is not None and second is not None and torch.equal(first, second))


def _same_clicks(first: Clicks | None, second: Clicks | None) -> bool:
    if first is None or second is None:
        return first is second
    return _same(first.xy, second.xy) and _same(first.positive, second.positive) and first.box == second.box
