"""What `decaf batch` does: jobs made of rows, and the folder and the report kept up to date with what becomes of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..attention.questions import MOST_QUERIES, Templates
from ..bulk import Job, Outcome, RunFolder, run_jobs
from ..bulk.clip_worker import Ask, ClipJob, Models, clip_worker
from ..errors import DecafError, shown
from ..files import write_json
from ..paths import look_at, real_path
from ..report import Progress
from ..results import files
from ..results.write import Wanted
from ..settings import RefineSettings
from .batch_writer import RowWriter
from .manifest import Row, Stages

REPORT = "report.json"
ROWS = "Rows"
"""Name of the step that is reported."""
_MOST_FAILED = 10_000
"""Failed rows that the report lists."""


@dataclass(frozen=True)
class Settings:
    """What decides the results of all rows."""

    models: Models
    stages: Stages
    templates: Templates
    wanted: Wanted
    refine: RefineSettings

    def as_json(self) -> dict:
        from .. import __version__

        models = asdict(self.models)
        models |= {name: files.stamp(path) if (path := getattr(self.models, name)) is not None else None for name in ("mllm", "sam2")}
        del models["memory_budget"]
        return {"decaf": __version__, "models": models, **asdict(self.stages), **asdict(self)["wanted"], "refine": asdict(self.refine)} | {
            "templates": asdict(self.templates)
        }


@dataclass(frozen=True)
class Workers:
    """Who does it; see `run_jobs`."""

    workers: int = 1
    gpus_per_worker: float | None = None
    address: str | None = None


@dataclass
class Batch:
    """What has become of a batch.

    Attributes:
        earlier: rows that an earlier run has done.
        done: rows that this one has done.
        failed: a record of each row that has failed in this run.
        again: ids of rows that were begun again because a worker had died, and how often they were begun.
        empty: ids of rows done in this run in which nothing is masked.
        notes: sentences about the run.
        seconds: wall time of this run.
        stages: the same by stage, of all workers together.
    """

    rows: int
    earlier: int = 0
    done: int = 0
    failed: list[dict] = field(default_factory=list)
    again: dict[str, int] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> int:
        return self.rows - self.earlier - self.done - len(self.failed)

    def as_json(self) -> dict:
        rate = round(60 * (self.done + len(self.failed)) / self.seconds, 2) if self.seconds else None
        return {
            "rows": self.rows,
            "done": self.earlier + self.done,
            "done_earlier": self.earlier,
            "failed": len(self.failed),
            "left": self.left,
            "seconds": round(self.seconds, 1),
            "rows_a_minute": rate,
            "seconds_by_stage": {name: round(spent, 1) for name, spent in self.stages.items()},
            "failed_rows": self.failed[:_MOST_FAILED],
            "begun_again": self.again,
            "nothing_masked": self.empty,
            "notes": self.notes,
        }


def run(
    rows: Sequence[Row], out: Path, settings: Settings, workers: Workers, progress: Progress, tell: Callable[[str], None]
) -> Batch:
    """Does the rows that are not done yet, into the folder `out`. `tell`: is given what goes wrong, at once.

    DecafError: the folder or the models cannot be used, or nothing more can be written. What is done by then stays, and the report says so.
    """
    check_apart(rows, out)
    batch, begin = Batch(len(rows)), time.perf_counter()

    def note(sentence: str) -> None:
        batch.notes.append(sentence)
        tell(sentence)

    with RunFolder(out, settings.as_json()) as folder:
        try:
            _run(rows, folder, settings, workers, batch, progress, note, tell)
        except DecafError as error:
            batch.notes.append(str(error))
            raise
        except KeyboardInterrupt:
            batch.notes.append("Stopped by hand.")
            raise
        finally:
            batch.seconds = time.perf_counter() - begin
            _write_report(out, batch)
    return batch


def _write_report(out: Path, batch: Batch) -> None:
    try:
        write_json(out / REPORT, batch.as_json())
    except DecafError as error:  # a full disk has been told already
        batch.notes.append(str(error))


def _run(rows, folder: RunFolder, settings: Settings, workers: Workers, batch: Batch, progress: Progress, note, tell) -> None:
    states = {row.id: made_from(row) for row in rows}
    done = {row.id for row in rows if _is_done(folder, row, states[row.id])}
    batch.earlier = len(done)

    def failed(row: Row, error: str, tries: int = 0) -> None:
        batch.failed.append({"id": row.id, "line": row.line, "clip": row.written, "query": row.query, "error": error, "tries": tries})
        tell(f"Line {row.line}, {row.id}: {error}")

    left = [row for row in rows if row.id not in done]
    for row in left:
        if states[row.id]["clip"] is None:
            failed(row, f"CLIP {shown(row.clip)} does not exist. Check the path.")
    missing = {record["id"] for record in batch.failed}
    clips = list(by_clip(rows))
    jobs = {}
    for group in clips:
        wanted = tuple(row.id for row in group if row.id not in done and row.id not in missing)
        if wanted:
            jobs[group[0].id] = (group, _job(group, wanted, settings))
    total = len(left)
    progress(len(batch.failed), total, ROWS)
    writer = RowWriter(real_path(folder.folder), settings.wanted, settings.refine, settings.stages.points.presence_threshold)
    outcomes = run_jobs(
        [job for _, job in jobs.values()], clip_worker(settings.models, writer), workers=workers.workers,
        gpus_per_worker=workers.gpus_per_worker, address=workers.address, report=lambda *_: progress(batch.done + len(batch.failed), total, ROWS),
        tell=note,
    )  # fmt: skip
    with closing(outcomes):
        for outcome in outcomes:
            group, job = jobs[outcome.key]
            for name, spent in (outcome.record or {}).get("seconds", {}).items():
                batch.stages[name] = batch.stages.get(name, 0.0) + spent
            for row in (row for row in group if row.id in job.payload.left):
                record = _of_row(outcome, row)
                if outcome.tries > 1:
                    batch.again[row.id] = outcome.tries
                if "error" in record:
                    failed(row, record["error"], outcome.tries)
                    continue
                folder.finish(row.id, {**record, "made_from": states[row.id]})
                batch.done += 1
                if not record["frames_with_mask"]:
                    batch.empty.append(row.id)
            progress(batch.done + len(batch.failed), total, ROWS)


def _of_row(outcome: Outcome, row: Row) -> dict:
    """What `RowWriter` returned, or {"error"}."""
    if outcome.record is None:
        return {"error": outcome.error}
    return outcome.record["asks"].get(row.id, {"error": "It was not asked."})


def by_clip(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows about the same clip together, clips in the order of their first rows; of very many rows, so many at a time as can be asked at once."""
    clips: dict[Path, list[Row]] = {}
    for row in rows:
        clips.setdefault(_place(row.clip), []).append(row)
    for group in clips.values():
        for start in range(0, len(group), MOST_QUERIES):
            yield group[start : start + MOST_QUERIES]


def _place(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _job(group: Sequence[Row], left: tuple[str, ...], settings: Settings) -> Job:
    asks = tuple(
        Ask(row.id, row.query, str(row.clip), row.stages.attention, row.stages.points, row.stages.tracking) if row.given
        else Ask(row.id, row.query, str(row.clip))
        for row in group
    )  # fmt: skip
    stages = settings.stages
    clip = _place(group[0].clip)
    return Job(group[0].id, ClipJob(clip, asks, stages.attention, stages.points, stages.tracking, settings.templates, left))


def made_from(row: Row) -> dict:
    """What a later run compares: what the row says, and when its clip was last changed. Its "clip" is None if there is none."""
    try:
        state = os.stat(row.clip)
        clip = {"path": row.written, "bytes": state.st_size, "modified_ns": state.st_mtime_ns}
    except (OSError, ValueError):
        clip = None
    return {"clip": clip, "query": row.query, "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in row.given}}


def _is_done(folder: RunFolder, row: Row, state: dict) -> bool:
    """Whether it is, from what the row says now. A clip that is no longer there does not make it undone."""
    if not folder.done(row.id):
        return False
    try:
        before = folder.record(row.id)["made_from"]
        return before == (state if state["clip"] is not None else {**state, "clip": before["clip"]})
    except (DecafError, KeyError, TypeError):
        return False


def check_apart(rows: Sequence[Row], out: Path) -> None:
    """DecafError if results would come to lie in a clip or over it."""
    if look_at(out, "--out") == "file":
        raise DecafError(f"--out {shown(out)} is a file. Give a folder.")
    target = real_path(out)
    ids = {row.id for row in rows}
    for clip in {_place(row.clip): None for row in rows}:
        place = real_path(clip)
        if place == target:
            raise DecafError(f"--out {shown(out)} is one of the clips. Give another folder.")
        if target in place.parents and place.relative_to(target).parts[0] in ids:
            raise DecafError(f"CLIP {shown(clip)} lies among the results in --out {shown(out)}. Give another folder.")
