"""What `result.json` says of masks and of what they were made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from ..clips import Clip
from ..data import Attention, Tracks
from .files import object_masks


def described(clip: Clip, attention: tuple[Attention, Attention], tracks: Tracks | None, filled: int, message: str) -> dict:
    """The part of `result.json` that is the same however the masks were computed. `tracks`: None without the tracking stage. `filled`: in how many
    frames something is masked."""
    height, width = clip.frame_size
    fps = float(clip.fps) if clip.fps else None
    return {
        "query": str(attention[0].query),
        "name": attention[0].name,
        "message": message,
        "presence": attention[0].presence,
        "clip": {"name": clip.name, "frames": len(clip), "width": width, "height": height, "fps": fps},
        "key_frames": list(attention[0].clip.key_frames),
        "frames_with_mask": filled,
        "tracks": track_records(tracks) if tracks is not None else [],
        "questions": _questions(attention),
        "answers": list(attention[0].answers),
    }


def _questions(attention: Sequence[Attention]) -> dict[str, str]:
    asked = {one.kind: one.question for one in attention}
    return asked | ({"not_this": attention[0].not_this.question} if attention[0].not_this else {})


def track_records(tracks: Tracks) -> list[dict]:
    """Scores and size of each object, for `result.json`. `area`: mean share of the frame that it covers, 0..1."""
    height, width = tracks.frame_size
    records = []
    for index, track in enumerate(tracks.tracks):
        pixels = frames = 0
        for mask in object_masks(tracks, index):
            count = int(np.count_nonzero(mask.numpy() >= 128))
            pixels += count
            frames += count > 0
        area = pixels / (height * width * tracks.length)
        records.append({**asdict(track), "score": track.score, "frames": frames, "area": area})
    return records
