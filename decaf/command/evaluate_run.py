"""What `decaf evaluate` does: read, check, ask, put together."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ..attention.questions import Templates
from ..bulk.clip_worker import Models, clip_worker
from ..bulk.run_folder import RUN
from ..demo import BUNDLED
from ..errors import DecafError, OutputError, reason, shown
from ..evaluation.datasets import Dataset, Frames, Item, part, read_dataset
from ..evaluation.datasets import scenes as scene_set
from ..evaluation.evaluate import scene_figures
from ..evaluation.outcome import Evaluation
from ..evaluation.run import Method, Records, ask_items, merged, run_settings
from ..evaluation.samples import model_stamps
from ..evaluation.scoring import COARSE, MASKS, ItemWriter
from ..finishing.refine import check_refine
from ..paths import look_at, real_path
from ..report import Progress
from ..settings import FusionSettings, RefineSettings
from .demo import tables
from .options import check_models, check_stages, check_start_layer, sam2_file
from .segment import mllm_folder

_MOST_LISTED = 200


def read(arguments) -> Dataset:
    """The set that the options name. DecafError if it is not there."""
    if arguments.dataset == scene_set.NAME:
        return scene_set.read(arguments.clips, arguments.seed, arguments.frames, hard=arguments.scenes == "hard")
    return read_dataset(arguments.dataset, arguments.root, arguments.split)


def check(dataset: Dataset, arguments) -> tuple[str, bool]:
    """What --dry-run says of a set's files, and whether all is well."""
    items = part(dataset.items, arguments.limit, arguments.shard)
    problems = [f"{item.name}: {problem}" for item, problem in _looked_through(items)]
    lines = [f"{dataset.title} {dataset.split}: {len({item.video for item in items})} clips, {len(items)} queries."]
    tags = Counter(tag for item in items for tag in item.tags)
    if tags:
        lines.append("Groups: " + ", ".join(f"{tag} {count}" for tag, count in tags.items()) + ".")
    if dataset.hidden:
        lines.append("A server has the truth: there will be a file for it, and no figures.")
    lines += dataset.notes
    if problems:
        how = "count as 0" if dataset.counts_missing else "are left out"
        lines.append(f"{len(problems)} queries cannot be asked or scored, and {how}:")
        lines += [f"  {problem}" for problem in problems[:_MOST_LISTED]]
        if len(problems) > _MOST_LISTED:
            lines.append(f"  and {len(problems) - _MOST_LISTED} more.")
    else:
        lines.append("Nothing is missing.")
    return "\n".join(lines), not problems


def _looked_through(items: Sequence[Item]):
    """Items with what is wrong with them; pictures are looked into as far as their size."""
    sizes: dict[object, tuple[int, int] | str] = {}
    for item in items:
        if item.problem or not isinstance(item.clip, Frames):
            if item.problem:
                yield item, item.problem
            continue
        if item.clip not in sizes:
            sizes[item.clip] = _size(item.clip)
        size = sizes[item.clip]
        problem = size if isinstance(size, str) else item.truth.problem(len(item.clip.files), size) if item.truth is not None else ""
        if problem:
            yield item, problem


def _size(frames: Frames) -> tuple[int, int] | str:
    """(height, width) of a clip's frames, or what is wrong with them."""
    found = {}
    for file in frames.files:
        try:
            with Image.open(file) as image:
                found.setdefault((image.height, image.width), file)
        except (OSError, ValueError, SyntaxError) as error:
            return f"Its frame {shown(file)} cannot be read ({reason(error)})."
    if len(found) > 1:
        (one, file), (other, second) = list(found.items())[:2]
        return f"Its frames have different sizes: {file.name} is {one[1]}x{one[0]}, {second.name} {other[1]}x{other[0]}."
    return next(iter(found))


def method_of(arguments, stages: dict, fusion: FusionSettings, templates: Templates) -> Method:
    """DecafError for a setting that cannot be."""
    check_stages(stages["attention"], stages["points"], stages["tracking"])
    attention = replace(stages["attention"], v_max=not arguments.no_v_max)
    tracking = replace(stages["tracking"], consistency=not arguments.no_consistency)
    return Method(attention, stages["points"], tracking, fusion, templates, arguments.compare)


def run(dataset: Dataset, arguments, method: Method, refine: RefineSettings, progress: Progress) -> Evaluation:
    """Asks the set, or the part of it that is wanted. DecafError for what stops everything."""
    items = part(dataset.items, arguments.limit, arguments.shard)
    if items and all(item.problem for item in items):
        raise DecafError(f"None of the {len(items)} queries can be asked. {items[0].name}: {items[0].problem} --dry-run lists them all.")
    check_refine(refine)
    checkpoint = None if arguments.no_tracking else sam2_file(arguments.sam2)
    check_models(arguments.mllm, checkpoint) if checkpoint is not None else look_at(os.path.expanduser(arguments.mllm), "--mllm")
    _check_apart(arguments.root, arguments.out)
    folder = mllm_folder(arguments.mllm, progress)
    check_start_layer(method.attention.start_layer, folder)
    models = Models(
        folder, checkpoint, arguments.device, arguments.dtype, arguments.sam2_dtype, arguments.memory_budget, arguments.threads
    )  # fmt: skip
    stamps = model_stamps(folder, checkpoint) | {"dtype": arguments.dtype, "sam2_dtype": arguments.sam2_dtype}
    settings = run_settings(dataset, method, stamps)
    if refine != RefineSettings():
        settings["refine"] = vars(refine)
    said: list[str] = []
    records = ask_items(
        dataset, items, method, clip_worker(models, ItemWriter(arguments.out, method.compare, refine)),
        folder=arguments.out, settings=settings, resume=arguments.resume, report=progress,
        workers=arguments.workers, gpus_per_worker=arguments.gpus_per_worker, address=arguments.address, tell=said.append,
    )  # fmt: skip
    model = _model_name(arguments.mllm, folder)
    return Evaluation(dataset, records.rows(dataset.items), settings, model, records.seconds, records.counts, tuple(said))


def merge(dataset: Dataset, arguments) -> Evaluation:
    """Puts the records and masks of several runs together in --out. DecafError: they were made with different settings, or of another set."""
    settings = None
    for folder in arguments.merge:
        one = _settings(folder)
        if settings is not None and one != settings:
            raise DecafError(f"--merge {shown(folder)} was made with other settings than {shown(arguments.merge[0])}. Put equal ones together.")
        settings = one
    known = run_settings(dataset, Method(), {})
    if any(settings.get(name) != known[name] for name in ("dataset", "split", "items", "queries")):
        raise DecafError(f"--merge {shown(arguments.merge[0])} holds results of another set than {dataset.title} {dataset.split} in --root.")
    records = merged(dataset, arguments.merge, arguments.out, settings)
    try:
        for folder in arguments.merge:
            for name in (MASKS, COARSE):
                if (folder / name).is_dir() and real_path(folder) != real_path(arguments.out):
                    shutil.copytree(folder / name, arguments.out / name, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise OutputError(f"--out {shown(arguments.out)} cannot be written to ({reason(error)}). Free space, or give another folder.") from error
    return Evaluation(dataset, records.rows(dataset.items), settings, settings["mllm"]["name"], records.seconds, records.counts)


def _settings(folder: Path) -> dict:
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("mllm"), dict) and "name" in found["mllm"]:
            return found
    except (OSError, ValueError, RecursionError):
        pass
    raise DecafError(f"{shown(folder)} holds no results of decaf evaluate. Give the --out of such a run.")


def summary(found: Evaluation, written: Sequence[Path]) -> str:
    """What is printed at the end."""
    lines = [found.table()]
    if found.dataset.name == scene_set.NAME and found.rows:
        setting = found.settings["attention"]["setting"]
        records = Records({}, found.seconds, found.counts)
        lines += ["", tables(scene_figures({setting: (found.rows, records)}))]
    return "\n".join([*lines, "", "Written: " + ", ".join(map(str, written))])


def _check_apart(root: Path | None, out: Path) -> None:
    if root is not None and (real_path(out) == real_path(root) or real_path(root) in real_path(out).parents):
        raise DecafError(f"--out {shown(out)} lies in --root: results would mix with the benchmark's files. Give a folder outside.")


def _model_name(given: str, folder: Path) -> str:
    """As people call it: a folder's name, or that of the repository that it was downloaded from."""
    if given == BUNDLED:
        return given
    return given.rstrip("/").rpartition("/")[2] if folder.name.startswith(("snapshot", "models--")) or len(folder.name) == 40 else folder.name
