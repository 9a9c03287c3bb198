"""The method on unseen made-up scenes: pointing accuracy of attention, and quality of coarse and final masks, per kind of query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..bulk.clip_worker import ClipWorker
from ..demo.asking import KINDS
from ..demo.hard import HARD_KINDS
from ..mllm import MLLM
from ..report import Progress, Report, silent
from ..sam2 import SAM2
from ..settings import MODES, AttentionSettings
from .datasets import scenes as scene_set
from .groups import Row as Result
from .maps import MAPS
from .run import Method, Records, ask_items
from .scoring import ItemWriter

_BOOTSTRAP_SAMPLES = 2000


@dataclass
class Row:
    """Figures of one query in one setting, 0..1.

    Attributes:
        presence: as in `decaf.data.Attention`.
        pointing: see `decaf.evaluation.maps.pointing`; None for an absent object.
        coarse: J of the coarse masks, by the names of `decaf.evaluation.maps.MAPS`.
        j, f, empty: of SAM 2's masks by the default method; None without SAM 2.
        published: the same three of the published method, from the same attention.
        answered: whether the model named the object rightly when it was asked about the video; None where no setting had it answer.
    """

    setting: str
    kind: str
    query: str
    seed: int
    presence: float | None
    pointing: float | None = None
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
    """Runs three queries on each scene (see `decaf.evaluation.datasets.scenes.read`) in each of `settings`.

    Args:
        sam2: None skips the final masks.
        scenes: how many scenes.
        seed: of the first scene; the others have the seeds after it.
        length: frames of a scene; all of them are key frames where the settings allow so many. None: as many as each hard scene draws.
        detail: as in `AttentionSettings`.
        hard: scenes of `decaf.demo.hard`.

    Returns what `scene_figures` does.
    """
    dataset, report, found = scene_set.read(scenes, seed, length, hard=hard), Report.of(progress), {}
    for place, setting in enumerate(settings):
        method = Method(AttentionSettings(setting=setting, detail=detail), compare=True)

        def told(done: int, total: int, what: str, place=place) -> None:
            report.progress(place * total + done, len(settings) * total, "Evaluating")

        found[setting] = ask_items(dataset, dataset.items, method, lambda: ClipWorker(mllm, sam2, ItemWriter(None, compare=True)), report=told)
    return scene_figures({setting: (records.rows(dataset.items), records) for setting, records in found.items()})


def scene_figures(found: Mapping[str, tuple[Sequence[Result], Records]]) -> dict:
    """Figures of made-up scenes by setting of the background question, each with the rows of its items and the work that they took.

    Returns:
        "summary": flat figures of the first setting; "settings": {setting: {kind: figures}}, among them J&F of the default method and of
        the published one, and the gain between them with its 95 % bootstrap interval; "seconds": {setting: {stage: wall time of all
        scenes}} of the default method; "steps": differences of coarse J with such intervals; "queries": one record per query.
    """
    # The object question is the same in every setting, but answered in one.
    answered = {one.name: one.record["answered"] for results, _ in found.values() for one in results if "answered" in one.record}
    rows = {setting: [_row(setting, one, answered) for one in results if not one.problem] for setting, (results, _) in found.items()}
    first = next(iter(rows.values()))
    seconds = {setting: {stage: spent for stage, spent in records.seconds.items() if stage in _STAGES} for setting, (_, records) in found.items()}
    tables = {setting: _table(own) for setting, own in rows.items()}
    queries = [vars(row) for own in rows.values() for row in own]
    return {"summary": _summary(first), "steps": _steps(first), "settings": tables, "seconds": seconds, "queries": queries}


_STAGES = ("attention", "fusion", "segmentation")


def _row(setting: str, result: Result, answered: Mapping[str, bool]) -> Row:
    record = result.record
    maps = record.get("maps") or {}
    return Row(
        setting, result.tags[0], result.query, int(result.name.partition("/")[0]), record["presence"], maps.get("pointing"), maps.get("coarse_j", {}),
        record.get("j"), record.get("f"), record.get("empty"), record.get("published", {}), answered.get(result.name),
    )  # fmt: skip


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
