"""From points on key frames to masks of objects on all frames: the DecAF paper's attention-guided prompting of a video segmenter."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..clips.base import Clip
from ..clips.identity import check_same_clip
from ..data import SAM2Prompts, Track, Tracks
from ..devices import allocated_bytes, empty_caches, free_memory, is_out_of_memory, out_of_memory
from ..errors import DecafError
from ..masks import Masks, MaskStore, pack_bits
from ..report import Preview, Progress, Report, silent
from ..settings import TrackingSettings
from .candidates import CandidatePrompts
from .frames import FeatureCache, FrameEncoder, SomeFrames
from .masks import mask_bytes, video_masks
from .memo import Found, Tracklet, TrackMemo
from .segmenter import SegmenterModel
from .selection import attention_consistency, final_scores, grid_coverage, not_meant, select
from .sweep import FixedPrompts, Sweep

log = logging.getLogger(__name__)

# Of the segmenter's input: four objects at 1024 x 1024, whose keys and values in the memory attention are then half a gigabyte.
_PIXELS_AT_ONCE = 4 << 20
_FEATURE_BYTES = 512 << 20
# On the CPU beside the clip's decoded frames: one object, and features of fifteen of sixteen key frames at 1024 x 1024.
_PIXELS_AT_ONCE_ON_CPU = 1 << 20
_FEATURE_BYTES_ON_CPU = 256 << 20


USUAL_OBJECTS = 16
"""Objects whose memories there is room for beforehand; a clip seldom has more."""


@dataclass(frozen=True)
class Limits:
    """What bounds memory. `batch`: objects or points that go through the segmenter at once. `cache`: of image features, from the key frames to the
    whole clip and from one sweep to the next."""

    batch: int
    cache: FeatureCache


def segment(
    model: SegmenterModel,
    clip: Clip,
    prompts: SAM2Prompts,
    *,
    nms_iou: float = TrackingSettings.nms_iou,
    score_threshold: float = TrackingSettings.score_threshold,
    max_tracks: int | None = TrackingSettings.max_tracks,
    progress: Progress | Report = silent,
    features: FeatureCache | None = None,
    memo: TrackMemo | None = None,
) -> Tracks:
    """Masks of the objects that the points mean, on every frame of the clip; outside of the part that was asked about (`ClipInfo.part`) they are
    empty, and nothing is tracked.

    `nms_iou`: overlap above which the worse of two masks is dropped.
    `score_threshold`: tracklets whose mean of predicted IoU, attention and attention consistency is above it are kept; if there are none,
    the best one. `max_tracks`: keep at most so many, the best. `features`: a `feature_cache` of this model and this clip that several queries
    share. `memo`: of this model and this clip, too: what it has of an earlier call with equal prompts is not computed again, so that another
    threshold or number of tracks costs only objects that were not kept before.

    `progress`: callback or `Report`. Counts of the latter, "sam2_key_encodings" and "sam2_clip_encodings", are images encoded: at most
    two per key frame and two per frame, and one per frame of the clip in all as long as features fit their budget; its stage: "segmentation".

    There is no limit to the number of points: they are decoded a few at a time, and every distinct mask becomes a tracklet.

    Returns N >= 0 tracks in the order in which they were found; none, with a message, if there are no points or the segmenter sees nothing at them.
    A message also says so if the only track is a best guess.
    Raises DecafError when the prompts were made from another clip or do not fit together, or for a threshold or number of
    tracks that cannot be. Running out of memory is tried once more with smaller batches, and then is `devices.OutOfMemoryError`.
    """
    if math.isnan(score_threshold):
        raise DecafError("The score threshold is not a number; give one from 0 to 1.")
    if max_tracks is not None and max_tracks < 1:
        raise DecafError(f"max_tracks is {max_tracks}; give 1 or more, or leave it out.")
    _check_prompts(prompts)
    check_same_clip(clip, prompts.fused.clip)
    report = Report.of(progress)
    if len(prompts.key) == 0:
        unattended = "Nothing found: no cell of the attention map reaches the point threshold. Lower it, or look at the heat map."
        return _nothing(clip, prompts, prompts.message or unattended)
    features = features or feature_cache(model)
    features.let_go()  # of what another query has left
    limits = Limits(objects_at_once(model, model.device), features)
    report.count("sam2_key_encodings", 0)
    report.count("sam2_clip_encodings", 0)
    found = memo.found(prompts, nms_iou) if memo else None
    with report.stage("segmentation"):
        if found is None:
            tracklets = retry_smaller(model, limits, report, lambda now: _find_tracklets(model, clip, prompts, nms_iou, now, report))
            found = Found(prompts, nms_iou, tracklets)
            if memo:
                memo.keep(found)
        if not found.tracklets:
            return _nothing(clip, prompts, f"Nothing found: {model.title} gives an empty mask at all {len(prompts.key)} points.")
        meant = _meant(found.tracklets, prompts)
        if not meant:
            return _nothing(clip, prompts, "Nothing found: whatever is seen at the points is looked at more for 'not this' than for the query.")
        chosen, tracks = _choose(found.tracklets, meant, prompts, score_threshold, max_tracks)
        new = [i for i in chosen if i not in found.masks]
        if new:
            starts = [(prompts.fused.clip.key_frames[found.tracklets[i].candidate.key], found.tracklets[i].mask) for i in new]
            tracked = retry_smaller(model, limits, report, lambda now: _propagate(model, clip, prompts.fused.clip.frames, starts, now, report))
            found.masks.update({i: (tracked, place) for place, i in enumerate(new)})
        store = found.store(chosen, len(clip), clip.frame_size)
    if not store.any():
        return _nothing(clip, prompts, f"Nothing found: {model.title} lost what it saw at the points on every frame.")
    message = ""
    if tracks[0].score <= score_threshold:  # the best one stands in where none passes
        message = f"Nothing scored above {score_threshold:g}; the best guess, with a score of {tracks[0].score:.2f}, is kept."
    return _tracks(store, tracks, message, prompts)


def needs_model(
    memo: TrackMemo,
    prompts: SAM2Prompts,
    *,
    nms_iou: float = TrackingSettings.nms_iou,
    score_threshold: float = TrackingSettings.score_threshold,
    max_tracks: int | None = TrackingSettings.max_tracks,
) -> bool:
    """Whether `segment` with these arguments runs the model: not if `memo` has all that it returns, or there are no points. A model that is not
    needed need not be brought to its device."""
    if len(prompts.key) == 0:
        return False
    found = memo.found(prompts, nms_iou)
    if found is None:
        return True
    meant = _meant(found.tracklets, prompts)
    chosen = _choose(found.tracklets, meant, prompts, score_threshold, max_tracks)[0] if meant else []
    return any(i not in found.masks for i in chosen)


def feature_cache(
    model: SegmenterModel, *, shared: bool = False, budget: int | None = None, aside: int | None = None
) -> FeatureCache:
    """For image features of one clip. `shared`: those of as many frames as fit stay from one query to the next. `budget`: bytes of the device that
    all may take. `aside`: bytes of the CPU's memory that those may take that stay, instead of the device's."""
    free = free_memory(model.device)
    if free is not None and budget is not None:
        free = max(0, min(free, budget - allocated_bytes(model.device)))
    waiting = _FEATURE_BYTES_ON_CPU if model.device.type == "cpu" else _FEATURE_BYTES
    lasting = _FEATURE_BYTES_ON_CPU if free is None else free // 4
    if aside is not None:
        return FeatureCache(waiting, aside, aside=True)
    return FeatureCache(waiting, lasting if shared else 0)


def objects_at_once(model: SegmenterModel, device: torch.device) -> int:
    pixels = _PIXELS_AT_ONCE_ON_CPU if device.type == "cpu" else _PIXELS_AT_ONCE
    return max(1, pixels // model.image_size**2)


def memory_needed(
    model: SegmenterModel, device: torch.device, length: int, *, points: int = USUAL_OBJECTS, frame_size: tuple[int, int] | None = None
) -> int:
    """Bytes that `segment` takes on `device` beside the weights for a clip of `length` frames.

    Args:
        device: where the model will be by then.
        points: of the prompts; it is reckoned that all lie on one key frame, and at most USUAL_OBJECTS become objects.
        frame_size: (height, width) of the clip; None for any.
    """
    features = min(_FEATURE_BYTES_ON_CPU if device.type == "cpu" else _FEATURE_BYTES, length * model.feature_bytes())
    objects, at_once = min(points, USUAL_OBJECTS), min(points, objects_at_once(model, device))
    return features + mask_bytes(objects, frame_size) + model.working_bytes(at_once, objects)


def _check_prompts(prompts: SAM2Prompts) -> None:
    """Prompts that were put together by hand may not fit together, and would prompt nothing or another frame without a word."""
    frames, points = len(prompts.fused.clip.key_frames), len(prompts.key)
    if (len(prompts.fused.map), len(prompts.xy), len(prompts.value)) != (frames, points, points):
        raise DecafError(
            f"The prompts have {points} key indices, {len(prompts.xy)} points and {len(prompts.value)} values, and {len(prompts.fused.map)} maps "
            f"for {frames} key frames; there must be as many of each. Make the prompts again."
        )
    if prompts.fused.not_this is not None and prompts.fused.not_this.shape != prompts.fused.map.shape:
        raise DecafError(
            f"The prompts' map of 'not this' has the shape {tuple(prompts.fused.not_this.shape)}, the map of the query "
            f"{tuple(prompts.fused.map.shape)}. Make the prompts again."
        )
    inside = bool(((prompts.key >= 0) & (prompts.key < frames)).all() and ((prompts.xy >= 0) & (prompts.xy <= 1)).all())
    if not inside or not prompts.value.isfinite().all():
        raise DecafError(
            f"The prompts hold key indices outside 0 to {frames - 1}, points outside 0 to 1, or values that are not finite numbers. "
            "Make the prompts again."
        )


def _nothing(clip: Clip, prompts: SAM2Prompts, message: str) -> Tracks:
    return _tracks(MaskStore(0, len(clip), clip.frame_size), [], message, prompts)


def _tracks(store: Masks, tracks: list[Track], message: str, prompts: SAM2Prompts) -> Tracks:
    return Tracks(store, tuple(tracks), message, prompts.fused.clip, prompts.fused.query, prompts.fused.name)


class SweptFrames:
    """Reports the frames of a sweep, and counts the images encoded for it as `count`."""

    def __init__(self, report: Report, what: str, prompted: tuple[int, int], length: int, count: str):
        first, last = prompted  # frames on which objects begin
        self._done, self._total = 0, length - first + last  # frames forward and frames backward
        self._report, self._what, self._count = report, what, count
        report.count(count, 0)
        report.progress(0, self._total, what)

    def encoding(self) -> None:
        self._report.count(self._count)

    def done(self, index: int, frame: Callable[[], Tensor], logits: Tensor) -> None:
        """`index` of the frame in the clip; `frame`: reads it; `logits` (n, 1, h, w) of the objects on it."""
        self._done += 1
        self._report.progress(self._done, self._total, self._what)
        self._report.preview(lambda: Preview(index, frame(), masks=tuple((logits[:, 0] > 0).cpu())))


def _find_tracklets(
    model: SegmenterModel, clip: Clip, prompts: SAM2Prompts, nms_iou: float, limits: Limits, report: Report
) -> list[Tracklet]:
    """Points to masks, suppression, and tracking over the key frames."""
    frames = SomeFrames(clip, prompts.fused.clip.key_frames)
    attention = prompts.fused.map
    coverage: dict[int, Tensor] = {}
    prompt_masks: dict[int, Tensor] = {}
    what = f"{model.title}: points and tracklets on the key frames"
    swept_frames = SweptFrames(report, what, (int(prompts.key.min()), int(prompts.key.max())), len(frames), "sam2_key_encodings")
    with model.segmenter(report.check_cancelled) as segmenter:
        prompter = CandidatePrompts(segmenter, prompts, clip.frame_size, name=model.name, nms_iou=nms_iou, batch=limits.batch)
        encoder = FrameEncoder(segmenter, frames, limits.cache, swept_frames.encoding, indices=prompts.fused.clip.key_frames, hold=True)
        for swept in Sweep(segmenter, encoder, clip.frame_size[1], batch=limits.batch).run(prompter):
            for part, masks in video_masks(swept.logits, clip.frame_size):
                covered = grid_coverage(masks, attention.shape[1:]).cpu()
                for i, id_ in enumerate(swept.ids[part]):
                    coverage.setdefault(id_, torch.zeros_like(attention))[swept.frame] = covered[i]
                    if prompter.standing[id_].key == swept.frame:
                        prompt_masks[id_] = pack_bits(masks[i])
            index = prompts.fused.clip.key_frames[swept.frame]
            swept_frames.done(index, partial(clip.__getitem__, index), swept.logits)
    return [Tracklet(candidate, coverage[id_], prompt_masks[id_]) for id_, candidate in prompter.standing.items()]


def _meant(tracklets: list[Tracklet], prompts: SAM2Prompts) -> list[int]:
    """Indices of the tracklets that are not what the user has said not to mean."""
    if prompts.fused.not_this is None:
        return list(range(len(tracklets)))
    return (~not_meant(torch.stack([t.coverage for t in tracklets]), prompts.fused.map, prompts.fused.not_this)).nonzero()[:, 0].tolist()


def _choose(
    tracklets: list[Tracklet], meant: list[int], prompts: SAM2Prompts, score_threshold: float, max_tracks: int | None
) -> tuple[list[int], list[Track]]:
    """Indices of the tracklets that are kept among those in `meant`, and their records."""
    consistency = attention_consistency(torch.stack([tracklets[i].coverage for i in meant]), prompts.fused.map)
    final = final_scores(torch.tensor([tracklets[i].candidate.score for i in meant]), consistency)
    chosen = select(final, score_threshold)
    if max_tracks is not None and len(chosen) > max_tracks:
        best = sorted(chosen, key=lambda i: -float(final[i]))[:max_tracks]
        log.info("%d tracks are above the threshold, the best %d are kept", len(chosen), max_tracks)
        chosen = sorted(best)
    tracks = []
    for number, i in enumerate(chosen):
        candidate = tracklets[meant[i]].candidate
        x, y = prompts.xy[candidate.point].tolist()
        frame = prompts.fused.clip.key_frames[candidate.key]
        tracks.append(Track(number, frame, (x, y), candidate.predicted_iou, candidate.attention, float(consistency[i])))
    return [meant[i] for i in chosen], tracks


def _propagate(
    model: SegmenterModel, clip: Clip, frames: range, starts: list[tuple[int, Tensor]], limits: Limits, report: Report
) -> MaskStore:
    """Masks of all objects on these frames of the clip; on others they are empty. `starts`: of each its prompt frame and packed mask (H, bytes)
    there."""
    prompter = FixedPrompts([(frame - frames.start, mask) for frame, mask in starts])
    what = f"{model.title}: tracking through the clip"
    swept_frames = SweptFrames(report, what, (prompter.first, prompter.last), len(frames), "sam2_clip_encodings")
    store = MaskStore(len(starts), len(clip), clip.frame_size)
    with model.segmenter(report.check_cancelled) as segmenter:
        encoder = FrameEncoder(segmenter, SomeFrames(clip, frames), limits.cache, swept_frames.encoding, indices=frames)
        for swept in Sweep(segmenter, encoder, clip.frame_size[1], batch=limits.batch).run(prompter):
            for part, found in video_masks(swept.logits, clip.frame_size):
                for id_, mask, logits in zip(swept.ids[part], found.cpu(), swept.logits[part, 0].cpu(), strict=True):
                    store.put(id_, frames[swept.frame], mask, logits)
            swept_frames.done(frames[swept.frame], partial(clip.__getitem__, frames[swept.frame]), swept.logits)
    return store


def retry_smaller(model: SegmenterModel, limits: Limits, report: Report, run: Callable[[Limits], object]) -> object:
    """`run`, and if memory does not suffice, once more with less at a time. Counts are of the run that succeeded."""
    with report.attempt():
        return run(limits)
    log.warning("%s ran out of memory with %d objects at a time; trying again with one", model.title, limits.batch)
    limits.cache.clear()
    empty_caches()
    try:
        return run(Limits(batch=1, cache=FeatureCache(0)))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        remedy = f"Choose a smaller {model.title} model, or free the GPU memory that other models hold."
        raise out_of_memory(error, f"{model.title}'s tracking", remedy) from None
