"""What an evaluation came to: figures, a table, and the files of its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..files import atomic_write, write_json
from ..results.files import versions
from . import paper
from .datasets.base import Dataset
from .groups import Row, group_figures
from .submission import write_submission
from .tables import as_markdown, as_text, columns, missing, remarks

JSON, MARKDOWN, ZIP = "results.json", "results.md", "submission.zip"


@dataclass(frozen=True)
class Evaluation:
    """Figures of a set.

    Attributes:
        dataset: what was evaluated.
        rows: of each item that was asked, now or earlier, or could not be.
        settings: all that decides the figures.
        model: name of the language model, by which the paper's figures beside ours are chosen.
        seconds, counts: wall time by stage, and work by name, of all items.
        said: further sentences.
    """

    dataset: Dataset
    rows: Sequence[Row]
    settings: dict = field(default_factory=dict)
    model: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    said: tuple[str, ...] = ()

    @cached_property
    def figures(self) -> dict[str, dict[str, float | int | None]]:
        """By group; see `decaf.evaluation.groups.group_figures`."""
        return group_figures(self.dataset, self.rows)

    @property
    def left(self) -> int:
        """Items of the set that nothing is known of."""
        return len(self.dataset.items) - len(self.rows)

    @cached_property
    def remarks(self) -> list[str]:
        """What there is to say beside the figures."""
        said = remarks(self.dataset, self.left, self._paper)
        if not self.figures and self.rows:
            said.insert(0, f"The truth of {self.dataset.title} {self.dataset.split} is not public, so there are no figures here.")
        return [*said, *self.warnings]

    @property
    def warnings(self) -> list[str]:
        """Those of them that must not go unnoticed: what happened to the run, and items that have no figures."""
        return [*self.said, *missing(self.dataset, self.rows)]

    def table(self) -> str:
        """Title, figures in percent, and remarks, for a terminal."""
        return "\n".join([self._title, *([as_text(*columns(self.figures, self._paper))] if self.figures else []), *self.remarks])

    def markdown(self) -> str:
        """The same as Markdown."""
        said = [f"    {line.strip()}" if line.startswith("  ") else f"\n{line}\n" for line in self.remarks]
        table = [as_markdown(*columns(self.figures, self._paper))] if self.figures else []
        return "\n".join([f"## {self._title}", "", *table, *said]).rstrip() + "\n"

    def as_json(self) -> dict:
        """Everything: figures 0..1, the paper's in percent, and a record of each item."""
        return {
            "dataset": self.dataset.name,
            "split": self.dataset.split,
            "figures": self.figures,
            "paper": self._paper,
            "items": [{"name": row.name, "query": row.query, "tags": list(row.tags), **row.record} for row in self.rows if not row.problem],
            "missing": [
                {"name": row.name, "query": row.query, "tags": list(row.tags), "problem": row.problem} for row in self.rows if row.problem
            ],
            "missing_count_as_zero": self.dataset.counts_missing,
            "not_asked": self.left,
            "remarks": self.remarks,
            "settings": self.settings,
            "seconds": {name: round(spent, 3) for name, spent in self.seconds.items()},
            "counts": self.counts,
            "versions": versions(),
        }

    def write(self, folder: Path) -> list[Path]:
        """Writes `results.json`, `results.md`, and `submission.zip` where a server has the truth; returns what was written. `OutputError`: it cannot
        be written."""
        written = [folder / JSON, folder / MARKDOWN]
        one = self
        if self.dataset.submission is not None and self.dataset.hidden and self.settings.get("sam2") is not None:
            known = {row.name for row in self.rows}
            gone = write_submission(folder / ZIP, folder, self.dataset, [item for item in self.dataset.items if item.name in known])
            written.append(folder / ZIP)
            if gone:
                said = (
                    f"{ZIP} lacks {len(gone)} items, which the server counts as 0: {'; '.join(gone[:5])}{' ...' if len(gone) > 5 else ''}"
                )
                one = Evaluation(self.dataset, self.rows, self.settings, self.model, self.seconds, self.counts, (*self.said, said))
        write_json(folder / JSON, one.as_json())
        with atomic_write(folder / MARKDOWN) as part:
            part.write_text(one.markdown(), encoding="utf-8", errors="backslashreplace")
        return written

    @cached_property
    def _paper(self) -> dict:
        return paper.beside(self.dataset.name, self.model)

    @property
    def _title(self) -> str:
        with_model = f", {self.model}" if self.model else ""
        return f"{self.dataset.title} {self.dataset.split}{with_model}: {len(self.rows)} queries"
