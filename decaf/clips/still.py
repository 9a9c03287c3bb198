"""Frames of a clip as pictures: one of them, or all in the order in which a tracker is to see them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DecafError

FRAME_ORDERS = {
    "one frame": "the frame alone",
    "all frames": "the clip from its first to its last frame",
    "back, then all": "from the frame back to the first, then the whole clip: for a tracker that is given the object's mask on its first image",
}
"""Which frames, and in what order."""


def frame_order(length: int, which: str, frame: int = 0) -> tuple[list[int], int]:
    """Clip indices in the order `which` of FRAME_ORDERS, and how many of them come before the clip's first frame. DecafError: there is no such
    frame or order."""
    if which not in FRAME_ORDERS:
        raise DecafError(f"There is no order '{which}' of frames. Choose one of {', '.join(FRAME_ORDERS)}.")
    one, whole, _ = FRAME_ORDERS
    if which == whole:
        return list(range(length)), 0
    if not 0 <= frame < length:
        raise DecafError(f"There is no frame {frame}: the clip has frames 0 to {length - 1}.")
    if which == one:
        return [frame], 0
    return [*range(frame, 0, -1), *range(length)], frame


def scaled(picture: Tensor, longest_side: int = 0) -> Tensor:
    """(H, W, 3) uint8, made smaller until no side is longer, in its own shape; as it is if it is small enough, or for 0."""
    height, width = picture.shape[:2]
    if not longest_side or max(height, width) <= longest_side:
        return picture
    size = tuple(max(1, round(side * longest_side / max(height, width))) for side in (width, height))
    return torch.from_numpy(np.array(Image.fromarray(picture.numpy()).resize(size, Image.Resampling.BICUBIC)))
