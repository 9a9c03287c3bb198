"""The records that stages exchange: small, frozen, with CPU tensors.

A frame has two numbers: its *clip index* (0..T-1, in the clip) and, if it is a key frame, its *key index* (0..K-1, in `ClipInfo.key_frames`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .masks import JoinedMasks, Masks


@dataclass(frozen=True)
class ClipInfo:
    """Identifies the clip that attention was taken from, so that later stages can check that they are given the same one.

    Attributes:
        length: T, frames of the clip.
        frame_size: (H, W) in pixels.
        key_frames: K ascending clip indices.
        thumbnails: (K, 16, 16, 3) uint8, the key frames area-averaged.
        part: first and last frame that were asked about, both included; outside of them nothing is masked. None for all.
    """

    length: int
    frame_size: tuple[int, int]
    key_frames: tuple[int, ...]
    thumbnails: Tensor
    part: tuple[int, int] | None = None

    @property
    def frames(self) -> range:
        """Clip indices of the part that was asked about."""
        first, last = self.part or (0, self.length - 1)
        return range(first, last + 1)


@dataclass(frozen=True)
class Attention:
    """Attention rollout of the last prompt token over the visual tokens (see `decaf.attention.rollout`): float32, non-negative, not normalised.

    Attributes:
        kind: "object", "background", or "contrast" (their normalised difference, 0..1).
        video: (slots, rows, cols), from one prompt with all key frames as a video. A slot covers one or two key frames.
        frame: (K, rows', cols'), from one prompt per key frame.
        query: the user's text, cleaned.
        question: the text of the prompt.
        answers: generated answers, first to the video, then to each key frame; empty when nothing was generated.
        presence: P(yes) / (P(yes) + P(no)) for the question whether the object is visible (see `decaf.attention.presence`); None if it was
            not asked.
        not_this: attention of the same kind and grids for what is not meant (see `AttentionSettings.not_this`), of an object attention and of
            what is made of it; None if nothing was given.
        name: what the query is called: by the user, else its number, from 1, if there are several; empty for a single one without a name.
        seen: (K, rows', cols') bool, cells of the frame maps that single frames showed: where those were cut (see `decaf.attention.zoom`), the
            others are 0. None for all.
    """

    kind: str
    video: Tensor
    frame: Tensor
    clip: ClipInfo
    query: str
    question: str
    answers: tuple[str, ...] = ()
    presence: float | None = None
    not_this: Attention | None = None
    name: str = ""
    seen: Tensor | None = None


@dataclass(frozen=True)
class FusedAttention:
    """Video and frame maps fused into one.

    Attributes:
        map: (K, rows', cols') float32 in 0..1. All zero means that nothing was attended.
        query, presence, name: as in `Attention`.
        not_this: the same map, (K, rows', cols') float32 in 0..1, of what is not meant; None if nothing was given.
    """

    map: Tensor
    clip: ClipInfo
    query: str = ""
    presence: float | None = None
    not_this: Tensor | None = None
    name: str = ""

    def absence(self, threshold: float) -> str:
        """Why nothing is to be masked: the model does not see the object, its presence is below the threshold. Empty if it is not."""
        if self.presence is None or self.presence >= threshold:
            return ""
        return (
            f'"{self.query.rstrip(".")}" is not in this clip: presence {self.presence:.2f}, and below {threshold:g} nothing is masked. '
            "Set the presence threshold to 0 to mask the best match all the same."
        )


def caption(record: Attention | FusedAttention | Tracks) -> str:
    """The query of a record, with its name if it has one: "ball: the ball he throws.\""""
    return f"{record.name}: {record.query}" if record.name else record.query


@dataclass(frozen=True)
class SAM2Prompts:
    """Points for SAM 2, one object each, ordered by frame, then row, then column.

    Attributes:
        key: (n,) int64 key indices.
        xy: (n, 2) float32 in 0..1, x to the right, y down.
        value: (n,) float32, fused attention at the points, 0..1.
        fused: the maps that the points come from.
        message: why there are no points, if the object was judged absent; else empty.
    """

    key: Tensor
    xy: Tensor
    value: Tensor
    fused: FusedAttention
    message: str = ""


@dataclass(frozen=True)
class Track:
    """Scores of one kept object.

    Attributes:
        frame: clip index of its prompt frame.
        xy: its point, 0..1.
        predicted_iou: SAM 2's own estimate of its mask; 1 of a mask that was given; of another tracker's object that tracker's score.
        attention: fused attention at the point, 0..1.
        consistency: attention consistency, at most 1. `score` is the mean of the three. The method *as published* chooses objects by it;
            *agreement* chooses by `decaf.tracking.agreement` and only reports it. An object that no sentence found has 0 for both.
        corrected: clip indices, ascending, of the frames on which somebody has marked the object (see `decaf.tracking.correct`).
        match: of an object that was given, how well the attention means it (see `decaf.tracking.match`), at most 1; `score` is then this
            alone. `frame` and `xy` are where the attention sees most of it, and `attention` is the mean in its masks.
        decisive: clip indices, ascending, of the fewest key frames that together hold half of the attention to the object. Of what is meant by
            when it is there, or by what it does once, these are few.
    """

    id: int
    frame: int
    xy: tuple[float, float]
    predicted_iou: float
    attention: float
    consistency: float
    corrected: tuple[int, ...] = ()
    match: float | None = None
    decisive: tuple[int, ...] = ()

    @property
    def score(self) -> float:
        if self.match is not None:
            return self.match
        return (self.predicted_iou + self.attention + self.consistency) / 3


@dataclass(frozen=True)
class Tracks:
    """Masks of all kept objects over the whole clip.

    Attributes:
        store: masks of N objects on T frames: as they were tracked, or refined (`decaf.finishing`).
        tracks: N records in the same order. N may be 0: nothing was found.
        message: a sentence that says why N is 0, or that the only track is a best guess below the threshold; else empty.
        clip: the clip that they were made of; None if it is not known.
        query, name: as in `Attention`; empty if no sentence found them.
    """

    store: Masks
    tracks: tuple[Track, ...]
    message: str = ""
    clip: ClipInfo | None = None
    query: str = ""
    name: str = ""

    @property
    def length(self) -> int:
        return self.store.length

    @property
    def frame_size(self) -> tuple[int, int]:
        return self.store.frame_size

    def picked(self, indices: Sequence[int]) -> Tracks:
        """Those with these indices, in this order. Each keeps its number."""
        store = JoinedMasks([(self.store, index) for index in indices], self.length, self.frame_size)
        return replace(self, store=store, tracks=tuple(self.tracks[index] for index in indices))

    def best(self, score_threshold: float | None = None, most: int | None = None) -> Tracks:
        """Those that score above the threshold, and at most so many, the best ones, in their order. What somebody has marked passes every
        threshold and comes before all others."""
        rank = [(not track.corrected, -track.score, index) for index, track in enumerate(self.tracks)]
        kept = sorted(each for each in rank if score_threshold is None or not each[0] or -each[1] > score_threshold)[:most]
        if len(kept) == len(self.tracks):
            return self
        message = self.message if kept else f"No object scores above {score_threshold:g}."
        return replace(self.picked(sorted(index for *_, index in kept)), message=message)

    def masks(self, index: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Masks of object `index`: (stop - start, H, W) bool."""
        return self.union(start, stop, [index])

    def union(self, start: int = 0, stop: int | None = None, objects: Sequence[int] | None = None) -> Tensor:
        """(stop - start, H, W) bool: pixels of any object, or of any of those with the indices `objects`."""
        indices = range(len(self.tracks)) if objects is None else objects
        return self.store.union(indices, range(self.length)[start:stop])

    def alpha(self, start: int = 0, stop: int | None = None, objects: Sequence[int] | None = None) -> Tensor:
        """(stop - start, H, W) uint8, 0 outside and 255 inside of those objects; between them at their soft edges. At least 128 just where
        `union` is true."""
        indices = range(len(self.tracks)) if objects is None else objects
        return self.store.alpha(indices, range(self.length)[start:stop])

    def levels(self, start: int = 0, stop: int | None = None, objects: Sequence[int] | None = None) -> Tensor:
        """(stop - start, H, W) uint8 for whoever wants masks as they were made: `alpha` if they are finished, else the `union` as 0 and 255."""
        if self.store.finished:
            return self.alpha(start, stop, objects)
        return self.union(start, stop, objects).byte() * 255
