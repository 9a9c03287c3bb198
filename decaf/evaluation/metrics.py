"""Region similarity J and contour accuracy F of the DAVIS benchmark (Perazzi et al., CVPR 2016), per frame; their mean is J&F."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import DecafError

BOUND = 0.008
"""Distance within which contours match, as a share of the frame's diagonal."""


def region_similarity(prediction: Tensor, truth: Tensor) -> Tensor:
    """J: intersection over union of masks.

    Args:
        prediction, truth: (T, H, W) bool or 0/1.

    Returns:
        (T,) float64 in 0..1. Two empty masks score 1.

    Raises:
        DecafError: masks of different shapes.
    """
    prediction, truth = _masks(prediction, truth)
    both = (prediction & truth).flatten(1).sum(1).double()
    either = (prediction | truth).flatten(1).sum(1).double()
    return torch.where(either > 0, both / either, 1.0)


def contour_accuracy(prediction: Tensor, truth: Tensor) -> Tensor:
    """F: harmonic mean of precision and recall of the masks' contours, which match within 0.8 % of the frame's diagonal.

    Args:
        prediction, truth: (T, H, W) bool or 0/1.

    Returns:
        (T,) float64 in 0..1. If both masks have no contour they score 1, if only one has none they score 0.

    Raises:
        DecafError: masks of different shapes.
    """
    prediction, truth = _masks(prediction, truth)
    radius = math.ceil(BOUND * math.hypot(*truth.shape[-2:]))
    return torch.tensor([_contour_score(*pair, radius) for pair in zip(prediction, truth, strict=True)], dtype=torch.float64)


def _contour_score(prediction: Tensor, truth: Tensor, radius: int) -> float:
    predicted, true = contour(prediction), contour(truth)
    lengths = int(predicted.sum()), int(true.sum())
    if 0 in lengths:
        return float(lengths == (0, 0))
    precision = int((predicted & dilate(true, radius)).sum()) / lengths[0]
    recall = int((true & dilate(predicted, radius)).sum()) / lengths[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: Tensor) -> Tensor:
    """(H, W) bool: pixels that differ from their right, lower or lower right neighbour. Beyond the border the mask is repeated."""
    padded = pad(mask[None, None].float(), (0, 1, 0, 1), mode="replicate")[0, 0].bool()
    here, right, below, diagonal = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (here ^ right) | (here ^ below) | (here ^ diagonal)


def dilate(mask: Tensor, radius: int) -> Tensor:
    """(H, W) bool: pixels within `radius` (Euclidean, in pixels) of a pixel of `mask`."""
    height, width = mask.shape
    dilated = torch.zeros_like(mask)
    # Row by row of the disk: whether any pixel of a run is set is a difference of cumulative sums.
    counts = pad(mask.to(torch.int32).cumsum(1), (radius + 1, radius))
    counts[:, radius + 1 + width :] = counts[:, radius + width, None]
    for down in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        half = math.isqrt(radius * radius - down * down)
        row = counts[:, radius + 1 + half : radius + 1 + half + width] > counts[:, radius - half : radius - half + width]
        dilated[max(down, 0) : height + min(down, 0)] |= row[max(-down, 0) : height - max(down, 0)]
    return dilated


def _masks(prediction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.shape != truth.shape or prediction.ndim != 3:
        raise DecafError(
            f"The masks to compare have the shapes {tuple(prediction.shape)} and {tuple(truth.shape)}; "
            "both must be the same (frames, height, width)."
        )
    return prediction.bool(), truth.bool()
