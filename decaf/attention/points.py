"""Points for SAM 2 from fused attention, as in the DecAF paper, and the same evidence in the forms that other segmenters take."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ..data import FusedAttention, SAM2Prompts
from ..errors import DecafError
from ..settings import PointSettings
from .fusion import coarse_masks


def attention_points(
    fused: FusedAttention,
    *,
    threshold: float = PointSettings.point_threshold,
    presence_threshold: float = PointSettings.presence_threshold,
    max_points: int | None = None,
) -> SAM2Prompts:
    """Every cell whose fused attention is at least `threshold` (above 0, at most 1), as a point at the cell's centre.

    `presence_threshold`: if the model's presence score is below it, there are no points, and a message says so; 0 always looks for the best
    match. `max_points`: keep only that many of the strongest, since each point is one more mask to predict.
    No point is a valid answer: nothing was attended, or the object is not there.
    """
    if not 0 <= presence_threshold <= 1:
        raise DecafError(f"The presence threshold is {presence_threshold}; give a value from 0 (always mask the best match) to 1.")
    if not 0 < threshold <= 1:
        raise DecafError(f"The point threshold is {threshold}; give a value above 0 and at most 1.")
    if max_points is not None and max_points < 1:
        raise DecafError(f"max_points is {max_points}; give 1 or more, or leave it out.")
    if not fused.map.isfinite().all():
        raise DecafError("The fused attention has values that are not finite numbers; extract the attention again.")
    absent = fused.presence is not None and fused.presence < presence_threshold
    strong = torch.zeros_like(fused.map, dtype=torch.bool) if absent else fused.map >= threshold
    cells = strong.nonzero()  # ascending: frame, row, column
    values = fused.map[tuple(cells.T)]
    if max_points is not None and len(cells) > max_points:
        keep = values.argsort(descending=True, stable=True)[:max_points].sort().values
        cells, values = cells[keep], values[keep]
    rows, cols = fused.map.shape[-2:]
    xy = torch.stack([(cells[:, 2] + 0.5) / cols, (cells[:, 1] + 0.5) / rows], dim=1)
    return SAM2Prompts(
        key=cells[:, 0].contiguous(), xy=xy.to(torch.float32), value=values, fused=fused,
        message=_not_there(fused, presence_threshold) if absent else "",
    )  # fmt: skip


def _not_there(fused: FusedAttention, threshold: float) -> str:
    return (
        f'The model does not see "{fused.query.rstrip(".")}" in the clip: its presence score is {fused.presence:.2f}, and below '
        f"{threshold:g} nothing is masked. Set the presence threshold to 0 to mask the best match all the same."
    )


def best_key_frame(prompts: SAM2Prompts) -> int:
    """Key index of the frame with the most evidence: the largest sum of its points' attention, the earliest if equal.

    Without points: the frame whose map sums highest, hence 0 when nothing was attended.
    """
    if len(prompts.key):
        sums = torch.zeros(len(prompts.fused.map), dtype=torch.float64).index_add_(0, prompts.key, prompts.value.double())
    else:
        sums = prompts.fused.map.double().sum((1, 2))
    return int(sums.argmax())


def points_json(prompts: SAM2Prompts, key: int) -> str:
    """The points of key frame `key` (a key index) as `[{"x": 12, "y": 34}, ...]` in whole pixels of the clip's frames; "[]" if none."""
    height, width = prompts.fused.clip.frame_size
    xy = prompts.xy[prompts.key == key].double() * torch.tensor([width, height])
    return json.dumps([{"x": int(x), "y": int(y)} for x, y in xy.tolist()])


def attention_boxes(prompts: SAM2Prompts) -> list[list[dict[str, int]]]:
    """One list per key frame with one box `{"x", "y", "width", "height"}` in pixels of the clip's frames, or with none.

    The box holds those connected parts of the frame's coarse mask in which a point lies: weak attention elsewhere does not widen it.
    A frame without points has no box: an empty list, which ComfyUI's detection nodes take as "nothing here". (The coarse mask of such a
    frame is only its relatively brightest part.)
    """
    height, width = prompts.fused.clip.frame_size
    rows, cols = prompts.fused.map.shape[-2:]
    boxes: list[list[dict[str, int]]] = [[] for _ in prompts.fused.map]
    for key in prompts.key.unique().tolist():
        mask = coarse_masks(_only(prompts.fused, key))[0]
        xy = prompts.xy[prompts.key == key].double() * torch.tensor([width, height])
        seeds = torch.zeros_like(mask)
        # The whole cell is a seed: on frames smaller than the grid, or at a thin peak, its centre pixel may lie outside the mask.
        half_x, half_y = width / cols / 2, height / rows / 2
        for x, y in xy.tolist():
            left, top = int(x - half_x), int(y - half_y)
            seeds[max(top, 0) : max(int(y + half_y), top + 1), max(left, 0) : max(int(x + half_x), left + 1)] = True
        part = connected_to(mask, seeds)
        if not part.any():
            part = seeds
        ys, xs = part.any(1).nonzero().flatten(), part.any(0).nonzero().flatten()
        boxes[key].append({"x": int(xs[0]), "y": int(ys[0]), "width": int(xs[-1] - xs[0]) + 1, "height": int(ys[-1] - ys[0]) + 1})
    return boxes


def connected_to(mask: Tensor, seeds: Tensor) -> Tensor:
    """(H, W) bool: the parts of `mask`, connected over edges and corners, that hold a pixel of `seeds`."""
    # Runs of a row are joined with the runs they touch in the row above; far fewer runs than pixels.
    padded = torch.nn.functional.pad(mask.to(torch.int8), (1, 1))
    change = padded.diff(dim=1)
    starts, ends = (change == 1).nonzero().tolist(), (change == -1).nonzero()[:, 1].tolist()
    parent = list(range(len(starts)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above = below = 0  # two pointers: runs of the row above and of this row, both from left to right
    while below < len(starts):
        (row, start), end = starts[below], ends[below]
        while above < below and (starts[above][0] < row - 1 or (starts[above][0] == row - 1 and ends[above] < start)):
            above += 1
        touching = above
        while touching < below and starts[touching][0] == row - 1 and starts[touching][1] <= end:
            parent[root(below)] = root(touching)
            touching += 1
        below += 1

    hit = {root(run) for run, ((row, start), end) in enumerate(zip(starts, ends, strict=True)) if seeds[row, start:end].any()}
    kept = torch.zeros_like(mask)
    for run, ((row, start), end) in enumerate(zip(starts, ends, strict=True)):
        if root(run) in hit:
            kept[row, start:end] = True
    return kept


def _only(fused: FusedAttention, key: int) -> FusedAttention:
    return FusedAttention(map=fused.map[key : key + 1], clip=fused.clip, query=fused.query)
