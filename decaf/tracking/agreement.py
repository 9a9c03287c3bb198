"""Which tracklets are kept by our own rule: attention where an object is, not over the whole clip, and as many objects as the query means.

The published consistency (`decaf.tracking.selection`) is a sum over the clip. What is seen briefly cannot win it, and a large object pays for each
of its cells that is not attended.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .wanted import Wanted

_SHOWN = 0.5
"""Cells that a tracklet covers on a frame that shows it; half of its largest area, if it never covers a cell."""

_INSIDE = 0.7
"""Share of the smaller of two tracklets that lies in the other, from which both are one object."""

_PART = 0.9
"""Share of the worth of an object's best tracklet, from which its other tracklets are kept."""

_POWER = 5
"""Of the score threshold, for the share of the best object's worth that others must have: a third at the usual 0.8, all of it at 1."""

_CLOSE = 0.7
"""Share of the best object's worth, from which the next object is named as a rival. On made-up scenes, the best is right in 95 of 100 cases where
there is no rival, and in 59 where there is one."""


def visible_consistency(coverage: Tensor, attention: Tensor) -> Tensor:
    """How strongly tracklets are attended to where they are: attention per covered cell, averaged over the key frames that show them.

    `coverage`: (n, K, rows, cols) in 0..1; `attention`: (K, rows, cols) in 0..1. To what is covered, one cell without attention is added, and
    to the frames a quarter of one: a sliver on the strongest cell, or a mask that is lost after a frame, does not win. Divided by the largest.
    Returns (n,) in 0..1.
    """
    area = coverage.sum((2, 3))
    shown = (area > 0) & (area >= (area.amax(1, keepdim=True) / 2).clamp(max=_SHOWN))
    per_frame = (coverage * attention).sum((2, 3)) / (area + 1)
    consistency = (per_frame * shown).sum(1) / (shown.sum(1) + 0.25)
    best = consistency.amax()
    return consistency / best if best > 0 else consistency


def decisive_frames(coverage: Tensor, attention: Tensor) -> list[int]:
    """Key indices, ascending, of the fewest key frames that together hold half of the attention to an object; none if it has none.

    `coverage`: (K, rows, cols) of the object in 0..1; `attention`: (K, rows, cols) in 0..1.
    """
    per_frame = (coverage * attention).sum((1, 2))
    if not per_frame.any():
        return []
    strongest = per_frame.argsort(descending=True, stable=True)
    enough = int((per_frame[strongest].cumsum(0) < per_frame.sum() / 2).sum()) + 1
    return sorted(strongest[:enough].tolist())


def objects(coverage: Tensor, worth: Tensor) -> list[list[int]]:
    """Tracklets by object: the best object first, and in each its best tracklet first.

    `coverage`: (n, K, rows, cols); `worth`: (n,). A tracklet is the same object as a better one if, on the frames that show both, one lies in
    the other.
    """
    found: list[list[int]] = []
    for i in worth.argsort(descending=True, stable=True).tolist():
        same = next((each for each in found if _one_object(coverage[i], coverage[each[0]])), None)
        if same is None:
            found.append([i])
        else:
            same.append(i)
    return found


def select_by_agreement(coverage: Tensor, worth: Tensor, wanted: Wanted, threshold: float) -> tuple[list[int], float]:
    """The tracklets to keep.

    Args:
        coverage: (n, K, rows, cols) in 0..1, n at least 1.
        worth: (n,), at least 0.
        wanted: how many objects.
        threshold: 0..1, from all to only the best. Objects beside the best are kept if they have its fifth power of the best one's worth, or
            if `wanted` says exactly how many there are.

    Returns their indices, ascending, and the share of the best object's worth, 0..1, that the best object that is left out has.
    """
    by_object = objects(coverage, worth)
    best = worth[by_object[0][0]]
    shares = [float(worth[each[0]] / best) if best > 0 else 1.0 for each in by_object]
    least = 0.0 if wanted.exact else min(max(threshold, 0.0), 1.0) ** _POWER
    count = max(1, sum(share >= least for share in shares))
    if wanted.most is not None:
        count = min(count, wanted.most)
    kept = [i for first, *others in by_object[:count] for i in (first, *(i for i in others if worth[i] >= _PART * worth[first]))]
    return sorted(kept), shares[count] if count < len(shares) else 0.0


def rival_message(share: float, wanted: Wanted) -> str:
    """What to tell where an object that was left out fits nearly as well as the best one; else empty."""
    if wanted.most is None or share < _CLOSE:
        return ""
    what = "the best one is" if wanted.most == 1 else f"the best {wanted.most} are"
    return f'Another object fits nearly as well ({share:.0%} of the attention of the best); {what} kept. Set the targets to "all" to keep it, too.'


def _one_object(first: Tensor, second: Tensor) -> bool:
    """Whether tracklets with these coverages (K, rows, cols) are one object."""
    areas = first.sum((1, 2)), second.sum((1, 2))
    both = (areas[0] > 0) & (areas[1] > 0)
    if not both.any():
        return False
    common = torch.minimum(first, second)[both].sum()
    return bool(common >= _INSIDE * torch.minimum(areas[0][both].sum(), areas[1][both].sum()))
