"""Figures as a table, in the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .datasets.base import Dataset
from .groups import Row

_COLUMNS = {
    "j": "J", "f": "F", "jf": "J&F", "paper": "paper", "coarse_j": "coarse J", "coarse_f": "coarse F", "coarse_jf": "coarse J&F",
    "paper_coarse": "paper", "r": "R", "n_acc": "N-acc", "t_acc": "T-acc", "published_jf": "J&F as published",
}  # fmt: skip

_MOST_LISTED = 50


def columns(figures: Mapping[str, Mapping], paper: Mapping) -> tuple[list[str], list[list[str]]]:
    """Titles, and a line for each group: its name, its items, and all figures that at least one group has, in percent."""
    lines = {group: _in_percent(one) | _of_paper(paper, group) for group, one in figures.items()}
    used = [name for name in _COLUMNS if any(line.get(name) is not None for line in lines.values())]
    titles = ["group", "items", *(_COLUMNS[name] for name in used)]
    cells = [[group, str(figures[group]["items"]), *(_cell(line.get(name)) for name in used)] for group, line in lines.items()]
    return titles, cells


def as_text(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[place]) for line in (titles, *cells)) for place in range(len(titles))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in (titles, *cells)
    )


def as_markdown(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def remarks(dataset: Dataset, left: int, paper: Mapping) -> list[str]:
    """What is to be said beside the figures: what is odd about the files, whose figures stand beside ours, what was not asked."""
    said = list(dataset.notes)
    if paper["tracked"] or paper["coarse"]:
        split = "; it may be of another split" if dataset.name == "mevis" else ""
        said.append(f'"paper" is the J&F that the DecAF paper gives for {paper["model"]}{split}.')
    if left:
        said.append(f"{left} items of the set are not in these figures: they were not asked.")
    return said


def missing(dataset: Dataset, rows: Sequence[Row]) -> list[str]:
    """Which items have no figures, why, and how they are counted."""
    lost = [row for row in rows if row.problem]
    if not lost:
        return []
    how = "count as 0" if dataset.counts_missing else "are left out"
    if dataset.hidden:
        title = f"{len(lost)} of {len(rows)} items have no masks:"
    elif dataset.name == "samples":
        title = f"{len(lost)} of {len(rows)} items have no figures; they {how}:"
    else:
        title = f"{len(lost)} of {len(rows)} items have no figures. As in {dataset.title}'s own script they {how}:"
    said = [title, *(f"  {row.name}: {row.problem}" for row in lost[:_MOST_LISTED])]
    return said + [f"  and {len(lost) - _MOST_LISTED} more; all are in the JSON file."] * (len(lost) > _MOST_LISTED)


def _in_percent(figures: Mapping) -> dict[str, float | None]:
    return {name: None if figures.get(name) is None else 100 * figures[name] for name in _COLUMNS if not name.startswith("paper")}


def _of_paper(paper: Mapping, group: str) -> dict[str, float | None]:
    return {"paper": paper["tracked"].get(group), "paper_coarse": paper["coarse"].get(group)}


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
