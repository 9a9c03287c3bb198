"""What `decaf segment` does: load, compute, write; and how a stopped run is taken up again."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .. import __version__
from ..attention.extract import extract_attentions
from ..attention.frames import shown_frames
from ..attention.questions import clean_not_this, names_of, split_queries
from ..clips import Clip, open_clip
from ..clips.identity import check_same_clip
from ..data import Attention, Tracks, caption
from ..demo import BUNDLED, MLLM_FOLDER
from ..devices import choose_device, chosen_dtype, empty_caches, language_dtype, mixed_dtype
from ..errors import DecafError
from ..files import write_json
from ..finishing import refine
from ..folder_lock import FolderLocks
from ..mllm import find_mllm, load_mllm
from ..mllm.folder import stored_dtype
from ..mllm.streaming import check_budget
from ..pipeline import segment_attention
from ..report import Progress, Report
from ..results import files as outputs
from ..results.record import described
from ..results.write import Wanted, write_result
from ..sam2 import SAM2
from ..segmenters import load_segmenter
from ..settings import RefineSettings
from ..tracking import feature_cache
from ..tracking.frames import FeatureCache
from .attention_file import load_attention, save_attention
from .memory_log import MemoryLog
from .options import Options, check_options, check_paths, check_start_layer, sam2_file

log = logging.getLogger(__name__)

@dataclass(frozen=True)
class _Job:
    """One query, what it is called, and the folder of its results. `attention_from`, `made_from`: what they come from, which a later run compares
    with its own."""

    query: str
    name: str
    folder: Path
    attention_from: dict
    made_from: dict


@dataclass(frozen=True)
class _Run:
    """What all queries of a run share. `settings`: as `result.json` lists them. `report`: of what is done once for all queries."""

    options: Options
    settings: dict
    memory: MemoryLog
    report: Report

    @contextmanager
    def stage(self, name: str, report: Report) -> Iterator[None]:
        """A stage that reports no progress of its own, timed by `report`."""
        self.memory.step(name)
        with report.stage(name):
            yield


@dataclass(frozen=True)
class Outcome:
    """What a run prints at its end. `summary`: a few lines. `warnings`: those sentences of it that say of a query that nothing, or only a best
    guess, was found."""

    summary: str
    warnings: tuple[str, ...]


def run(options: Options, progress: Progress, locks: FolderLocks | None = None) -> Outcome:
    """Runs the command. `locks`: of the caller, who has something of its own to write into --out; else the run locks it for itself.

    Raises DecafError for every input that cannot be used, and if another run writes into --out.
    """
    if locks is None:
        with FolderLocks() as locks:
            return run(options, progress, locks)
    with MemoryLog(progress) as memory:
        return _run(options, memory, locks)


def _run(options: Options, memory: MemoryLog, locks: FolderLocks) -> Outcome:
    queries = split_queries(options.queries)
    options.templates.check(queries, options.attention.setting)
    if options.attention.not_this is not None:
        not_this = clean_not_this(options.attention.not_this, queries)
        options.templates.check([not_this], options.attention.setting)
        options = replace(options, attention=replace(options.attention, not_this=not_this))
    options = replace(options, sam2=sam2_file(options.sam2))
    names = names_of(queries)
    folders = [options.out] if len(queries) == 1 else [outputs.query_folder(options.out, name) for name in names]
    check_options(options)
    check_paths(options, folders)
    device = choose_device(options.device)
    check_budget(options.memory_budget, device)
    sam2_dtype = chosen_dtype(options.sam2_dtype, mixed_dtype(device))
    stale = _claim(options.out, folders, locks)
    report = Report(memory)
    mllm = mllm_folder(options.mllm, report)
    dtype = chosen_dtype(options.dtype, language_dtype(device, stored_dtype(mllm)))
    check_start_layer(options.attention.start_layer, mllm)

    settings = {
        **asdict(options.attention),
        "templates": asdict(options.templates),
        "dtype": str(dtype).removeprefix("torch."),
    }
    source = {"decaf": __version__, "clip": outputs.stamp(options.clip), "mllm": outputs.stamp(mllm), **settings}
    settings |= {**asdict(options.points), **asdict(options.tracking), "objects": options.objects, "overlay": options.overlay, "style": options.style}
    settings |= {"refine": asdict(options.refine), "cut_out": options.cut_out}
    settings["sam2_dtype"] = str(sam2_dtype).removeprefix("torch.")
    whole = source | settings | {"sam2": outputs.stamp(options.sam2)}
    jobs = [
        _Job(query, name, folder, source | {"query": query}, whole | {"query": query, "name": name})
        for query, name, folder in zip(queries, names, folders, strict=True)
    ]
    earlier = {job.folder: outputs.finished(job.folder, job.made_from) if options.resume else None for job in jobs}
    left = [job for job in jobs if earlier[job.folder] is None]
    messages = {job.folder: earlier[job.folder]["message"] for job in jobs if job not in left}
    lines = []
    if left:
        shared = _Run(options, settings | {"device": str(device)}, memory, report)
        with shared.stage("open clip", report):
            clip = open_clip(options.clip, progress=report)
            shown_frames(len(clip), options.attention)  # before minutes are spent on models
        # It loads in seconds: a wrong file is reported before the language model takes its minutes.
        with shared.stage("load SAM 2", report):
            sam2 = load_segmenter(options.sam2, device=device, dtype=sam2_dtype, progress=report)
        attentions = _attentions(shared, left, clip, mllm, device, dtype)
        features = feature_cache(sam2, shared=len(left) > 1, budget=options.memory_budget)
        for job, (attention, record) in zip(left, attentions, strict=True):
            attention = replace(attention[0], name=job.name), replace(attention[1], name=job.name)
            tracks, filled = _segment(shared, job, clip, sam2, features, attention, record)
            messages[job.folder] = tracks.message
            told = _summary(job.folder, tracks, filled)
            lines.append(f"{caption(tracks)} {told}" if tracks.name else told)
    else:
        lines.append(f"Already finished in {options.out}; nothing to do.")
        lines += filter(None, messages.values())
    _clear_stale(options.out, stale, locks)
    return Outcome("\n".join(lines), tuple(message for job in jobs if (message := messages[job.folder])))


def _claim(out: Path, folders: list[Path], locks: FolderLocks) -> list[Path]:
    """Makes the folders and locks them, `out` first, and those in which earlier queries left results, which are returned."""
    outputs.prepare_folder(out)
    locks.take(out)
    for folder in folders:
        outputs.prepare_folder(folder)
        locks.take(folder)
    stale = outputs.earlier_results(out, folders)
    for folder in stale:
        locks.take(folder)
    return stale


def _clear_stale(out: Path, stale: list[Path], locks: FolderLocks) -> None:
    for folder in stale:
        outputs.clear_earlier(folder)
        if folder != out:
            locks.release(folder)  # its file goes, too
            outputs.remove_if_empty(folder)


def _attentions(
    run: _Run, jobs: list[_Job], clip: Clip, folder: Path, device: torch.device, dtype: torch.dtype
) -> list[tuple[tuple[Attention, Attention], dict]]:
    """Per job (object, background) attention and {"seconds", "counts", "earlier"}: of the earlier run with --resume, else asked for now,
    all queries on the same passes over the pictures."""
    options = run.options
    earlier = {job.folder: _earlier(options, job, clip) if options.resume else None for job in jobs}
    missing = [job for job in jobs if not earlier[job.folder]]
    if missing:
        with run.stage("load MLLM", run.report):
            mllm = load_mllm(folder, device=device, dtype=dtype, memory_budget=options.memory_budget, progress=run.report)
        report = Report(run.memory)
        attentions = extract_attentions(
            mllm, clip, [job.query for job in missing],
            options.attention, templates=options.templates, progress=report,
        )  # fmt: skip
        record = {"seconds": report.seconds, "counts": report.counts, "queries_at_once": len(missing)}
        # SAM 2's sweeps need the memory that a language model of many gigabytes holds.
        del mllm
        gc.collect()
        empty_caches()
        for job, attention in zip(missing, attentions, strict=True):
            save_attention(job.folder / outputs.ATTENTION, attention, job.attention_from, record)
    else:
        attentions, record = [], {}
    for job in jobs:
        if earlier[job.folder]:  # it may come from another folder: the queries were in another order then
            save_attention(job.folder / outputs.ATTENTION, earlier[job.folder][0], job.attention_from, earlier[job.folder][1])
    asked = iter(attentions)
    return [
        (earlier[job.folder][0], earlier[job.folder][1] | {"earlier": True})
        if earlier[job.folder]
        else (next(asked), record | {"earlier": False})
        for job in jobs
    ]


def _earlier(options: Options, job: _Job, clip: Clip) -> tuple[tuple[Attention, Attention], dict] | None:
    """The attention that an earlier run, of these or other queries, has left for this query."""
    for folder in [job.folder, *outputs.query_folders(options.out)]:
        found = load_attention(folder / outputs.ATTENTION, job.attention_from)
        if found and found[0][0].query == job.query:
            with suppress(DecafError):  # a file that says it is this clip's, and is not, is as good as none
                check_same_clip(clip, found[0][0].clip)
                return found
    return None


def _segment(
    run: _Run,
    job: _Job,
    clip: Clip,
    sam2: SAM2,
    features: FeatureCache,
    attention: tuple[Attention, Attention],
    record: dict,
) -> tuple[Tracks, int]:
    """Masks from one query's attention, and everything written. Returns the tracks, and in how many frames something is masked."""
    options, report = run.options, Report(run.memory)
    result = segment_attention(
        sam2, clip, attention, points=options.points, tracking=options.tracking, progress=report, features=features
    )
    if options.refine != RefineSettings():
        result = replace(result, tracks=refine(result.tracks, options.refine))
    # Only now: until there is something better, an earlier result stays whole.
    outputs.clear(job.folder)
    with run.stage("write", report):
        wanted = Wanted(objects=options.objects, overlay=options.overlay, style=options.style, cut_out=options.cut_out)
        filled, files = write_result(job.folder, options.clip, clip, result, wanted, report.progress)
    write_json(
        job.folder / outputs.RESULT,
        {
            **described(clip, attention, result.tracks, filled, result.tracks.message),
            "settings": run.settings,
            "seconds": {name: round(spent, 3) for name, spent in (run.report.seconds | record["seconds"] | report.seconds).items()},
            "peak_resident_bytes": run.memory.peaks or None,
            "attention_from_earlier_run": record["earlier"],
            "queries_at_once": record["queries_at_once"],
            "counts": record["counts"] | result.counts,
            "versions": outputs.versions(),
            "files": [outputs.ATTENTION, *files],
            "made_from": job.made_from,
        },
    )
    return result.tracks, filled


def mllm_folder(name: str, progress: Progress | Report) -> Path:
    """The folder of the model that --mllm names: a folder, a repository id or "bundled"."""
    return MLLM_FOLDER if name == BUNDLED else find_mllm(name, progress)


def _summary(folder: Path, tracks: Tracks, filled: int) -> str:
    if not tracks.tracks:
        return f"{tracks.message} The masks in {folder} are empty."
    many = f"{len(tracks.tracks)} object" + "s" * (len(tracks.tracks) != 1)
    summary = f"{many}, masked in {filled} of {tracks.length} frames. Results are in {folder}."
    return f"{summary}\n{tracks.message} Look at {outputs.SHEET}." if tracks.message else summary
