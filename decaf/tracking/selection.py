"""Which tracklets are kept: attention consistency and the final score, as in the DecAF paper."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def grid_coverage(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """(n, H, W) bool -> (n, rows, cols) float32: the part of every cell that the mask covers."""
    return F.adaptive_avg_pool2d(masks.float(), grid)


def attention_consistency(coverage: Tensor, attention: Tensor) -> Tensor:
    """How well tracklets cover what was attended to, over all key frames.

    `coverage`: (n, K, rows, cols) in 0..1; `attention`: (K, rows, cols) in 0..1. On each frame the cells above the frame's mean count with
    their value, all others cost the frame's maximum; the sum is divided by that of the counted values. Positive results are divided by the
    largest one. Returns (n,).
    """
    counted = attention > attention.mean((1, 2), keepdim=True)
    worth = torch.where(counted, attention, -attention.amax((1, 2), keepdim=True))
    total = attention[counted].sum()
    if total == 0:  # the map is the same everywhere and says nothing about any tracklet
        return coverage.new_zeros(len(coverage))
    consistency = (coverage * worth).sum((1, 2, 3)) / total
    return torch.where(consistency > 0, consistency / consistency.amax(), consistency)


def not_meant(coverage: Tensor, attention: Tensor, not_this: Tensor) -> Tensor:
    """Which tracklets cover more of what is attended for *not this* than for the query, over all key frames: (n,) bool. Not in the paper.

    `coverage`: (n, K, rows, cols); `attention` and `not_this`: (K, rows, cols); all in 0..1.
    """
    return (coverage * (not_this - attention)).sum((1, 2, 3)) > 0


def final_scores(scores: Tensor, consistency: Tensor) -> Tensor:
    """`scores`: (n,) predicted IoU + attention. The mean of the three."""
    return (scores + consistency) / 3


def select(final: Tensor, threshold: float) -> list[int]:
    """Indices of the tracklets whose `final` score, (n,), is above `threshold`; if there are none, the best one's."""
    above = (final > threshold).nonzero()[:, 0].tolist()
    return above or [int(final.argmax())]
