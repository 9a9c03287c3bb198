"""Corrections by hand: one object marked on one frame, and tracked anew; all others stay as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..clips.base import Clip
from ..clips.identity import check_tracks
from ..data import Track, Tracks
from ..errors import DecafError
from ..masks import JoinedMasks, MaskStore
from ..report import Progress, Report, silent
from ..settings import CORRECTIONS
from .frames import FeatureCache, FrameEncoder, SomeFrames
from .masks import video_masks
from .memo import Correction, TrackMemo
from .memory_plan import MemoryPlan, Step, TrackedObject
from .segmenter import Clicks, Outputs, Segmenter, SegmenterModel
from .track import Limits, SweptFrames, feature_cache, retry_smaller


@dataclass(frozen=True)
class Marks:
    """What a person has marked on the frame with the clip index `frame`.

    Attributes:
        positive, negative: points (x, y) on the object, and on what does not belong to it, in 0..1.
        box: (left, top, right, bottom) around the object in 0..1, or None.
        mask: (H, W) bool, the object itself, of the size of the tracks' masks; or None.
    """

    frame: int
    positive: Sequence[tuple[float, float]] = ()
    negative: Sequence[tuple[float, float]] = ()
    box: tuple[float, float, float, float] | None = None
    mask: Tensor | None = None

    @property
    def clicks(self) -> Clicks | None:
        points = [*self.positive, *self.negative]
        if not points and self.box is None:
            return None
        positive = torch.arange(len(points)) < len(self.positive)
        return Clicks(torch.tensor(points, dtype=torch.float32).view(-1, 2), positive, self.box)


def correct(
    model: SegmenterModel,
    clip: Clip,
    tracks: Tracks,
    marks: Marks,
    *,
    number: int | None = None,
    mode: str = "refine",
    progress: Progress | Report = silent,
    features: FeatureCache | None = None,
    memo: TrackMemo | None = None,
) -> Tracks:
    """The tracks with one object changed by what was marked on a frame, or with one more.

    Points and box change the mask that the object has there: `marks.mask`, or the tracks' own except in the mode "replace". The result is what
    the segmenter remembers of that frame, and the object is tracked from it through the clip, in both directions, in one sweep.

    Args:
        number: of the object, its `Track.id`; None makes a new one with the next free number.
        mode: one of `decaf.settings.CORRECTIONS`. In all but "replace" frames marked earlier stay key frames of the object.
        progress: callback or `Report`; its count "sam2_correction_encodings" is images encoded, its stage "correction".
        features: as in `segment`.
        memo: what the model has made of this clip; an equal correction of an equal mask is taken from it, and runs no model.

    Returns tracks in which all other objects are what they were, bit for bit.
    Raises DecafError for marks outside the clip, an object that is not there, tracks of another clip, or marks that leave nothing.
    """
    track, place = _object(tracks, number)
    correction = _correction(clip, tracks, marks, number, mode)
    report = Report.of(progress)
    made = None if memo is None else memo.corrected(correction)
    if made is None:
        limits = Limits(1, features or feature_cache(model))
        limits.cache.let_go()  # of what another sweep has left
        with report.stage("correction"):
            made = retry_smaller(model, limits, report, lambda now: _track(model, clip, tracks.frame_size, correction, now, report))
        if memo is not None:
            memo.keep_corrected(correction, made)
    store, predicted_iou = made
    if not store.any():
        raise DecafError(
            f"{model.title} finds nothing at what is marked on frame {marks.frame}. Mark the object itself, with more points or a box around it."
        )
    new = _record(tracks, track, marks, predicted_iou, mode)
    stores, records = [(tracks.store, i) for i in range(len(tracks.tracks))], list(tracks.tracks)
    place = len(records) if place is None else place
    stores[place : place + 1], records[place : place + 1] = [(store, 0)], [new]
    joined = JoinedMasks(stores, tracks.length, tracks.frame_size)
    return replace(tracks, store=joined, tracks=tuple(records), message="")


def is_kept(memo: TrackMemo, clip: Clip, tracks: Tracks, marks: Marks, *, number: int | None = None, mode: str = "refine") -> bool:
    """Whether `correct` takes its masks from the memo, and runs no model. Raises what it raises for such marks."""
    return memo.corrected(_correction(clip, tracks, marks, number, mode)) is not None


def _correction(clip: Clip, tracks: Tracks, marks: Marks, number: int | None, mode: str) -> Correction:
    track, place = _object(tracks, number)
    _check(clip, tracks, marks, mode)
    anchors = _anchors(tracks, track, place, marks.frame, mode)
    base = marks.mask
    if base is None and place is not None and mode != "replace":
        base = tracks.masks(place, marks.frame, marks.frame + 1)[0]
        base = base if base.any() else None
    if base is None and not marks.positive and marks.box is None:
        raise DecafError(
            f"Only negative points are given on frame {marks.frame}, where {_named(number)} has no mask to take them from. Add a positive point, a "
            "box or a mask."
        )
    return Correction(_frames(tracks), marks.frame, marks.clicks, base, anchors)


def _object(tracks: Tracks, number: int | None) -> tuple[Track | None, int | None]:
    """The record of the object and its index."""
    if number is None:
        return None, None
    for place, track in enumerate(tracks.tracks):
        if track.id == number:
            return track, place
    there = f"the tracks hold {', '.join(str(track.id) for track in tracks.tracks)}" if tracks.tracks else "the tracks hold none"
    raise DecafError(f"There is no object {number} to correct; {there}. Give one of these numbers, or make a new object.")


def _check(clip: Clip, tracks: Tracks, marks: Marks, mode: str) -> None:
    if mode not in CORRECTIONS:
        raise DecafError(f"There is no correction '{mode}'. Choose one of {', '.join(CORRECTIONS)}.")
    check_tracks(clip, tracks)
    if not 0 <= marks.frame < tracks.length:
        raise DecafError(f"There is no frame {marks.frame} to correct: the clip has frames 0 to {tracks.length - 1}.")
    frames = _frames(tracks)
    if marks.frame not in frames:
        raise DecafError(
            f"Frame {marks.frame} cannot be corrected: only frames {frames.start} to {frames[-1]} of the clip were asked about. Mark one of these, "
            "or ask about more of the clip."
        )
    height, width = tracks.frame_size
    for kind, points in (("positive", marks.positive), ("negative", marks.negative)):
        for x, y in points:
            if not (0 <= x <= 1 and 0 <= y <= 1):  # also if one is not a number
                at = f"({x * width:.0f}, {y * height:.0f})" if math.isfinite(x) and math.isfinite(y) else f"({x}, {y})"
                raise DecafError(
                    f"The {kind} point {at} lies outside the frames, which are {width}x{height} pixels. Mark it on a picture of that size."
                )
    if marks.box is not None:
        left, top, right, bottom = marks.box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            shown = [f"{side * full:.0f}" if math.isfinite(side) else str(side) for side, full in zip(marks.box, (width, height) * 2, strict=True)]
            raise DecafError(
                f"The box from ({shown[0]}, {shown[1]}) to ({shown[2]}, {shown[3]}) is empty or does not lie in the frames, which are "
                f"{width}x{height} pixels. Draw it on a picture of that size."
            )
    if marks.mask is not None:
        if tuple(marks.mask.shape) != tuple(tracks.frame_size):
            high, wide = marks.mask.shape
            raise DecafError(f"The mask to correct with is {wide}x{high}, but the frames are {width}x{height}. Give a mask of that size.")
        if not marks.mask.any():
            raise DecafError("The mask to correct with is empty. Paint the object, or leave the mask out.")
    if marks.mask is None and marks.clicks is None:
        raise DecafError("Nothing is marked. Give points, a box or a mask of the object.")


def _frames(tracks: Tracks) -> range:
    """Those that were asked about."""
    return range(tracks.length) if tracks.clip is None else tracks.clip.frames


def _named(number: int | None) -> str:
    return "a new object" if number is None else f"object {number}"


def _anchors(tracks: Tracks, track: Track | None, place: int | None, frame: int, mode: str) -> dict[int, Tensor]:
    """The other key frames of the object with its (H, W) masks there; those where it is not seen say nothing about it."""
    if track is None or mode == "replace":
        return {}
    frames = {*track.corrected, *([track.frame] if mode == "add" else [])} - {frame}
    masks = {each: tracks.masks(place, each, each + 1)[0] for each in sorted(frames)}
    return {each: mask for each, mask in masks.items() if mask.any()}


def _record(tracks: Tracks, track: Track | None, marks: Marks, predicted_iou: float | None, mode: str) -> Track:
    iou = 1.0 if predicted_iou is None else predicted_iou  # a mask of one's own is taken as it is
    if track is not None and mode != "replace":
        return replace(track, predicted_iou=iou, corrected=tuple(sorted({*track.corrected, marks.frame})))
    number = track.id if track is not None else max((each.id for each in tracks.tracks), default=-1) + 1
    return Track(number, marks.frame, _middle(marks), iou, 0.0, 0.0, (marks.frame,))


def _middle(marks: Marks) -> tuple[float, float]:
    """A point that stands for what was marked, in 0..1."""
    if marks.positive:
        return tuple(marks.positive[0])
    if marks.box is not None:
        left, top, right, bottom = marks.box
        return (left + right) / 2, (top + bottom) / 2
    y, x = ((marks.mask.nonzero().double() + 0.5) / torch.tensor(marks.mask.shape)).mean(0).tolist()
    return x, y


def _track(
    model: SegmenterModel,
    clip: Clip,
    frame_size: tuple[int, int],
    correction: Correction,
    limits: Limits,
    report: Report,
) -> tuple[MaskStore, float | None]:
    """Masks of the object on all frames that were asked about, and the predicted IoU of what the clicks mean."""
    frames, base, anchors = correction.frames, correction.base, correction.anchors
    first = min([correction.frame, *anchors]) - frames.start
    what = f"{model.title}: tracking the corrected object"
    swept_frames = SweptFrames(report, what, (first, first), len(frames), "sam2_correction_encodings")
    store, predicted_iou = MaskStore(1, len(clip), frame_size), None
    with model.segmenter(report.check_cancelled) as segmenter:
        encoder = FrameEncoder(segmenter, SomeFrames(clip, frames), limits.cache, swept_frames.encoding, indices=frames)
        prompts: dict[int, Outputs] = {}
        for frame in sorted({correction.frame, *anchors}):
            place = frame - frames.start
            seen = encoder.encode(place)
            if frame == correction.frame and correction.clicks is not None:
                prompts[place], predicted_iou = segmenter.remember_clicks(seen, correction.clicks, base)
            else:
                prompts[place] = segmenter.remember(seen, [base if frame == correction.frame else anchors[frame]])
        for place, logits in sweep_prompted(segmenter, encoder, prompts):
            for _, masks in video_masks(logits, frame_size):
                store.put(0, frames[place], masks[0], logits[0, 0])
            swept_frames.done(frames[place], partial(clip.__getitem__, frames[place]), logits)
    return store, predicted_iou


def sweep_prompted(segmenter: Segmenter, encoder: FrameEncoder, prompts: Mapping[int, Outputs]) -> Iterator[tuple[int, Tensor]]:
    """Tracks one object that is prompted on several frames. `prompts`: what the segmenter has remembered of it, by frame.

    Yields (frame, logits (1, 1, h, w)) from the first prompt to the end and then back to the beginning, as a video predictor does that is
    given all prompts and then asked to propagate.
    """
    length, (first, *more) = len(encoder), sorted(prompts)
    tracked = TrackedObject(0, MemoryPlan(first, length, segmenter.reach, more))
    for frame, outputs in prompts.items():
        tracked.memories[frame], tracked.pointers[frame] = outputs.memories[0], outputs.pointers[0]
    steps = [Step(frame, False) for frame in range(first, length)] + [Step(frame, True) for frame in range(first - 1, -1, -1)]
    to_track = [step.frame for step in steps if step.frame not in prompts]
    following = dict(zip(to_track, [*to_track[1:], None], strict=False))
    for step in steps:
        if step.frame in prompts:
            yield step.frame, prompts[step.frame].logits
        else:
            seen, wanted = encoder.encode(step.frame, then=following[step.frame]), tracked.plan.needs_memory(step.frame)
            outputs = segmenter.track(seen, [tracked.bank(step)], [wanted], length)
            if wanted:
                tracked.memories[step.frame] = outputs.memories[0]
            if tracked.plan.needs_pointer(step.frame):
                tracked.pointers[step.frame] = outputs.pointers[0]
            yield step.frame, outputs.logits
        tracked.release(step)
