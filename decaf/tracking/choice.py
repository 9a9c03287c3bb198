"""Which tracklets become tracks, by the published rule or by ours, and what is said of them."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..data import SAM2Prompts, Track
from ..settings import TrackingSettings
from .agreement import decisive_frames, rival_message, select_by_agreement, visible_consistency
from .memo import Tracklet
from .selection import attention_consistency, final_scores, select
from .wanted import Wanted

log = logging.getLogger(__name__)

Choice = tuple[list[int], list[Track], str]
"""Indices of the kept tracklets, ascending, their records, and what is to be said of them."""


def choose(tracklets: list[Tracklet], prompts: SAM2Prompts, settings: TrackingSettings, wants: Wanted) -> Choice:
    """What `settings` choose of the tracklets, at least one. `wants`: how many objects the query means."""
    if settings.as_published:
        return _as_published(tracklets, prompts, settings)
    return _by_agreement(tracklets, prompts, settings, wants)


def _as_published(tracklets: list[Tracklet], prompts: SAM2Prompts, settings: TrackingSettings) -> Choice:
    """Every tracklet whose final score is above the threshold, else the best one."""
    threshold = settings.score_threshold
    consistency = attention_consistency(torch.stack([t.coverage for t in tracklets]), prompts.fused.map)
    scores = torch.tensor([t.candidate.score for t in tracklets])
    final = final_scores(scores, consistency) if settings.consistency else scores / 2
    chosen = _best(select(final, threshold), final, settings.max_tracks)
    tracks = _records(tracklets, prompts, consistency, chosen)
    message = ""
    best = final[chosen[0]]
    if best <= threshold:  # the best one stands in where none passes
        message = f"Nothing scored above {threshold:g}; the best guess, with a score of {float(best):.2f}, is kept."
    return chosen, tracks, message


def _by_agreement(tracklets: list[Tracklet], prompts: SAM2Prompts, settings: TrackingSettings, wants: Wanted) -> Choice:
    """The objects that are attended to most where they are, as many as the query means."""
    coverage = torch.stack([t.coverage for t in tracklets])
    consistency = visible_consistency(coverage, prompts.fused.map)
    attended = consistency if settings.consistency else torch.tensor([t.candidate.attention for t in tracklets])
    worth = attended * torch.tensor([t.candidate.predicted_iou for t in tracklets]).clamp(min=0)
    chosen, rival = select_by_agreement(coverage, worth, wants, settings.score_threshold)
    chosen = _best(chosen, worth, settings.max_tracks)
    return chosen, _records(tracklets, prompts, consistency, chosen), rival_message(rival, wants)


def _best(chosen: list[int], worth: Tensor, most: int | None) -> list[int]:
    """At most so many of the chosen tracklets, those of the highest worth, in their order."""
    if most is None or len(chosen) <= most:
        return chosen
    log.info("%d tracks are chosen, the best %d are kept", len(chosen), most)
    return sorted(sorted(chosen, key=lambda i: -float(worth[i]))[:most])


def _records(tracklets: list[Tracklet], prompts: SAM2Prompts, consistency: Tensor, chosen: list[int]) -> list[Track]:
    keys, attention = prompts.fused.clip.key_frames, prompts.fused.map
    tracks = []
    for number, i in enumerate(chosen):
        candidate = tracklets[i].candidate
        x, y = prompts.xy[candidate.point].tolist()
        decisive = tuple(keys[key] for key in decisive_frames(tracklets[i].coverage, attention))
        tracks.append(
            Track(number, keys[candidate.key], (x, y), candidate.predicted_iou, candidate.attention, float(consistency[i]), decisive=decisive)
        )
    return tracks
