"""Which of many tracked objects the attention means: each is scored by how well it matches the attention, and the best are picked.

The paper tracks from attended points and then asks whether a tracklet covers what is attended (section 3.4). Here the tracks are given, whoever
made them, and the second half of that is all that is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..data import FusedAttention, Track, Tracks
from ..errors import DecafError
from ..report import Progress, Report, silent
from ..settings import MATCHES, PICKS, PickSettings
from .agreement import decisive_frames
from .selection import attention_consistency, grid_coverage


def pick_by_attention(
    tracks: Tracks, fused: FusedAttention, settings: PickSettings | None = None, *, progress: Progress | Report = silent
) -> tuple[Tracks, Tracks]:
    """(picked, all): the objects that the attention means, and all objects; each keeps its number and has its `Track.match`.

    Args:
        tracks: of the clip that the attention was taken from; see `decaf.tracking.outside`.
        progress: callback or `Report`; one unit per object and key frame. Masks are read one at a time.

    No object is picked, and the picked tracks' message says why, if the model does not see what was asked for, if there is no object, or if none
    matches. DecafError: a setting that cannot be, or attention that does not fit its clip.
    """
    settings = settings or PickSettings()
    _check(fused, settings)
    coverage = _coverage(tracks, fused, Report.of(progress))
    matched = replace(tracks, tracks=_matched(tracks.tracks, coverage, fused, settings.match))
    message = fused.absence(settings.presence_threshold) or _nothing(matched, coverage, fused, settings)
    if message:
        return replace(matched.picked([]), message=message), matched
    return replace(matched.picked(_picked(matched, settings)), message=""), matched


def agreement(coverage: Tensor, attention: Tensor) -> Tensor:
    """Cosine similarity of the part of each cell that an object covers and the attention, over the frames on which the object is seen: 1 where
    what it covers is what is attended, less for a part of it, for more than it, and for something else.

    `coverage`: (n, K, rows, cols) in 0..1; `attention`: (K, rows, cols) in 0..1. Returns (n,) in 0..1, 0 for what is never seen.
    """
    seen = (coverage.amax((2, 3)) > 0)[..., None, None]
    length = coverage.square().sum((1, 2, 3)).sqrt() * (attention * seen).square().sum((1, 2, 3)).sqrt()
    return torch.where(length > 0, (coverage * attention).sum((1, 2, 3)) / length, 0.0)


def density(coverage: Tensor, attention: Tensor) -> Tensor:
    """Mean attention of what an object covers, over all frames. `coverage`: (n, K, rows, cols) in 0..1; `attention`: (K, rows, cols) in 0..1.
    Returns (n,) in 0..1, 0 for what is never seen."""
    area = coverage.sum((1, 2, 3))
    return torch.where(area > 0, (coverage * attention).sum((1, 2, 3)) / area, 0.0)


RULES = dict(zip(MATCHES, (agreement, density, attention_consistency), strict=True))
"""What computes each of MATCHES, from coverage and attention as in `agreement`."""


def _check(fused: FusedAttention, settings: PickSettings) -> None:
    if settings.pick not in PICKS or settings.match not in MATCHES:
        raise DecafError(
            f"'{settings.pick}' by '{settings.match}' is no way to pick. Choose one of {', '.join(PICKS)}, by {', '.join(MATCHES)}."
        )
    if settings.number < 1:
        raise DecafError(f"{settings.number} objects were to be picked. Pick at least one.")
    for name in ("share", "least", "presence_threshold"):
        if not 0 <= getattr(settings, name) <= 1:  # never true of NaN
            raise DecafError(f"'{name}' is {getattr(settings, name):g}, which is not between 0 and 1. Give such a number.")
    keys, maps = fused.clip.key_frames, fused.map
    if maps.ndim != 3 or len(maps) != len(keys) or not all(0 <= frame < fused.clip.length for frame in keys) or not maps.isfinite().all():
        raise DecafError("The fused attention does not fit its clip, or has values that are not finite numbers. Extract the attention again.")


def _coverage(tracks: Tracks, fused: FusedAttention, report: Report) -> Tensor:
    """(N, K, rows, cols): the part of every cell that each object covers on the key frames."""
    keys, (objects, done) = fused.clip.key_frames, (len(tracks.tracks), 0)
    coverage = torch.zeros(objects, *fused.map.shape)
    for key, frame in enumerate(keys):
        for index in range(objects):
            report.progress(done, objects * len(keys), "Matching objects with the attention")
            coverage[index, key] = grid_coverage(tracks.masks(index, frame, frame + 1), fused.map.shape[1:])[0]
            done += 1
    report.progress(done, objects * len(keys), "Matching objects with the attention")
    return coverage


def _matched(records: Sequence[Track], coverage: Tensor, fused: FusedAttention, rule: str) -> tuple[Track, ...]:
    if not len(records):
        return ()
    attention, (rows, cols) = fused.map, fused.map.shape[1:]
    columns = zip(
        RULES[rule](coverage, attention).tolist(),
        density(coverage, attention).tolist(),
        attention_consistency(coverage, attention).tolist(),
        strict=True,
    )
    matched = []
    for record, covered, (match, mean, consistency) in zip(records, coverage, columns, strict=True):
        attended = covered * attention
        key = int(attended.sum((1, 2)).argmax())
        row, col = divmod(int(attended[key].argmax()), cols)
        xy = (col + 0.5) / cols, (row + 0.5) / rows
        frame = fused.clip.key_frames[key]
        decisive = tuple(fused.clip.key_frames[one] for one in decisive_frames(covered, attention))
        matched.append(replace(record, frame=frame, xy=xy, attention=mean, consistency=consistency, match=match, decisive=decisive))
    return tuple(matched)


def _nothing(matched: Tracks, coverage: Tensor, fused: FusedAttention, settings: PickSettings) -> str:
    """Why no object is picked; empty if one is."""
    if not matched.tracks:
        return matched.message or "There is no object to pick from."
    count = len(matched.tracks)
    objects = f"The {count} objects" if count > 1 else "The object"
    if not coverage.any():
        seen = "are" if count > 1 else "is"
        return f"{objects} to pick from {seen} not seen on any of the {len(fused.map)} key frames: the masks are empty there."
    if not fused.map.any():
        return "Nothing is attended in the clip, so no object is picked. Look at the heat map, and word the query in another way."
    best = max(track.match for track in matched.tracks)
    if best <= 0 or best < settings.least:
        none = f"none of the {count} objects matches" if count > 1 else "the object does not match"
        return (
            f"Nothing is picked, as {none} the attention well enough: the best match is {best:.2f}, and {settings.least:g} is the least. Is what "
            "you mean among them? If so, lower 'least_match'."
        )
    return ""


def _picked(matched: Tracks, settings: PickSettings) -> list[int]:
    """Indices, ascending."""
    matches = [track.match for track in matched.tracks]
    order = sorted(range(len(matches)), key=lambda index: (-matches[index], index))
    usable = [index for index in order if matches[index] > 0 and matches[index] >= settings.least]
    one, every, fixed = PICKS
    if settings.pick == every:
        return sorted(index for index in usable if matches[index] >= settings.share * matches[order[0]])
    return sorted(usable[: {one: 1, fixed: settings.number}[settings.pick]])
