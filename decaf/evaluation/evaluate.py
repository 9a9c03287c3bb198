"""The method on unseen made-up scenes: pointing accuracy of attention, and quality of coarse and final masks, per kind of query."""

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
from ..demo.asking import KINDS, Query, answer_to, says
from ..demo.hard import HARD_KINDS, make_hard_scene
from ..demo.scenes import Scene, make_scene
from ..mllm import MLLM
from ..pipeline import segment_attention
from ..report import Progress, Report, silent
from ..sam2 import SAM2
from ..settings import METHODS, MODES, AttentionSettings, TrackingSettings
from ..tracking import feature_cache
from .metrics import contour_accuracy, region_similarity

MAPS = ("raw", "raw_fused", "contrast", "frame_only", "fused")
"""Maps whose coarse masks are compared, all with the same smoothing. raw: object attention of the video; raw_fused: that averaged with the frames';
contrast: object minus background attention of the video; frame_only: the same of the frames; fused: the method's map of both."""

POINTED = 0.25
"""A map points at the target if the target covers at least this share of the map's strongest cell."""

_BOOTSTRAP_SAMPLES = 2000


@dataclass
class Row:
    """Figures of one query in one setting, 0..1.

    Attributes:
        presence: as in `decaf.data.Attention`.
        pointing: see `pointing`; NaN for an absent object.
        coarse: J of the coarse masks, by the names of MAPS.
        j, f, empty: of SAM 2's masks by the default method; None without SAM 2.
        published: the same three of the published method, from the same attention.
        answered: whether the model named the object rightly when it was asked about the video; None where no setting had it answer.
    """

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
    published: dict[str, float | bool] = field(default_factory=dict)
    answered: bool | None = None


def evaluate(
    mllm: MLLM,
    sam2: SAM2 | None,
    scenes: int,
    seed: int,
    *,
    settings: tuple[str, ...] = MODES,
    length: int | None = 8,
    detail: str = AttentionSettings.detail,
    hard: bool = False,
    progress: Progress | Report = silent,
) -> dict:
    """Runs three queries on each scene: a noun or a colour in turn, another kind, and an absent object; on a hard one, one of each kind.

    Args:
        sam2: None skips the final masks.
        scenes: how many scenes.
        seed: of the first scene; the others have the seeds after it.
        length: frames of a scene; all of them are key frames where the settings allow so many. None: as many as each hard scene draws.
        detail: as in `AttentionSettings`.
        hard: scenes of `decaf.demo.hard`.

    Returns:
        "summary": flat figures of the first setting; "settings": {setting: {kind: figures}}, among them J&F of the default method and of
        the published one, and the gain between them with its 95 % bootstrap interval; "seconds": {setting: {stage: wall time of all
        scenes}} of the default method; "steps": differences of coarse J with such intervals; "queries": one record per query.
    """
    rows, report, reports = [], Report.of(progress), {setting: Report() for setting in settings}
    for number in range(scenes):
        report.progress(number, scenes, "Evaluating")
        scene = make_hard_scene(seed + number, length=length) if hard else make_scene(seed + number, length=length)
        queries = list(_one_of_each(scene, seed + number) if hard else _chosen(scene, seed + number))
        clip = clip_from_images(torch.from_numpy(scene.frames))
        answered = dict.fromkeys(range(len(queries)))  # the object question is the same in every setting, but answered in one
        before = len(rows)
        for setting in settings:
            own = reports[setting]
            attentions = extract_attentions(mllm, clip, [query.text for query in queries], setting=setting, detail=detail, progress=own)
            rows += [_measure(sam2, clip, scene, *pair, setting, seed + number, own) for pair in zip(queries, attentions, strict=True)]
            for index, (object, _) in enumerate(attentions):
                if object.answers:
                    answered[index] = says(object.answers[0], answer_to(queries[index], scene.things))
        for index, row in enumerate(rows[before:]):
            row.answered = answered[index % len(queries)]
    report.progress(scenes, scenes, "Evaluating")
    tables = {setting: _table([row for row in rows if row.setting == setting]) for setting in settings}
    first = [row for row in rows if row.setting == settings[0]]
    seconds = {setting: own.seconds for setting, own in reports.items()}
    return {
        "summary": _summary(first),
        "steps": _steps(first),
        "settings": tables,
        "seconds": seconds,
        "queries": [vars(row) for row in rows],
    }


def _chosen(scene: Scene, seed: int) -> Iterator[Query]:
    rng = np.random.default_rng(seed)
    by_kind = {kind: [query for query in scene.queries if query.kind == kind] for kind in KINDS}
    others = [kind for kind in KINDS if kind not in ("noun", "colour", "absent") and by_kind[kind]]
    kinds = ["noun" if seed % 2 else "colour", *([str(rng.choice(others))] if others else []), "absent"]
    for kind in kinds:
        if by_kind[kind]:
            yield by_kind[kind][rng.integers(len(by_kind[kind]))]


def _one_of_each(scene: Scene, seed: int) -> Iterator[Query]:
    rng = np.random.default_rng(seed)
    for kind in HARD_KINDS:
        of_kind = [query for query in scene.queries if query.kind == kind]
        if of_kind:
            yield of_kind[rng.integers(len(of_kind))]


def _measure(
    sam2: SAM2 | None,
    clip: Clip,
    scene: Scene,
    query: Query,
    attention: tuple[Attention, Attention],
    setting: str,
    seed: int,
    report: Report,
) -> Row:
    row = Row(setting, query.kind, query.text, seed, attention[0].presence)
    contrast = object_background_fusion(*attention)
    maps = _maps(attention[0], contrast)
    keys = list(attention[0].clip.key_frames)
    truth = torch.from_numpy(scene.truth(query))
    if query.targets:
        row.pointing = pointing(maps["fused"].map, truth[keys])
        row.coarse = {name: float(region_similarity(coarse_masks(fused), truth[keys]).mean()) for name, fused in maps.items()}
    if sam2 is not None:
        features = feature_cache(sam2, shared=True)
        mask = segment_attention(sam2, clip, attention, progress=report, features=features).tracks.union()
        row.j, row.f, row.empty = _figures(mask, truth)
        # On the same attention and image features, and not in the report, whose seconds are those of one method.
        published = segment_attention(sam2, clip, attention, tracking=TrackingSettings(method=METHODS[1]), features=features).tracks.union()
        row.published = dict(zip(("j", "f", "empty"), _figures(published, truth), strict=True))
    return row


def _figures(mask: Tensor, truth: Tensor) -> tuple[float, float, bool]:
    """J, F and whether nothing is masked, of masks (T, H, W) bool."""
    return float(region_similarity(mask, truth).mean()), float(contour_accuracy(mask, truth).mean()), not bool(mask.any())


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


def _mean(values) -> float | None:
    known = [value for value in values if value is not None and value == value]
    return round(float(np.mean(known)), 4) if known else None


def _j_and_f(row: Row) -> float | None:
    return None if row.j is None else (row.j + row.f) / 2


def _published_j_and_f(row: Row) -> float | None:
    return (row.published["j"] + row.published["f"]) / 2 if row.published else None


def _table(rows: list[Row]) -> dict[str, dict]:
    table = {}
    for kind in (*dict.fromkeys((*KINDS, *HARD_KINDS)), "all present"):
        of_kind = [row for row in rows if row.kind == kind or (kind == "all present" and row.kind != "absent")]
        if not of_kind:
            continue
        figures = {"queries": len(of_kind), "answers": _mean(row.answered for row in of_kind)}
        figures["pointing"] = _mean(row.pointing for row in of_kind)
        figures |= {f"coarse_j_{name}": _mean(row.coarse.get(name) for row in of_kind) for name in MAPS}
        figures |= {"jf": _mean(map(_j_and_f, of_kind)), "empty": _mean(row.empty for row in of_kind)}
        figures["jf_as_published"] = _mean(map(_published_j_and_f, of_kind))
        gains = [_j_and_f(row) - _published_j_and_f(row) for row in of_kind if row.published]
        table[kind] = figures | {"jf_gain": _gain(gains) if gains else None}
    return table


def _summary(rows: list[Row]) -> dict[str, float | None]:
    present = [row for row in rows if row.kind != "absent"]
    nouns_and_colours = [row for row in present if row.kind in ("noun", "colour")]
    return {
        "noun_colour_pointing": _mean(row.pointing for row in nouns_and_colours),
        "noun_colour_jf": _mean(map(_j_and_f, nouns_and_colours)),
        "present_pointing": _mean(row.pointing for row in present),
        "present_jf": _mean(map(_j_and_f, present)),
        "present_jf_as_published": _mean(map(_published_j_and_f, present)),
        "absent_empty": _mean(row.empty for row in rows if row.kind == "absent"),
        "present_lost": _mean(row.empty for row in present),
        "coarse_j_raw": _mean(row.coarse["raw"] for row in present),
        "coarse_j_contrast": _mean(row.coarse["contrast"] for row in present),
        "coarse_j_fused": _mean(row.coarse["fused"] for row in present),
    }


def _steps(rows: list[Row]) -> dict[str, dict]:
    """Gains of coarse J by contrast and by fusion, with bootstrap intervals over queries."""
    present = [row.coarse for row in rows if row.coarse]
    steps = {}
    for low, high in (("raw", "contrast"), ("contrast", "fused"), ("raw_fused", "fused")):
        if present:
            steps[f"{low} to {high}"] = _gain([coarse[high] - coarse[low] for coarse in present])
    return steps


def _gain(gains: list[float]) -> dict[str, float | list[float]]:
    """The mean of differences, query by query, and its 95 % bootstrap interval."""
    rng, gains = np.random.default_rng(0), np.array(gains)
    means = gains[rng.integers(len(gains), size=(_BOOTSTRAP_SAMPLES, len(gains)))].mean(1)
    interval = [round(float(value), 4) for value in np.percentile(means, (2.5, 97.5))]
    return {"gain": round(float(gains.mean()), 4), "interval": interval}
