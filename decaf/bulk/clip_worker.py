"""The worker for jobs of one clip with all its queries: the clip is opened once, and its visual work shared."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from ..attention.extract import extract_attentions
from ..attention.fusion import coarse_masks
from ..attention.questions import Query, Templates, clean_not_this, clean_query
from ..clips import Clip, open_clip
from ..data import Attention, FusedAttention, Tracks
from ..devices import choose_device, chosen_dtype, language_dtype, mixed_dtype
from ..errors import DecafError, OutputError, reason
from ..mllm import MLLM, load_mllm
from ..mllm.folder import stored_dtype
from ..pipeline import Result, fused_attention, segment_attention
from ..report import Report
from ..sam2 import SAM2
from ..segmenters import load_segmenter
from ..settings import AttentionSettings, FusionSettings, PointSettings, TrackingSettings
from ..tracking import feature_cache
from ..tracking.frames import FeatureCache
from .jobs import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ask:
    """One query about a clip.

    Attributes:
        key: unique among those of the clip.
        query: as the user writes it.
        data: whatever the writer needs to know of it; picklable.
        attention, points, tracking: settings of its own; None for those of the job. Queries with the same attention settings share the passes.
    """

    key: str
    query: str
    data: object = None
    attention: AttentionSettings | None = None
    points: PointSettings | None = None
    tracking: TrackingSettings | None = None


@dataclass(frozen=True)
class ClipJob:
    """Payload of a job for `ClipWorker`.

    Attributes:
        clip: a path as `open_clip` takes it, or a picklable function that opens the clip, given a `Report`.
        asks: all that is asked about it.
        left: keys of those that are still to be done; None for all. The others are asked, too, so that the numbers are those of an unbroken run.
        templates: question wording; None takes our own.
        compared: settings of the tracking stage with which each query is masked once more, from the same attention; None for none.
    """

    clip: Path | Callable[[Report], Clip]
    asks: tuple[Ask, ...]
    attention: AttentionSettings = AttentionSettings()
    points: PointSettings = PointSettings()
    tracking: TrackingSettings = TrackingSettings()
    templates: Templates | None = None
    left: tuple[str, ...] | None = None
    fusion: FusionSettings = FusionSettings()
    compared: TrackingSettings | None = None

    def attention_of(self, ask: Ask) -> AttentionSettings:
        return ask.attention or self.attention

    def open(self, report: Report) -> Clip:
        return open_clip(self.clip, progress=report) if isinstance(self.clip, Path) else self.clip(report)


@dataclass(frozen=True)
class Masked:
    """What one query came to.

    Attributes:
        attention: (object, background).
        fused: the map that masks are made of.
        result: of the tracking stage; None if that is left out.
        compared: the same with the settings that it is compared with, if there are such.
    """

    attention: tuple[Attention, Attention]
    fused: FusedAttention
    result: Result | None
    compared: Result | None = None

    @property
    def tracks(self) -> Tracks | None:
        return self.result and self.result.tracks

    @cached_property
    def coarse(self) -> Tensor:
        """The masks that attention gives without tracking, of the K key frames: (K, H, W) bool. Empty where the model says that the object is not
        there is not decided here; see `decaf.data.FusedAttention.absence`."""
        return coarse_masks(self.fused)


Writer = Callable[[Ask, Clip, Masked, Report], dict]
"""`writer(ask, clip, masked, report) -> record`: writes what is to stay of a query, and returns what there is to say of it, for `json.dumps`. It is
picklable, and called in the worker's process; folders that it writes to are shared by all machines of a cluster. Raises DecafError if the
query alone is to fail."""


@dataclass(frozen=True)
class Models:
    """Which models a worker loads, and how; picklable.

    Attributes:
        mllm: a model's folder, which every machine of a cluster must see.
        sam2: a checkpoint; None leaves out the tracking stage.
        device, dtype, sam2_dtype: as the command has them, "auto" included, decided where the worker is.
        memory_budget: bytes of GPU memory; None for all.
        threads: of PyTorch on the CPU; None as PyTorch decides. On a CPU, results are equal to the bit for an equal number alone.
    """

    mllm: Path
    sam2: Path | None
    device: str = "auto"
    dtype: str = "auto"
    sam2_dtype: str = "auto"
    memory_budget: int | None = None
    threads: int | None = None

    def load(self, report: Report) -> tuple[MLLM, SAM2 | None]:
        """DecafError for a model that cannot be loaded."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = choose_device(self.device)
        sam2 = None
        if self.sam2 is not None:  # first: a wrong file is reported before the language model takes its minutes
            dtype = chosen_dtype(self.sam2_dtype, mixed_dtype(device))
            sam2 = load_segmenter(self.sam2, device=device, dtype=dtype, progress=report)
        dtype = chosen_dtype(self.dtype, language_dtype(device, stored_dtype(self.mllm)))
        return load_mllm(self.mllm, device=device, dtype=dtype, memory_budget=self.memory_budget, progress=report), sam2


def clip_worker(models: Models, writer: Writer) -> Callable[[], ClipWorker]:
    """The `make_worker` of `run_jobs` for jobs whose payload is a `ClipJob`."""
    return partial(_load, models, writer)


def _load(models: Models, writer: Writer) -> ClipWorker:
    return ClipWorker(*models.load(Report()), writer, memory_budget=models.memory_budget)


class ClipWorker:
    """Does jobs whose payload is a `ClipJob`, with models that are loaded.

    The record of a job: {"asks": {key: the writer's record, or {"error": why it failed}}, "seconds": wall time by stage, "counts": work by name}. It
    has those of `ClipJob.left`. A clip that cannot be opened, or asked about, fails as a whole (DecafError).
    """

    def __init__(self, mllm: MLLM, sam2: SAM2 | None, writer: Writer, *, memory_budget: int | None = None):
        self.report = Report()
        self._mllm, self._sam2, self._writer, self._budget = mllm, sam2, writer, memory_budget
        self._coming: dict[str, _Opening] = {}

    def ahead(self, job: Job) -> None:
        """Begins to open the clip of the job that is probably the next, while this one is at work. What goes wrong is told when its turn comes."""
        self._coming[job.key] = _Opening(job)

    def __call__(self, job: Job) -> dict:
        payload: ClipJob = job.payload
        report = Report(self.report.progress)
        with report.stage("open clip"):
            clip = self._open(job, report)
        try:
            records = self._all(payload, clip, report)
        finally:
            clip.close()
        return {
            "asks": {ask.key: records[ask.key] for ask in payload.asks if ask.key in records},
            "seconds": {name: round(spent, 4) for name, spent in report.seconds.items()},
            "counts": dict(report.counts),
        }

    def _open(self, job: Job, report: Report) -> Clip:
        coming = self._coming.pop(job.key, None)
        for key in [*self._coming][:-1]:  # another worker has taken that job
            self._coming.pop(key).forget()
        return coming.clip(report) if coming is not None else job.payload.open(report)

    def _all(self, payload: ClipJob, clip: Clip, report: Report) -> dict[str, dict]:
        queries, records = _clean(payload)
        left = {ask.key for ask in payload.asks if payload.left is None or ask.key in payload.left}
        groups: dict[AttentionSettings, list[Ask]] = {}
        for ask in payload.asks:
            if ask.key in queries:
                groups.setdefault(payload.attention_of(ask), []).append(ask)
        features = feature_cache(self._sam2, shared=len(left) > 1, budget=self._budget) if self._sam2 is not None else None
        for settings, asks in groups.items():
            wanted = [ask for ask in asks if ask.key in left]
            if not wanted:
                continue
            try:
                attentions = self._attentions(payload, settings, clip, [queries[ask.key] for ask in asks], report)
            except DecafError as error:
                if len(groups) == 1:  # the clip as a whole
                    raise
                records |= {ask.key: {"error": str(error)} for ask in wanted}
                continue
            for ask in wanted:
                query = queries[ask.key]
                attention = tuple(replace(one, name=query.name) for one in attentions[query])
                records[ask.key] = self._finish(payload, ask, clip, attention, features, report)
        return {key: record for key, record in records.items() if key in left}

    def _attentions(
        self, payload: ClipJob, settings: AttentionSettings, clip: Clip, queries: list[Query], report: Report
    ) -> dict[str, tuple[Attention, Attention]]:
        """By query; those that are asked twice are asked once."""
        # Without their names, which need not be unique here: each query has a key.
        sentences = [Query(text) for text in dict.fromkeys(map(str, queries))]
        found = extract_attentions(self._mllm, clip, sentences, settings, templates=payload.templates, progress=report)
        return dict(zip(sentences, found, strict=True))

    def _finish(
        self,
        payload: ClipJob,
        ask: Ask,
        clip: Clip,
        attention: tuple[Attention, Attention],
        features: FeatureCache | None,
        report: Report,
    ) -> dict:
        try:
            masked = self._mask(payload, ask, clip, attention, features, report)
            with report.stage("write"):
                return self._writer(ask, clip, masked, report)
        except OutputError:
            raise
        except DecafError as error:
            return {"error": str(error)}
        except Exception as error:
            if report.cancelled_by(error):
                raise
            log.warning("Query %s met an unexpected error.", ask.key, exc_info=error)
            return {"error": f"Unexpected {type(error).__name__}: {reason(error)}. Please report this, with the log."}

    def _mask(self, payload: ClipJob, ask: Ask, clip: Clip, attention, features: FeatureCache | None, report: Report) -> Masked:
        tracking = ask.tracking or payload.tracking
        if self._sam2 is not None:
            given = {"points": ask.points or payload.points, "fusion": payload.fusion, "features": features}
            result = segment_attention(self._sam2, clip, attention, tracking=tracking, progress=report, **given)
            compared = None
            if payload.compared is not None:  # not in the report, whose counts and seconds are those of one method
                quiet = Report(report.progress)
                compared = segment_attention(self._sam2, clip, attention, tracking=payload.compared, progress=quiet, **given)
            return Masked(attention, result.fused, result, compared)
        with report.stage("fusion"):
            _, fused = fused_attention(attention, payload.fusion, method=tracking.method)
        return Masked(attention, fused, None)


class _Opening:
    """A clip that is being opened by a thread, which no end of the program waits for."""

    def __init__(self, job: Job):
        self.key = job.key
        self._opened: Clip | None = None
        self._error: BaseException | None = None
        self._unwanted = False
        self._thread = threading.Thread(target=self._open, args=(job.payload,), daemon=True, name="decaf-opening")
        self._thread.start()

    def _open(self, payload: ClipJob) -> None:
        try:
            self._opened = payload.open(Report(self._step))
        except BaseException as error:
            self._error = error

    def _step(self, done: int, total: int, what: str) -> None:
        if self._unwanted:
            raise DecafError("The clip is no longer wanted.")

    def clip(self, report: Report) -> Clip:
        """Waits for it. Raises what opening has raised, or what `report` does."""
        while self._thread.is_alive():
            self._thread.join(_BETWEEN_CHECKS)
            report.check_cancelled()
        if self._error is not None:
            raise self._error
        return self._opened

    def forget(self) -> None:
        self._unwanted = True


_BETWEEN_CHECKS = 0.2


def _clean(payload: ClipJob) -> tuple[dict[str, Query], dict[str, dict]]:
    """The queries that can be asked, and the records of the others, by their keys."""
    queries, failed, templates = {}, {}, payload.templates or Templates()
    for ask in payload.asks:
        settings = payload.attention_of(ask)
        try:
            query = clean_query(ask.query)
            templates.check([query], settings.setting)
            if settings.not_this is not None:
                clean_not_this(settings.not_this, [query])
            queries[ask.key] = query
        except DecafError as error:
            failed[ask.key] = {"error": str(error)}
    return queries, failed
