"""How well the method does on unseen scenes: where attention points, what its coarse masks and the final masks are worth, kind by kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..attention.extract import extract_attentions
from ..attention.fusion import coarse_masks, frame_fusion, object_background_fusion
from ..clips import Clip, clip_from_images
from ..data import Attention, FusedAttention
from ..demo.asking import KINDS, Query
from ..demo.scenes import Scene, make_scene
from ..mllm import MLLM
from ..pipeline import segment_attention
from ..report import Progress, silent
from ..sam2 import SAM2
from ..settings import MODES
from .metrics import contour_accuracy, region_similarity

MAPS = ("raw", "raw_fused", "contrast", "frame_only", "fused")
"""Maps whose coarse masks are compared, all smoothed alike. raw: object attention of the video; raw_fused: the same averaged with
the frames'; contrast: object less background attention of the video; frame_only: that of the frames; fused: the method's map of both."""

POINTED = 0.25
"""A map points at the target where the target covers at least this share of its strongest cell."""

_RESAMPLED = 2000


@dataclass
class Row:
    """One query in one setting, figures 0..1. `presence` as in `Attention`; `coarse`: J by the names of MAPS; `j`, `f`, `empty`: of SAM 2's
    masks, None without SAM 2."""

    setting: str
    kind: str
    query: str
    seed: int
    presence: float | None
    pointing: float = float("nan")
    coarse: dict[str, float] = field(default_factory=dict)
    j: float | None = None
    f: float | None = None
    empty: bool | None = None


def evaluate(
    mllm: MLLM,
    sam2: SAM2 | None,
    scenes: int,
    seed: int,
    *,
    settings: tuple[str, ...] = MODES,
    length: int = 8,
    progress: Progress = silent,
) -> dict:
    """Asks `scenes` scenes (seeds `seed`, `seed` + 1, ...) three queries each: noun or colour in turn, another kind, and an absent object.

    Args:
        sam2: None leaves out what needs it.
        length: frames of a scene, all of them key frames.

    Returns {"summary": flat figures of the first setting, "settings": {setting: {kind: figures}}, "steps": differences of coarse J with
    their 95 % bootstrap intervals, "queries": one record a query}.
    """
    rows = []
    for number in range(scenes):
        progress(number, scenes, "Evaluating")
        scene = make_scene(seed + number, length=length)
        clip, queries = clip_from_images(torch.from_numpy(scene.frames)), list(_chosen(scene, seed + number))
        for setting in settings:
            found = extract_attentions(mllm, clip, [query.text for query in queries], setting=setting)
            rows += [_measure(sam2, clip, scene, *one, setting, seed + number) for one in zip(queries, found, strict=True)]
    progress(scenes, scenes, "Evaluating")
    tables = {setting: _table([row for row in rows if row.setting == setting]) for setting in settings}
    first = [row for row in rows if row.setting == settings[0]]
    return {"summary": _summary(first), "steps": _steps(first), "settings": tables, "queries": [vars(row) for row in rows]}


def _chosen(scene: Scene, seed: int) -> Iterator[Query]:
    rng = np.random.default_rng(seed)
    by_kind = {kind: [query for query in scene.queries if query.kind == kind] for kind in KINDS}
    others = [kind for kind in KINDS if kind not in ("noun", "colour", "absent") and by_kind[kind]]
    kinds = ["noun" if seed % 2 else "colour", *([str(rng.choice(others))] if others else []), "absent"]
    for kind in kinds:
        if by_kind[kind]:
            yield by_kind[kind][rng.integers(len(by_kind[kind]))]


def _measure(
    sam2: SAM2 | None, clip: Clip, scene: Scene, query: Query, attention: tuple[Attention, Attention], setting: str, seed: int
) -> Row:
    row = Row(setting, query.kind, query.text, seed, attention[0].presence)
    contrast = object_background_fusion(*attention)
    maps = _maps(attention[0], contrast)
    keys = list(attention[0].clip.key_frames)
    truth = torch.from_numpy(scene.truth(query))
    if query.targets:
        row.pointing = pointing(maps["fused"].map, truth[keys])
        row.coarse = {name: float(region_similarity(coarse_masks(one), truth[keys]).mean()) for name, one in maps.items()}
    if sam2 is not None:
        tracks = segment_attention(sam2, clip, attention).tracks
        mask = tracks.union()
        row.j, row.f = float(region_similarity(mask, truth).mean()), float(contour_accuracy(mask, truth).mean())
        row.empty = not bool(mask.any())
    return row


def _maps(object: Attention, contrast: Attention) -> dict[str, FusedAttention]:
    return {
        "raw": frame_fusion(object, video_weight=1),
        "raw_fused": frame_fusion(object),
        "contrast": frame_fusion(contrast, video_weight=1),
        "frame_only": frame_fusion(contrast, video_weight=0),
        "fused": frame_fusion(contrast),
    }


def pointing(maps: Tensor, truth: Tensor) -> float:
    """Share of frames whose strongest cell lies on the target, of the frames that show it: maps (K, rows, cols), truth (K, H, W) bool."""
    (rows, cols), (height, width) = maps.shape[-2:], truth.shape[-2:]
    hits = []
    for one, mask in zip(maps, truth, strict=True):
        if not mask.any():
            continue
        row, col = divmod(int(one.argmax()), cols)
        cell = mask[row * height // rows : (row + 1) * height // rows, col * width // cols : (col + 1) * width // cols]
        hits.append(float(cell.float().mean() >= POINTED and one.max() > 0))
    return float(np.mean(hits)) if hits else float("nan")


def _mean(values) -> float | None:
    known = [value for value in values if value is not None and value == value]
    return round(float(np.mean(known)), 4) if known else None


def _both(row: Row) -> float | None:
    return None if row.j is None else (row.j + row.f) / 2


def _table(rows: list[Row]) -> dict[str, dict]:
    table = {}
    for kind in (*KINDS, "all present"):
        some = [row for row in rows if row.kind == kind or (kind == "all present" and row.kind != "absent")]
        if not some:
            continue
        figures = {"queries": len(some), "pointing": _mean(row.pointing for row in some)}
        figures |= {f"coarse_j_{name}": _mean(row.coarse.get(name) for row in some) for name in MAPS}
        table[kind] = figures | {"jf": _mean(map(_both, some)), "empty": _mean(row.empty for row in some)}
    return table


def _summary(rows: list[Row]) -> dict[str, float | None]:
    present = [row for row in rows if row.kind != "absent"]
    named = [row for row in present if row.kind in ("noun", "colour")]
    return {
        "noun_colour_pointing": _mean(row.pointing for row in named),
        "noun_colour_jf": _mean(map(_both, named)),
        "present_pointing": _mean(row.pointing for row in present),
        "present_jf": _mean(map(_both, present)),
        "absent_empty": _mean(row.empty for row in rows if row.kind == "absent"),
        "present_lost": _mean(row.empty for row in present),
        "coarse_j_raw": _mean(row.coarse["raw"] for row in present),
        "coarse_j_contrast": _mean(row.coarse["contrast"] for row in present),
        "coarse_j_fused": _mean(row.coarse["fused"] for row in present),
    }


def _steps(rows: list[Row]) -> dict[str, dict]:
    """What contrast and fusion add to coarse J, with bootstrap intervals over queries."""
    present = [row.coarse for row in rows if row.coarse]
    rng = np.random.default_rng(0)
    found = {}
    for low, high in (("raw", "contrast"), ("contrast", "fused"), ("raw_fused", "fused")):
        gains = np.array([one[high] - one[low] for one in present])
        if len(gains):
            means = gains[rng.integers(len(gains), size=(_RESAMPLED, len(gains)))].mean(1)
            found[f"{low} to {high}"] = {
                "gain": round(float(gains.mean()), 4), "interval": [round(float(v), 4) for v in np.percentile(means, (2.5, 97.5))],
            }  # fmt: skip
    return found
