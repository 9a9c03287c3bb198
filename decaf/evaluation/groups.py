"""From figures of single items to those of a benchmark, grouped and averaged as it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .datasets.base import Dataset

OVERALL = "overall"


@dataclass(frozen=True)
class Row:
    """What became of an item.

    Attributes:
        name, query, tags: as in `decaf.evaluation.datasets.Item`.
        record: of `decaf.evaluation.scoring.ItemWriter`; empty if there is none.
        problem: why there are no figures; empty if there are, or the truth is hidden.
    """

    name: str
    query: str
    tags: tuple[str, ...]
    record: dict
    problem: str = ""


def group_figures(dataset: Dataset, rows: Sequence[Row]) -> dict[str, dict[str, float | int | None]]:
    """Figures by the names of the groups, of all items together under OVERALL; none if the truth is hidden.

    Of each group: "items", "missing" (items without figures), "j", "f" and "jf" of the tracked masks, "coarse_j", "coarse_f" and "coarse_jf" of the
    coarse ones, "r" where it is defined, "n_acc" (share of the items without a target in which nothing is masked), "t_acc" (share of the others in
    which something is), and "published_jf" where the published rule was compared. 0..1; None where nothing says it.
    """
    if dataset.hidden or not any(row.record.get("coarse") or "j" in row.record or row.problem for row in rows):
        return {}
    names = dict.fromkeys(tag for row in rows for tag in row.tags)
    ordered = [name for name in dataset.averaged if name in names] + [name for name in names if name not in dataset.averaged]
    groups = {name: _figures(dataset, [row for row in rows if name in row.tags]) for name in ordered}
    whole = _figures(dataset, rows)
    counted = [groups[name] for name in dataset.averaged if name in groups]
    for figure in _AVERAGED if counted else ():
        known = [group[figure] for group in counted if group[figure] is not None]
        whole[figure] = float(np.mean(known)) if known else None
    return {OVERALL: whole, **groups}


_AVERAGED = ("j", "f", "jf", "coarse_j", "coarse_f", "coarse_jf", "r", "published_jf")


def _figures(dataset: Dataset, rows: Sequence[Row]) -> dict[str, float | int | None]:
    scored = [row for row in rows if not row.problem and "frames" in row.record]
    lost = [row for row in rows if row.problem] if dataset.counts_missing else []
    tracked = [row.record for row in scored if "j" in row.record]

    def mean(values: Sequence[float]) -> float | None:
        """With a 0 for each item that is missing."""
        return float(np.mean([*values, *([0.0] * len(lost))])) if len(values) else (0.0 if lost else None)

    j, f = mean([one["j"] for one in tracked]), mean([one["f"] for one in tracked])
    coarse = [row.record["coarse"] for row in scored if row.record.get("coarse")]
    coarse_j, coarse_f = mean([one["j"] for one in coarse]), mean([one["f"] for one in coarse])
    robust = [one["r"] for one in tracked if "r" in one]
    published = [_both(one["published"]) for one in tracked if "published" in one]
    without, with_target = (
        [row.record for row in scored if "empty" in row.record and row.record["no_target"] is absent] for absent in (True, False)
    )
    return {
        "items": len(rows),
        "missing": sum(bool(row.problem) for row in rows),
        "j": j if tracked or not coarse else None,
        "f": f if tracked or not coarse else None,
        "jf": (j + f) / 2 if j is not None and (tracked or not coarse) else None,
        "coarse_j": coarse_j,
        "coarse_f": coarse_f,
        "coarse_jf": (coarse_j + coarse_f) / 2 if coarse_j is not None else None,
        "r": mean(robust) if robust else None,
        "n_acc": float(np.mean([one["empty"] for one in without])) if without else None,
        "t_acc": float(np.mean([not one["empty"] for one in with_target])) if with_target and without else None,
        "published_jf": float(np.mean(published)) if published else None,
    }


def _both(record: dict) -> float:
    return (record["j"] + record["f"]) / 2
