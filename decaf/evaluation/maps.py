"""Where the attention points, and what coarse masks its parts give: how the steps of the fusion are compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..attention.fusion import coarse_masks, frame_fusion, object_background_fusion
from ..data import Attention, FusedAttention
from ..settings import METHODS
from .metrics import region_similarity

MAPS = ("raw", "raw_fused", "contrast", "frame_only", "fused")
"""Maps whose coarse masks are compared, all with the same smoothing. raw: object attention of the video; raw_fused: that averaged with the frames';
contrast: object minus background attention of the video; frame_only: the same of the frames; fused: the method's map of both."""

POINTED = 0.25
"""A map points at the target if the target covers at least this share of the map's strongest cell."""


def compare_maps(attention: tuple[Attention, Attention], keys: Sequence[int], frames: Sequence[int], truth: Tensor) -> dict | None:
    """{"pointing": see `pointing`, "coarse_j": {name of a map: J of its coarse masks}}, over the key frames that have a true mask.

    Args:
        attention: of object and background.
        keys: clip indices of the key frames.
        frames: clip indices of the true masks (n, H, W) bool.

    Returns None for an object that is nowhere, or no such frame.
    """
    place = {frame: index for index, frame in enumerate(frames)}
    both = [(index, place[key]) for index, key in enumerate(keys) if key in place]
    if not both or not truth.any():
        return None
    ours, theirs = map(list, zip(*both, strict=True))
    maps = _maps(attention[0], object_background_fusion(*attention))
    coarse = {name: float(region_similarity(coarse_masks(fused)[ours], truth[theirs]).mean()) for name, fused in maps.items()}
    pointed = pointing(maps["fused"].map[ours], truth[theirs])
    return {"pointing": pointed if pointed == pointed else None, "coarse_j": coarse}


def _maps(object: Attention, contrast: Attention) -> dict[str, FusedAttention]:
    return {
        "raw": frame_fusion(object, video_weight=1),
        "raw_fused": frame_fusion(object),
        "contrast": frame_fusion(contrast, video_weight=1),
        "frame_only": frame_fusion(contrast, video_weight=0, method=METHODS[1]),
        "fused": frame_fusion(contrast),
    }


def pointing(maps: Tensor, truth: Tensor) -> float:
    """Share of the frames that show the target in which the strongest cell lies on it; NaN if none shows it.

    Args:
        maps: (K, rows, cols).
        truth: (K, H, W) bool.
    """
    (rows, cols), (height, width) = maps.shape[-2:], truth.shape[-2:]
    hits = []
    for frame_map, mask in zip(maps, truth, strict=True):
        if not mask.any():
            continue
        row, col = divmod(int(frame_map.argmax()), cols)
        cell = mask[row * height // rows : (row + 1) * height // rows, col * width // cols : (col + 1) * width // cols]
        hits.append(float(cell.float().mean() >= POINTED and frame_map.max() > 0))
    return float(np.mean(hits)) if hits else float("nan")
