"""Masks at the size of the video, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..masks import unpack_bits

_BYTES_AT_ONCE = 64 << 20


def mask_bytes(objects: int, frame_size: tuple[int, int] | None) -> int:
    """Bytes that masks at the size of the video take at a time: enlarged logits, and what is made of them. None for frames of any size."""
    at_once = _BYTES_AT_ONCE if frame_size is None else min(_BYTES_AT_ONCE, 4 * objects * math.prod(frame_size))
    return 2 * at_once


def video_masks(logits: Tensor, frame_size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """(n, 1, h, w) low-resolution logits -> slices of the n objects with their (k, H, W) bool masks, a few objects at a time."""
    height, width = frame_size
    step = max(1, _BYTES_AT_ONCE // (4 * height * width))
    for start in range(0, len(logits), step):
        part = logits[start : start + step]
        if part.shape[-2:] != (height, width):
            part = F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)
        yield slice(start, start + len(part)), part[:, 0] > 0


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of (n, H, bytes) and (m, H, bytes) packed masks -> (n, m) float64; 0 where both are empty. Exact: pixels are
    counted."""
    pixels_per_row = 8 * first.shape[-1]
    rows = max(1, _BYTES_AT_ONCE // (4 * pixels_per_row * max(1, len(first) + len(second))))
    common = torch.zeros(len(first), len(second), dtype=torch.float64)
    area_first, area_second = torch.zeros(len(first), 1, dtype=torch.float64), torch.zeros(1, len(second), dtype=torch.float64)
    for row in range(0, first.shape[1], rows):
        a, b = (unpack_bits(x[:, row : row + rows], pixels_per_row).flatten(1).float() for x in (first, second))
        # Sums of zeros and ones are exact in float32 up to 2^24, more than a block of rows has pixels.
        common += a @ b.T
        area_first += a.sum(1, keepdim=True)
        area_second += b.sum(1)
    return common / (area_first + area_second - common).clamp(min=1)
