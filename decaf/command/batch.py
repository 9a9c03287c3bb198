"""`decaf batch`: the options, and what the terminal shows."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..settings import CUT_OUTS, STYLES
from .arguments import refine_settings, stage_settings
from .shared_options import add_computation, add_models, add_stages, read_templates

_DESCRIPTION = """\
Masks many clips: one row of MANIFEST is a clip and what to mask in it.

MANIFEST is CSV with a header, or has a JSON object a line. Columns:
  clip     video file, folder of images, or one image; a relative path starts at the manifest's folder
  query    what to mask; several, one a line of the cell, or as a list in JSON
  id       names the results; left out, it is made of the clip's name and what the row says
  others   options of this row alone, as they are called here: not, setting, max-key-frames, key-frames, key-frames-by, first, last,
           tokens-per-frame, start-layer, detail, single-frames, point-threshold, presence-threshold, score-threshold, method, targets, max-tracks

Writes into the folder --out:
  ID/masks/00000.png ...  and ID/result.json, for each row; with options more, as "decaf segment" does
  report.json             rows done, failed and left, why those failed, and rows a minute
  run.json, records/      what a later run goes on from

Run the same command again to go on after it was stopped: rows that are done stay, others are done, and those that failed are tried again. The
model looks at a clip once for all its rows. A row that fails is told and leaves the others alone.
"""


def add_batch(commands, help_class) -> None:
    batch = commands.add_parser(
        "batch", formatter_class=help_class, help="a list of clips and queries in, masks for each out", description=_DESCRIPTION
    )
    batch.set_defaults(run=_batch, again="Run the same command again to go on")
    batch.add_argument("manifest", metavar="MANIFEST", type=Path, help="list of clips and queries, CSV or JSON lines, in UTF-8")
    needed = batch.add_argument_group("required")
    add_models(needed)
    needed.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for the results and to go on from")
    many = batch.add_argument_group("many rows")
    many.add_argument("--dry-run", action="store_true", help="read the list, look for the clips and models, say what there is to do, and stop")
    add_workers(many)
    output = batch.add_argument_group("output")
    output.add_argument("--no-tracking", action="store_true", help="coarse masks of the key frames alone, from attention, without SAM 2")
    output.add_argument("--objects", action="store_true", help="also write the masks of each object by itself, and its cut-out")
    output.add_argument("--sheet", action="store_true", help="also write attention.png: key frames with attention, points and masks")
    output.add_argument("--overlay", action="store_true", help="also write overlay.mp4")
    output.add_argument("--style", choices=tuple(STYLES), default="spotlight", help="of overlay.mp4")
    output.add_argument("--cut-out", choices=tuple(CUT_OUTS), help="also write the objects cut out, with alpha and the clip's sound")
    output.add_argument("--quiet", action="store_true", help="no progress, no closing summary; what goes wrong is still printed")
    add_stages(batch)
    add_computation(batch)


def add_workers(options) -> None:
    """Adds who does many jobs to a group of options."""
    options.add_argument("--workers", metavar="N", type=int, default=1, help="processes that work at the same time, by Ray; each loads the models")
    options.add_argument(
        "--gpus-per-worker", metavar="X", type=float,
        help="share of a GPU for each worker, such as 1 or 0.5 (default: one whole GPU, if there are GPUs)",
    )  # fmt: skip
    options.add_argument(
        "--address", metavar="HOST:PORT",
        help='of a running Ray cluster to work on, or "auto" for the one of this machine; models, clips and --out must be seen by all of it '
        "under the same paths",
    )  # fmt: skip
    options.add_argument(
        "--threads", metavar="N", type=int,
        help="CPU threads of each process (default: as many as PyTorch takes for one). On a CPU, equal numbers give equal bits",
    )  # fmt: skip


def _batch(arguments: argparse.Namespace) -> int:
    templates, refine = read_templates(arguments), refine_settings(arguments.refine)
    check_workers(arguments)
    from ..results.write import Wanted
    from . import batch_run
    from .manifest import Stages, read_manifest
    from .options import check_stages, layer_count
    from .terminal import say

    given = stage_settings(arguments)
    stages = Stages(given["attention"], given["points"], given["tracking"])

    def check(one: Stages) -> None:
        check_stages(one.attention, one.points, one.tracking)

    check(stages)
    rows = read_manifest(arguments.manifest, stages, check)
    if arguments.dry_run:
        return _dry_run(arguments, rows)
    wanted = Wanted(arguments.objects, arguments.sheet, arguments.overlay, arguments.style, arguments.cut_out)
    with _shown(arguments.quiet) as (progress, tell):
        models = _models(arguments, progress)
        for row in rows:  # before the models are loaded
            _check_layers(row, layer_count(models.mllm))
        settings = batch_run.Settings(models, stages, templates, wanted, refine)
        workers = batch_run.Workers(arguments.workers, arguments.gpus_per_worker, arguments.address)
        batch = batch_run.run(rows, arguments.out, settings, workers, progress, tell)
    if not arguments.quiet:
        say(sys.stdout, _summary(batch, arguments.out))
    return 2 if batch.failed else 0


def check_workers(arguments) -> None:
    from ..errors import DecafError

    if arguments.workers < 1:
        raise DecafError(f"--workers {arguments.workers} is below 1. Give the number of processes, such as 2.")
    if arguments.gpus_per_worker is not None and not 0 <= arguments.gpus_per_worker < float("inf"):
        raise DecafError(f"--gpus-per-worker {arguments.gpus_per_worker:g} is no share of a GPU. Give a number such as 1 or 0.5.")
    if arguments.threads is not None and arguments.threads < 1:
        raise DecafError(f"--threads {arguments.threads} is below 1. Leave it out for the usual number.")


def _check_layers(row, layers: int | None) -> None:
    from ..errors import DecafError

    start = row.stages.attention.start_layer
    if layers is not None and start is not None and start >= layers:
        raise DecafError(f"Line {row.line}: start layer {start} is no layer of the model, which has layers 0 to {layers - 1}.")


def _models(arguments, progress):
    import torch

    from ..bulk.clip_worker import Models
    from ..devices import choose_device
    from ..mllm.streaming import check_budget
    from ..paths import real_path
    from .options import check_models, sam2_file
    from .segment import mllm_folder

    sam2 = sam2_file(arguments.sam2)
    check_models(arguments.mllm, sam2)
    if arguments.address is None:
        check_budget(arguments.memory_budget, choose_device(arguments.device))
    return Models(
        real_path(mllm_folder(arguments.mllm, progress)), None if arguments.no_tracking else real_path(sam2), arguments.device,
        arguments.dtype, arguments.sam2_dtype, arguments.memory_budget, arguments.threads or torch.get_num_threads(),
    )  # fmt: skip


def _dry_run(arguments, rows) -> int:
    from ..bulk.run_folder import RECORDS
    from .batch_run import by_clip, check_apart
    from .options import check_models, sam2_file
    from .terminal import say

    check_models(arguments.mllm, sam2_file(arguments.sam2))
    check_apart(rows, arguments.out)
    missing = [row for row in rows if not row.clip.exists()]
    for row in missing:
        say(sys.stderr, f"decaf: Line {row.line}, {row.id}: CLIP {row.clip} does not exist. Check the path.")
    done = sum((arguments.out / RECORDS / f"{row.id}.json").is_file() for row in rows)
    clips = len({_clip(group) for group in by_clip(rows)})
    told = f"{len(rows)} rows about {clips} clips; {done} are done, {len(rows) - done} are left."
    say(sys.stdout, told + (f" Of {len(missing)} rows the clip is missing." if missing else " Every clip is there."))
    return 2 if missing else 0


def _clip(group) -> Path:
    return group[0].clip


def _summary(batch, out: Path) -> str:
    earlier = f" {batch.earlier} were done earlier." if batch.earlier else ""
    lines = [f"{batch.done} of {batch.rows} rows done.{earlier} Results are in {out}."]
    if batch.again:
        lines.append(f"{len(batch.again)} rows were begun again because a worker had died.")
    if batch.empty:
        lines.append(f"In {len(batch.empty)} of them nothing is masked.")
    if batch.failed:
        lines.append(f"{len(batch.failed)} failed; why is in {out / 'report.json'}. Run the same command again to try them once more.")
    return "\n".join(lines)


_BETWEEN_LINES = 30.0


@contextmanager
def _shown(quiet: bool) -> Iterator[tuple[Callable[[int, int, str], None], Callable[[str], None]]]:
    """(progress, tell): a bar where somebody watches, else a line every now and then; and sentences, printed at once."""
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    from .terminal import say

    transformers_logging.disable_progress_bar()
    logging.getLogger(__package__.rpartition(".")[0]).setLevel(logging.NOTSET)
    meter = _Meter()
    if quiet or not sys.stderr.isatty():
        last = [time.monotonic()]

        def line(done: int, total: int, what: str) -> None:
            if what == meter.step and meter.moved(done, total) and not quiet and time.monotonic() - last[0] >= _BETWEEN_LINES:
                last[0] = time.monotonic()
                say(sys.stderr, f"{done} of {total} rows, {meter.told(done, total)}")

        yield line, lambda sentence: say(sys.stderr, f"decaf: {sentence}")
        return
    with tqdm(total=0, desc="Rows", dynamic_ncols=True, file=sys.stderr, bar_format="{desc} |{bar}| {n_fmt} of {total_fmt}{postfix}") as bar:

        def draw(done: int, total: int, what: str) -> None:
            if what == meter.step and meter.moved(done, total):
                bar.n, bar.total = done, total
                bar.set_postfix_str(meter.told(done, total))

        def tell(sentence: str) -> None:
            bar.clear()
            say(sys.stderr, f"decaf: {sentence}")
            bar.refresh()

        yield draw, tell


class _Meter:
    """How many rows a minute, from the first on that this run has done."""

    step = "Rows"

    def __init__(self):
        self._begin: tuple[float, int] | None = None
        self._last: tuple[int, int] | None = None

    def moved(self, done: int, total: int) -> bool:
        """Whether there is something new."""
        if self._begin is None:
            self._begin = time.monotonic(), done
        moved, self._last = (done, total) != self._last, (done, total)
        return moved

    def told(self, done: int, total: int) -> str:
        """Such as "12.5 a minute, 3 min left"."""
        begin, before = self._begin
        spent = time.monotonic() - begin
        if done <= before or spent <= 0:
            return "loading"
        rate = (done - before) / spent
        return f"{60 * rate:.3g} a minute, {_duration((total - done) / rate)} left"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
