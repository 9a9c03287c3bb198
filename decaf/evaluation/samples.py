"""Evaluation on anybody's own clips: a list of `Sample`, then `evaluate`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..attention.questions import Templates
from ..bulk.clip_worker import ClipWorker, Models, clip_worker
from ..clips import Clip, clip_from_images, open_clip
from ..clips.base import folder_images
from ..demo import BUNDLED, MLLM_FOLDER, SAM2_FILE
from ..errors import DecafError, shown
from ..mllm import MLLM, find_mllm
from ..report import Progress, Report, silent
from ..results.files import stamp
from ..sam2 import SAM2
from ..settings import settings_of
from .datasets.base import Dataset, Item
from .outcome import Evaluation
from .run import Method, ask_items, run_settings
from .scoring import ItemWriter
from .truth import GivenMasks, MaskPictures, Truth


@dataclass(frozen=True)
class Sample:
    """A query about a clip, and what is true.

    Attributes:
        clip: a path as `decaf.open_clip` takes it, a `Clip`, or frames (T, H, W, 3), uint8 or float in 0..1.
        query: the sentence.
        truth: true masks: (T, H, W), bool or numbers that are not 0 inside; or a folder of pictures, not black inside, each called as the frame that
            it belongs to (`00012.png`, or the frame's own name): frames without one are not scored. None: not known.
        tags: groups that it counts in, beside "overall".
        name: what its results are called; None for a number. Letters, digits, ., _ and -; unique among those of the same clip's name.
    """

    clip: str | os.PathLike | Clip | Tensor | np.ndarray
    query: str
    truth: Tensor | np.ndarray | str | os.PathLike | Truth | None = None
    tags: Sequence[str] = ()
    name: str | None = None


def evaluate(
    samples: Iterable[Sample],
    mllm: MLLM | str | os.PathLike,
    sam2: SAM2 | str | os.PathLike | None,
    *,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    title: str = "Samples",
    device: str = "auto",
    workers: int = 1,
    gpus_per_worker: float | None = None,
    address: str | None = None,
    templates: Templates | None = None,
    compare: bool = False,
    progress: Progress | Report = silent,
    **settings,
) -> Evaluation:
    """Asks and scores the samples: J and F of the tracked masks and of the coarse ones, by tag. Samples of the same clip share the work on it.

    Args:
        mllm, sam2: loaded models; or a folder (or a repository id) and a checkpoint, which each worker loads. sam2 None leaves out tracking.
        out: folder for masks, records, `results.json` and `results.md`; None writes nothing.
        resume: goes on with an earlier run into `out`; else `out` must have none.
        title: of the table.
        device: for models that are not loaded yet.
        workers, gpus_per_worker, address: see `decaf.bulk.run.run_jobs`; several workers need models by path.
        templates: question wording; None takes our own.
        compare: also masks by the published rule from the same attention, and measures the maps before fusion.
        progress: callback or `Report`.
        settings: by name, as in `decaf.segment_clip`.

    A sample that fails is listed in the result's remarks and left out of the figures; it stops nothing. Raises DecafError for what stops everything:
    models or folders that cannot be used, settings that cannot be, no samples.
    """
    dataset = dataset_of(samples, title)
    attention, points, tracking, fusion = settings_of(settings)
    method = Method(attention, points, tracking, fusion, templates or Templates(), compare)
    folder = Path(out) if out is not None else None
    writer, loaded = ItemWriter(folder, compare), isinstance(mllm, MLLM)
    if loaded != isinstance(sam2, SAM2) and sam2 is not None:
        raise DecafError("One model is loaded and the other is a path. Give both loaded, or both as paths.")
    if loaded:
        if workers > 1 or address is not None:
            raise DecafError("Workers load models themselves. Give the model's folder and the checkpoint by their paths.")
        names = {"mllm": mllm.name, "sam2": sam2.title if sam2 is not None else None}
        model = mllm.name

        def make_worker() -> ClipWorker:
            return ClipWorker(mllm, sam2, writer)
    else:
        report = Report.of(progress)
        path = MLLM_FOLDER if str(mllm) == BUNDLED else find_mllm(os.fspath(mllm), progress=report)
        checkpoint = None if sam2 is None else SAM2_FILE if str(sam2) == BUNDLED else Path(sam2)
        names, model = model_stamps(path, checkpoint), path.name
        make_worker = clip_worker(Models(path, checkpoint, device), writer)
    known = run_settings(dataset, method, names)
    where = {"workers": workers, "gpus_per_worker": gpus_per_worker, "address": address}
    records = ask_items(dataset, dataset.items, method, make_worker, folder=folder, settings=known, resume=resume, report=progress, **where)
    found = Evaluation(dataset, records.rows(dataset.items), known, model, records.seconds, records.counts)
    if folder is not None:
        found.write(folder)
    return found


def model_stamps(mllm: Path, sam2: Path | None) -> dict:
    """How to recognise the models of a run, on whatever machine they lie."""

    def plain(path: Path) -> dict:
        found = stamp(path)
        return {"name": path.name, "files": found["files"], "bytes": found["bytes"]}

    return {"mllm": plain(mllm), "sam2": plain(sam2) if sam2 is not None else None}


def dataset_of(samples: Iterable[Sample], title: str = "Samples") -> Dataset:
    """The samples as a set. DecafError: there are none, or two have the same name."""
    items, sources = [], {}
    for number, sample in enumerate(samples):
        key = id(sample.clip) if isinstance(sample.clip, Clip | Tensor | np.ndarray) else os.fspath(sample.clip)
        source = sources.setdefault(key, _PathClip(Path(sample.clip)) if isinstance(key, str) else _HeldClip(sample.clip))
        place = list(sources).index(key)
        own = sample.name if sample.name is not None else str(number)
        if not own or not all(letter.isalnum() or letter in "._-" for letter in own) or own.startswith("."):
            raise DecafError(f'The name "{shown(own)}" of a sample is no name of a folder. Use letters, digits, ., _ and -.')
        tags = (sample.tags,) if isinstance(sample.tags, str) else tuple(map(str, sample.tags))
        items.append(Item(f"{source.title(place)}/{own}", source, sample.query, _truth(sample.truth, source), tags))
    if not items:
        raise DecafError("There are no samples to evaluate. Give one or more.")
    names = [item.name for item in items]
    twice = next((name for name in names if names.count(name) > 1), None) if len({*names}) < len(names) else None
    if twice:
        raise DecafError(f'Two samples are called "{twice}". Give each a name of its own, or none.')
    return Dataset("samples", title, "", tuple(items), counts_missing=False)


@dataclass(frozen=True)
class _PathClip:
    path: Path

    def open(self, report: Report) -> Clip:
        return open_clip(self.path, progress=report)

    def frame_names(self, length: int) -> Sequence[str]:
        if self.path.is_dir():
            return [file.stem for file in folder_images(self.path)]
        return [f"{index:05d}" for index in range(length)]

    def title(self, place: int) -> str:
        return f"{place:05d}-" + "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in self.path.stem)[:60]


@dataclass(frozen=True, eq=False)
class _HeldClip:
    clip: Clip | Tensor | np.ndarray

    def open(self, report: Report) -> Clip:
        return self.clip if isinstance(self.clip, Clip) else clip_from_images(torch.as_tensor(self.clip))

    def frame_names(self, length: int) -> Sequence[str]:
        return [f"{index:05d}" for index in range(length)]

    def title(self, place: int) -> str:
        return f"{place:05d}"


def _truth(given, source: _PathClip | _HeldClip) -> Truth | None:
    if isinstance(given, str | os.PathLike):
        return _FolderTruth(Path(given), source)
    return GivenMasks(given) if isinstance(given, Tensor | np.ndarray) else given


@dataclass(frozen=True)
class _FolderTruth:
    """Pictures that belong to the frames by their names or, where frames have none, by their numbers."""

    folder: Path
    source: _PathClip | _HeldClip

    def read(self, length: int, size: tuple[int, int]) -> tuple[list[int], Tensor]:
        return self._pictures(length).read(length, size)

    def problem(self, length: int, size: tuple[int, int]) -> str:
        return self._pictures(length).problem(length, size)

    def _pictures(self, length: int) -> MaskPictures:
        place = {name: index for index, name in enumerate(self.source.frame_names(length))}
        files = {file.stem: file for file in folder_images(self.folder)}
        return MaskPictures({place[name]: file for name, file in files.items() if name in place})
