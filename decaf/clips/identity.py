"""The short record of a clip that travels with its attention, and whether another clip is the same one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..data import ClipInfo, Tracks
from ..errors import DecafError
from .base import Clip

SIDE = 16
"""Side of a thumbnail in pixels."""

MIN_SIMILARITY = 0.5
"""Mean similarity of the key frames at which a clip counts as the same one. After colour grading, scaling or recompression it is above 0.9."""


def thumbnails(clip: Clip, key_frames: Sequence[int]) -> Tensor:
    """(K, 16, 16, 3) uint8: the key frames, area-averaged."""
    return torch.stack([_thumbnail(clip[index]) for index in key_frames])


def clip_info(clip: Clip, key_frames: Sequence[int], frames: range | None = None) -> ClipInfo:
    """The record of `clip` with these key frames (ascending clip indices), and these frames that are asked about; None for all."""
    part = None if frames is None or len(frames) == len(clip) else (frames.start, frames[-1])
    return ClipInfo(len(clip), tuple(clip.frame_size), tuple(key_frames), thumbnails(clip, key_frames), part)


def check_same_clip(clip: Clip, info: ClipInfo, made: str = "attention was taken", users: str = "the attention and to the segmentation") -> None:
    """Refuses a clip that is evidently not the one that `info` was made from. `made`: what was made of that one; `users`: who has to be given
    the same clip.

    The same clip scaled, recompressed or colour-graded passes. So may another clip that looks the same at 16x16 pixels.

    Raises:
        DecafError: another length, another aspect ratio, or other pictures.
    """
    if len(clip) != info.length:
        raise DecafError(
            f"The {made} from a clip of {info.length} frames, but {clip.name} has {len(clip)}; "
            f"give the same frames to {users}."
        )
    (height, width), (info_height, info_width) = clip.frame_size, info.frame_size
    if not same_shape(clip.frame_size, info.frame_size):
        raise DecafError(
            f"The {made} from frames of {info_width}x{info_height}, but those of {clip.name} are {width}x{height}, which is "
            "another shape; crop or pad the clip before anything is made of it, not after."
        )
    similarity = _similarity(thumbnails(clip, info.key_frames), info.thumbnails)
    if similarity.mean() < MIN_SIMILARITY:
        raise DecafError(
            f"{clip.name} is not the clip that the {made} from: {int((similarity < MIN_SIMILARITY).sum())} of its {len(similarity)} key "
            f"frames show something else; give the same frames to {users}."
        )


def same_shape(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether frames of the one (height, width) may be those of the other, scaled."""
    (height, width), (high, wide) = first, second
    off_by = min(abs(width - height * wide / high), abs(height - width * high / wide))
    return off_by <= 1 or 0.95 <= (width * high) / (height * wide) <= 1 / 0.95  # sides rounded to a multiple of 8 or 16 are not a crop


def check_same_pictures(tracks: Tracks, info: ClipInfo) -> None:
    """Refuses tracks whose clip shows something else than that of `info` on the key frames that both have: on most of them the same at 16x16
    pixels, as in `check_same_clip`. DecafError."""
    if tracks.clip is None:
        return
    common = sorted({*tracks.clip.key_frames} & {*info.key_frames})
    first, second = (each.thumbnails[[each.key_frames.index(frame) for frame in common]] for each in (tracks.clip, info))
    if common and _similarity(first, second).mean() < MIN_SIMILARITY:
        raise DecafError("The tracks were made from another clip than the attention: their pictures differ. Give the same clip to both.")


def check_tracks(clip: Clip, tracks: Tracks) -> None:
    """Refuses a clip that is evidently not the one that the tracks were made from, by `DecafError`."""
    if tracks.clip is not None:
        check_same_clip(clip, tracks.clip, "tracks were made", "both")
    elif len(clip) != tracks.length:
        raise DecafError(f"The tracks have {tracks.length} frames, but {clip.name} has {len(clip)}. Give the clip that they were made from.")


def _thumbnail(frame: Tensor) -> Tensor:
    return adaptive_avg_pool2d(frame.permute(2, 0, 1).float(), SIDE).round_().to(torch.uint8).permute(1, 2, 0)


def _similarity(first: Tensor, second: Tensor) -> Tensor:
    """(K,) in -1..1: correlation of the thumbnails' brightness. Flat frames have no correlation: they match if their mean colours are close."""
    a, b = (thumbnails.float().mean(-1).flatten(1) for thumbnails in (first, second))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    noise = 1.0  # variance, in levels squared, that rounding and compression leave in a flat frame
    correlation = ((a * b).mean(1) + noise) / ((a.square().mean(1) + noise) * (b.square().mean(1) + noise)).sqrt()
    flat = (a.square().mean(1) < 4) & (b.square().mean(1) < 4)
    colours_differ = (first.float().mean((1, 2)) - second.float().mean((1, 2))).abs().amax(1) > 64
    return torch.where(flat & colours_differ, 0.0, correlation)
