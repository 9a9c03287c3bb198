"""The short record of a clip that travels with its attention, and whether another clip is the same one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..data import ClipInfo
from ..errors import DecafError
from .base import Clip

SIDE = 16
SAME = 0.5
"""Mean likeness of the key frames from which on a clip counts as the same one. Colour grading, scaling and recompressing leave over 0.9."""


def thumbnails(clip: Clip, key_frames: Sequence[int]) -> Tensor:
    """(K, 16, 16, 3) uint8: the key frames, area-averaged."""
    return torch.stack([_thumbnail(clip[index]) for index in key_frames])


def clip_info(clip: Clip, key_frames: Sequence[int]) -> ClipInfo:
    """The record of `clip` with these key frames (ascending clip indices)."""
    return ClipInfo(len(clip), tuple(clip.frame_size), tuple(key_frames), thumbnails(clip, key_frames))


def check_same_clip(clip: Clip, info: ClipInfo) -> None:
    """DecafError when `clip` is evidently not the one that `info` was made of: another length, another shape, or other pictures.

    The same clip scaled, recompressed or colour-graded passes; so may a clip that looks the same at 16x16 pixels.
    """
    if len(clip) != info.length:
        raise DecafError(
            f"The attention was taken from a clip of {info.length} frames, but {clip.name} has {len(clip)}; "
            "give the same frames to the attention and to the segmentation."
        )
    (height, width), (was_height, was_width) = clip.frame_size, info.frame_size
    off_by = min(abs(width - height * was_width / was_height), abs(height - width * was_height / was_width))
    ratio = (width * was_height) / (height * was_width)
    if off_by > 1 and not 0.95 <= ratio <= 1 / 0.95:  # sides rounded to a multiple of 8 or 16 are no crop
        raise DecafError(
            f"The attention was taken from frames of {was_width}x{was_height}, but those of {clip.name} are {width}x{height}, which is "
            "another shape; crop or pad the clip before the attention is extracted, not after."
        )
    likeness = _likeness(thumbnails(clip, info.key_frames), info.thumbnails)
    if likeness.mean() < SAME:
        raise DecafError(
            f"{clip.name} is not the clip that the attention was taken from: {int((likeness < SAME).sum())} of its {len(likeness)} key "
            "frames show something else; give the same frames to the attention and to the segmentation."
        )


def _thumbnail(frame: Tensor) -> Tensor:
    return adaptive_avg_pool2d(frame.permute(2, 0, 1).float(), SIDE).round_().to(torch.uint8).permute(1, 2, 0)


def _likeness(ours: Tensor, theirs: Tensor) -> Tensor:
    """(K,) in -1..1: correlation of the thumbnails' brightness. Even pictures, which have none, are alike unless far apart in colour."""
    a, b = (one.float().mean(-1).flatten(1) for one in (ours, theirs))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    noise = 1.0  # levels squared: what rounding and compression leave in an even picture
    correlation = ((a * b).mean(1) + noise) / ((a.square().mean(1) + noise) * (b.square().mean(1) + noise)).sqrt()
    even = (a.square().mean(1) < 4) & (b.square().mean(1) < 4)
    colours_apart = (ours.float().mean((1, 2)) - theirs.float().mean((1, 2))).abs().amax(1) > 64
    return torch.where(even & colours_apart, 0.0, correlation)
