"""Points for a segmenter from fused attention, as in the DecAF paper."""

from __future__ import annotations

import torch

from ..data import FusedAttention, SAM2Prompts
from ..errors import DecafError
from ..settings import PointSettings


def attention_points(
    fused: FusedAttention,
    *,
    threshold: float = PointSettings.point_threshold,
    presence_threshold: float = PointSettings.presence_threshold,
) -> SAM2Prompts:
    """Every cell whose fused attention is at least `threshold` (above 0, at most 1), as a point at the cell's centre.

    `presence_threshold`: if the model's presence score is below it, there are no points, and a message says so; 0 always looks for the best
    match.
    No point is a valid answer: nothing was attended, or the object is not there.
    """
    if not 0 <= presence_threshold <= 1:
        raise DecafError(f"The presence threshold is {presence_threshold}; give a value from 0 (always mask the best match) to 1.")
    if not 0 < threshold <= 1:
        raise DecafError(f"The point threshold is {threshold}; give a value above 0 and at most 1.")
    if not fused.map.isfinite().all():
        raise DecafError("The fused attention has values that are not finite numbers; extract the attention again.")
    absence = fused.absence(presence_threshold)
    strong = torch.zeros_like(fused.map, dtype=torch.bool) if absence else fused.map >= threshold
    cells = strong.nonzero()  # ascending: frame, row, column
    values = fused.map[tuple(cells.T)]
    rows, cols = fused.map.shape[-2:]
    xy = torch.stack([(cells[:, 2] + 0.5) / cols, (cells[:, 1] + 0.5) / rows], dim=1)
    return SAM2Prompts(
        key=cells[:, 0].contiguous(), xy=xy.to(torch.float32), value=values, fused=fused,
        message=absence,
    )  # fmt: skip


def best_key_frame(prompts: SAM2Prompts) -> int:
    """Key index of the frame with the most evidence: the largest sum of its points' attention, the earliest if equal.

    Without points: the frame whose map sums highest, hence 0 when nothing was attended.
    """
    if len(prompts.key):
        sums = torch.zeros(len(prompts.fused.map), dtype=torch.float64).index_add_(0, prompts.key, prompts.value.double())
    else:
        sums = prompts.fused.map.double().sum((1, 2))
    return int(sums.argmax())
