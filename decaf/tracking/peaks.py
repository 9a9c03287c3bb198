"""More points than the published ones: where the attention of a frame peaks, though another frame or object is attended more."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import SAM2Prompts

ONE_OBJECT, SEVERAL_OBJECTS = 0.8, 0.3
"""Share of its frame's maximum, from which a peak becomes a candidate. One object: for what is seen briefly. Several: the others are often attended
far less than the first."""

_LOWEST = 0.3
"""Largest value of a frame's map, 0..1, from which on its peaks count: below, the frame does not show what is asked for."""


def with_peaks(prompts: SAM2Prompts, *, several: bool) -> SAM2Prompts:
    """The same prompts with the peaks of each frame's fused map as further points, in the order of frames, rows and columns.

    `several`: more than one object may be meant, and weaker peaks count as well. Prompts without points stay so: nothing is looked for.
    """
    if not len(prompts.key):
        return prompts
    fused = prompts.fused.map
    rows, cols = fused.shape[1:]
    wanted = peaks(fused, SEVERAL_OBJECTS if several else ONE_OBJECT)
    row, col = _cells(prompts.xy, rows, cols)
    wanted[prompts.key, row, col] = False  # points already
    cells = wanted.nonzero()
    xy = torch.stack([(cells[:, 2] + 0.5) / cols, (cells[:, 1] + 0.5) / rows], dim=1).to(prompts.xy.dtype)
    key, xy = torch.cat([prompts.key, cells[:, 0]]), torch.cat([prompts.xy, xy])
    value = torch.cat([prompts.value, fused[tuple(cells.T)]])
    row, col = _cells(xy, rows, cols)
    order = ((key * rows + row) * cols + col).argsort(stable=True)
    return replace(prompts, key=key[order], xy=xy[order], value=value[order])


def peaks(maps: Tensor, share: float) -> Tensor:
    """(K, rows, cols) bool: where maps of that shape, 0..1, peak: cells without a larger one among their eight neighbours, and of at least
    `share` (0..1) of their frame's maximum."""
    largest = maps.amax((1, 2), keepdim=True)
    around = F.max_pool2d(maps[:, None], 3, stride=1, padding=1)[:, 0]
    return (maps >= around) & (maps >= share * largest) & (largest >= _LOWEST)


def _cells(xy: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Row and column of the cell in which each point (n, 2) in 0..1 lies."""
    return (xy[:, 1] * rows).long().clamp(max=rows - 1), (xy[:, 0] * cols).long().clamp(max=cols - 1)
