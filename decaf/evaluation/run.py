"""Items of a set asked and scored: clip by clip, on as many workers as there are, taken up again where a run was stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from .. import __version__
from ..attention.questions import Query, Templates, clean_query
from ..bulk.clip_worker import Ask, ClipJob
from ..bulk.jobs import Job, Worker
from ..bulk.run import run_jobs
from ..bulk.run_folder import RECORDS, RunFolder
from ..errors import DecafError, shown
from ..report import Progress, Report, silent
from ..settings import METHODS, AttentionSettings, FusionSettings, PointSettings, TrackingSettings
from .datasets.base import Dataset, Item, Source
from .groups import Row

FAILED = ("problem", "error")
"""Entries of a record that say why an item has no figures: its files, or what happened when it was asked."""


@dataclass(frozen=True)
class Method:
    """How everything is asked and masked.

    Attributes:
        compare: also masks by the published rule from the same attention, and measures the maps before fusion.
    """

    attention: AttentionSettings = AttentionSettings()
    points: PointSettings = PointSettings()
    tracking: TrackingSettings = TrackingSettings()
    fusion: FusionSettings = FusionSettings()
    templates: Templates = field(default_factory=Templates)
    compare: bool = False


@dataclass
class Records:
    """What is known of the items of a set: by name the record of each that was asked, and the work that this took."""

    items: dict[str, dict] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, names: dict[str, str], record: dict) -> None:
        """`names`: of the items by the keys that a job's record has for them."""
        self.items |= {names[key]: one for key, one in record["asks"].items() if key in names}
        for total, part in ((self.seconds, record.get("seconds", {})), (self.counts, record.get("counts", {}))):
            for name, value in part.items():
                total[name] = total.get(name, 0) + value

    def rows(self, items: Iterable[Item]) -> list[Row]:
        """Of those items that something is known of."""
        found = []
        for item in items:
            record = self.items.get(item.name)
            if record is not None:
                problem = next((str(record[name]) for name in FAILED if name in record), "")
                found.append(Row(item.name, item.query, item.tags, {} if problem else record, problem))
        return found


@dataclass(frozen=True)
class _Clip:
    """A clip of a set with all that is asked about it. `key`: of its job; the items' keys are their numbers in it."""

    key: str
    source: Source | None
    items: list[Item]

    @property
    def names(self) -> dict[str, str]:
        return {str(number): item.name for number, item in enumerate(self.items)}


def run_settings(dataset: Dataset, method: Method, models: dict) -> dict:
    """What decides the figures, for a folder of results. `models`: what there is to say of the models."""
    digest = hashlib.sha256()
    for item in dataset.items:
        digest.update(f"{item.name}\0{item.query}\0".encode("utf-8", "backslashreplace"))
    return {
        "decaf": __version__, "dataset": dataset.name, "split": dataset.split, "items": len(dataset.items), "queries": digest.hexdigest()[:16],
        **models, **asdict(method),
    }  # fmt: skip


def ask_items(
    dataset: Dataset,
    items: Sequence[Item],
    method: Method,
    make_worker: Callable[[], Worker],
    *,
    folder: Path | None = None,
    settings: dict | None = None,
    resume: bool = False,
    report: Progress | Report = silent,
    **where,
) -> Records:
    """Asks `items`, which are all or some of the set's, but those that are done.

    Args:
        make_worker: of a `decaf.bulk.clip_worker.ClipWorker` whose writer is an `ItemWriter`.
        folder: keeps a record per clip; None keeps nothing.
        settings: of `run_settings`; those of an earlier run into the folder must be the same.
        resume: whether there may be records in the folder.
        where: workers, gpus_per_worker, address and tell of `run_jobs`.

    Returns the records of these and of all other items of the set that the folder has. Raises DecafError as `run_jobs` and `RunFolder` do.
    """
    records, clips = Records(), _clips(dataset.items)
    wanted = {item.name for item in items}
    with _folder(folder, settings) as run:
        earlier = _earlier(run, clips)
        if earlier and not resume:
            raise DecafError(f"--out {shown(folder)} holds results of an earlier run. Go on with it by --resume, or give another folder.")
        jobs, known = [], {}
        for clip in clips:
            known[clip.key] = earlier.get(clip.key, {"asks": {}})
            asks = known[clip.key]["asks"]
            # What failed is tried again: files may have come since, and another machine has more memory.
            left = [
                key for key, name in clip.names.items() if name in wanted and (key not in asks or any(one in asks[key] for one in FAILED))
            ]
            problems = {key: {"problem": clip.items[int(key)].problem} for key in left if clip.items[int(key)].problem}
            if problems:
                known[clip.key] = known[clip.key] | {"asks": {**asks, **problems}}
            left = [key for key in left if key not in problems]
            if left:
                jobs.append(Job(clip.key, _payload(clip, left, method)))
            elif problems and run is not None:
                run.finish(clip.key, known[clip.key])
        asked = {job.key: job.payload.left for job in jobs}
        for outcome in run_jobs(jobs, make_worker, report=report, **where):
            before = known[outcome.key]
            new = outcome.record or {"asks": {key: {"error": outcome.error} for key in asked[outcome.key]}}
            known[outcome.key] = _joined(before, new)
            if run is not None:
                run.finish(outcome.key, known[outcome.key])
        for clip in clips:
            records.add(clip.names, known[clip.key])
    return records


def merged(dataset: Dataset, folders: Sequence[Path], out: Path, settings: dict) -> Records:
    """The records of runs with these `settings` put together in the folder `out`. Of an item that several have, the first that has figures counts.
    DecafError as `RunFolder` does."""
    records = Records()
    with RunFolder(out, settings) as run:
        for clip in _clips(dataset.items):
            joined: dict = {"asks": {}}
            for one in (run.folder, *folders):
                found = _stored(one / RECORDS / f"{clip.key}.json")
                for key, record in found.get("asks", {}).items():
                    if key not in joined["asks"] or any(name in joined["asks"][key] for name in FAILED):
                        joined["asks"][key] = record
                if one != run.folder:
                    joined = _joined(joined, found | {"asks": {}})
            if joined["asks"]:
                run.finish(clip.key, joined)
                records.add(clip.names, joined)
    return records


def _stored(path: Path) -> dict:
    """A record of a clip; an empty one if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and isinstance(found.get("asks"), dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


@contextmanager
def _folder(folder: Path | None, settings: dict | None) -> Iterator[RunFolder | None]:
    if folder is None:
        yield None
        return
    with RunFolder(folder, settings or {}) as run:
        yield run


def _earlier(run: RunFolder | None, clips: Sequence[_Clip]) -> dict[str, dict]:
    """Records of an earlier run by the keys of clips. A damaged one is as good as none."""
    found = {}
    for clip in clips if run is not None else ():
        if run.done(clip.key):
            try:
                record = run.record(clip.key)
                if isinstance(record.get("asks"), dict) and all(isinstance(one, dict) for one in record["asks"].values()):
                    found[clip.key] = record
            except DecafError:
                continue
    return found


def _clips(items: Sequence[Item]) -> list[_Clip]:
    """The items by their clips, in their order. A key does not depend on how many of the items are asked."""
    clips: dict[object, _Clip] = {}
    for item in items:
        source = item.clip if item.clip is not None else item.video
        if source not in clips:
            plain = re.sub(r"[^A-Za-z0-9-]+", "-", item.video).strip("-")[-60:]
            clips[source] = _Clip(f"{len(clips):05d}-{plain}".rstrip("-"), item.clip, [])
        clips[source].items.append(item)
    return list(clips.values())


def _payload(clip: _Clip, left: Sequence[str], method: Method) -> ClipJob:
    asks = tuple(Ask(key, _as_asked(item.query), item) for key, item in zip(clip.names, clip.items, strict=True) if not item.problem)
    compared = replace(method.tracking, method=METHODS[1]) if method.compare else None
    return ClipJob(
        clip.source.open, asks, method.attention, method.points, method.tracking, method.templates, tuple(left), method.fusion, compared
    )


def _as_asked(text: str) -> str:
    """A sentence of a set whole: what stands before a colon is no name that a user has given it."""
    try:
        query = clean_query(text)
    except DecafError:
        return text  # which the worker says of this item alone
    return Query(f"{query.name}: {query}") if query.name else query


def _joined(before: dict, new: dict) -> dict:
    """The record of a clip, some of whose items were asked earlier."""
    joined = {"asks": {**before["asks"], **new["asks"]}}
    for part in ("seconds", "counts"):
        old, more = before.get(part, {}), new.get(part, {})
        joined[part] = {name: round(old.get(name, 0) + more.get(name, 0), 4) for name in {**old, **more}}
    return joined
