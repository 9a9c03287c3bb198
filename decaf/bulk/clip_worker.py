"""The worker for jobs of one clip with all its queries: the clip is opened once, and its visual work shared."""

from __future__ import annotations

import logging
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
from ..devices import choose_device, language_dtype, mixed_dtype
from ..errors import DecafError, OutputError, reason
from ..mllm import MLLM, load_mllm
from ..mllm.folder import stored_dtype
from ..pipeline import Result, fused_attention, segment_attention
from ..report import Report
from ..sam2 import SAM2, load_sam2
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
    """

    key: str
    query: str
    data: object = None


@dataclass(frozen=True)
class ClipJob:
    """Payload of a job for `ClipWorker`.

    Attributes:
        clip: a path as `open_clip` takes it, or a picklable function that opens the clip, given a `Report`.
        asks: all that is asked about it, with the same settings.
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
            dtype = mixed_dtype(device) if self.sam2_dtype == "auto" else getattr(torch, self.sam2_dtype)
            sam2 = load_sam2(self.sam2, device=device, dtype=dtype)
        dtype = language_dtype(device, stored_dtype(self.mllm)) if self.dtype == "auto" else getattr(torch, self.dtype)
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

    def __call__(self, job: Job) -> dict:
        payload: ClipJob = job.payload
        report = Report(self.report.progress)
        with report.stage("open clip"):
            clip = payload.open(report)
        try:
            asks, found = self._clean(payload)
            attentions = self._ask(payload, clip, asks, report)
            left = {key: ask for key, ask in asks.items() if payload.left is None or key in payload.left}
            features = feature_cache(self._sam2, shared=len(left) > 1, budget=self._budget) if self._sam2 is not None else None
            for key, query in left.items():
                attention = tuple(replace(one, name=query.name) for one in attentions[query])
                found[key] = self._finish(payload, key, clip, attention, features, report)
        finally:
            clip.close()
        order = [ask.key for ask in payload.asks if ask.key in found]
        return {
            "asks": {key: found[key] for key in order},
            "seconds": {name: round(spent, 4) for name, spent in report.seconds.items()},
            "counts": dict(report.counts),
        }

    def _clean(self, payload: ClipJob) -> tuple[dict[str, Query], dict[str, dict]]:
        """The queries that can be asked, by their keys, and the records of the others."""
        asks, failed, templates = {}, {}, payload.templates or Templates()
        for ask in payload.asks:
            try:
                query = clean_query(ask.query)
                templates.check([query], payload.attention.setting)
                if payload.attention.not_this is not None:
                    clean_not_this(payload.attention.not_this, [query])
                asks[ask.key] = query
            except DecafError as error:
                failed[ask.key] = {"error": str(error)}
        if payload.left is not None:
            failed = {key: record for key, record in failed.items() if key in payload.left}
        return asks, failed

    def _ask(self, payload: ClipJob, clip: Clip, asks: dict[str, Query], report: Report) -> dict[Query, tuple[Attention, Attention]]:
        """Attention of each query, those that are asked twice once."""
        # Without their names, which need not be unique here: each query has a key.
        queries = [Query(text) for text in dict.fromkeys(str(query) for query in asks.values())]
        if not queries:
            return {}
        attentions = extract_attentions(self._mllm, clip, queries, payload.attention, templates=payload.templates, progress=report)
        return dict(zip(queries, attentions, strict=True))

    def _finish(
        self, payload: ClipJob, key: str, clip: Clip, attention: tuple[Attention, Attention], features: FeatureCache | None, report: Report
    ) -> dict:
        ask = next(ask for ask in payload.asks if ask.key == key)
        try:
            masked = self._mask(payload, clip, attention, features, report)
            with report.stage("write"):
                return self._writer(ask, clip, masked, report)
        except OutputError:
            raise
        except DecafError as error:
            return {"error": str(error)}
        except Exception as error:
            if self.report.cancelled_by(error) or report.cancelled_by(error):
                raise
            log.warning("Query %s met an unexpected error.", key, exc_info=error)
            return {"error": f"Unexpected {type(error).__name__}: {reason(error)}. Please report this, with the log."}

    def _mask(self, payload: ClipJob, clip: Clip, attention, features: FeatureCache | None, report: Report) -> Masked:
        if self._sam2 is not None:
            given = {"points": payload.points, "fusion": payload.fusion, "features": features}
            result = segment_attention(self._sam2, clip, attention, tracking=payload.tracking, progress=report, **given)
            compared = None
            if payload.compared is not None:  # not in the report, whose counts and seconds are those of one method
                quiet = Report(report.progress)
                compared = segment_attention(self._sam2, clip, attention, tracking=payload.compared, progress=quiet, **given)
            return Masked(attention, result.fused, result, compared)
        with report.stage("fusion"):
            _, fused = fused_attention(attention, payload.fusion, method=payload.tracking.method)
        return Masked(attention, fused, None)
