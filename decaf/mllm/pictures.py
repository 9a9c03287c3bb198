"""How frames become what a vision tower takes: the grid they are cut into, resizing, normalising."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def fit_grid(height: int, width: int, cell: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """(rows, cols) of square cells of `cell` pixels for a picture of height x width pixels: nearest to its own size and shape, with at least
    `min_tokens` (so that small pictures are enlarged) and at most `max_tokens` cells. Every shape is served, however long and thin."""
    rows, cols = max(1, round(height / cell)), max(1, round(width / cell))
    if rows * cols < min_tokens:
        grow = (min_tokens * cell * cell / (height * width)) ** 0.5
        rows, cols = max(1, math.ceil(height * grow / cell)), max(1, math.ceil(width * grow / cell))
    if rows * cols > max_tokens:
        shrink = (height * width / (max_tokens * cell * cell)) ** 0.5
        rows, cols = max(1, math.floor(height / shrink / cell)), max(1, math.floor(width / shrink / cell))
    cols = min(cols, max_tokens)
    return min(rows, max_tokens // cols), cols


def resize(frame: Tensor, height: int, width: int) -> Image.Image:
    """(H, W, 3) uint8 -> PIL image of the given size, bicubic with antialiasing."""
    return Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def normalised(pictures: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures of one size as (n, 3, H, W) float32, colours 0..1 less `mean`, by `std`."""
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    # Folded into one step, as the published processors do it.
    low, span = (255 * torch.tensor(numbers)[:, None, None] for numbers in (mean, std))
    return stacked.permute(0, 3, 1, 2).float().sub_(low).div_(span)
