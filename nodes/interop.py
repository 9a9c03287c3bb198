"""Points, boxes and numbers of objects as ComfyUI's nodes and other packs take them. Nothing of ComfyUI is imported: these are only texts and
numbers.

Points: a STRING of JSON, `[{"x": 12, "y": 34}, ...]` in whole pixels, as KJNodes' Points Editor gives it, and kijai's SAM 2 pack and core's
SAM3_Detect take it. Boxes: BOUNDING_BOX of core, `{"x", "y", "width", "height"}` in whole pixels, here a list of them for every frame.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ..decaf.attention.fusion import coarse_masks
from ..decaf.data import FusedAttention, SAM2Prompts, Tracks
from ..decaf.errors import DecafError, shown


def points_json(prompts: SAM2Prompts, key: int) -> str:
    """The points of key frame `key` (a key index) as `[{"x": 12, "y": 34}, ...]` in whole pixels of the clip's frames; "[]" if none."""
    height, width = prompts.fused.clip.frame_size
    xy = prompts.xy[prompts.key == key].double() * torch.tensor([width, height])
    return json.dumps([{"x": int(x), "y": int(y)} for x, y in xy.tolist()])


def points_of(text: str, name: str, frame_size: tuple[int, int]) -> list[tuple[float, float]]:
    """Points of JSON such as a points editor gives it, (x, y) as parts of the frame's width and height; none of an empty text. `name`: of the
    input. DecafError: it is something else."""
    if not text.strip():
        return []
    height, width = frame_size
    try:
        return [(float(point["x"]) / width, float(point["y"]) / height) for point in json.loads(text)]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise DecafError(
            f"'{name}' holds {brief(text)}, which are no points. Connect a points editor, or write points in pixels of the frame, for example "
            '[{"x": 120, "y": 80}].'
        ) from None


def objects_of(tracks: Tracks, text: str) -> list[int] | None:
    """Indices of the objects whose numbers `text` lists, each once; None for an empty text, which means all. DecafError: there is no such
    object, or it is no number."""
    words = text.replace(",", " ").split()
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        raise DecafError(
            f"'objects' holds '{shown(wrong[0], 40)}', which is not a number. Write numbers of objects, for example 0 or 0, 2; or nothing for all."
        )
    places = {track.id: place for place, track in enumerate(tracks.tracks)}
    missing = [int(word) for word in words if int(word) not in places]
    if missing and places:
        raise DecafError(
            f"There is no object {missing[0]}; the tracks hold {', '.join(map(str, places))}. Change 'objects', or empty it for all."
        )
    return list(dict.fromkeys(places[int(word)] for word in words if int(word) in places)) if words else None


def box_of(box: object, frame_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) as parts of the frame's width and height, of a BOUNDING_BOX: one, or a list that holds just one.
    DecafError: it is something else."""
    height, width = frame_size
    one = box
    while isinstance(one, list | tuple) and len(one) == 1:
        one = one[0]
    try:
        left, top, wide, high = (float(one[key]) for key in ("x", "y", "width", "height"))
    except (ValueError, TypeError, KeyError, OverflowError):
        raise DecafError(
            f"'box' holds {brief(box)}; give one box with x, y, width and height in pixels of the frame."
        ) from None
    return left / width, top / height, (left + wide) / width, (top + high) / height


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


def brief(value: object) -> str:
    """A value of JSON as it is written in Python, cut, and without letters that a log could not hold."""
    text = repr(value) if not isinstance(value, str) or value.isprintable() else ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}... ({len(text):,} characters)"
