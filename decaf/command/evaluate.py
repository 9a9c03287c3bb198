"""`decaf evaluate`: the benchmarks of the paper, or made-up scenes, asked and scored."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ..demo import BUNDLED
from ..errors import DecafError
from ..settings import MAPS
from .arguments import fusion_settings, refine_settings, stage_settings
from .batch import add_workers, check_workers
from .shared_options import add_computation, add_models, add_stages, read_templates

DATASETS = ("ref-davis17", "mevis", "revos", "reasonvos", "ref-youtube-vos", "scenes")

_DESCRIPTION = """\
Asks every query of a benchmark and compares the masks with the true ones: J, F and J&F of the tracked masks, and of those that attention
gives without tracking (coarse), in the benchmark's own groups, beside the paper's. Of sets whose truth a server has: the file for it.

Writes into the folder --out:
  results.json, results.md    figures, each query's figures, and what is missing
  masks/CLIP/QUERY/FRAME.png  the tracked masks: 255 inside, 0 outside
  coarse/CLIP/QUERY/FRAME.png those without tracking, of the key frames
  submission.zip              for the server (mevis valid, ref-youtube-vos valid)
  run.json, records/          what a later run goes on from, with --resume
"""

_EXAMPLES = """\
examples:
  decaf evaluate --dataset mevis --root ~/data/MeViS --mllm Qwen/Qwen2.5-VL-7B-Instruct --sam2 ~/models/sam2_hiera_large.pt --out mevis
  decaf evaluate --dataset revos --root ~/data/ReVOS --dry-run
  decaf evaluate --dataset reasonvos --root ~/data/ReasonVOS --mllm ~/models/InternVL3-8B-hf --sam2 ~/models/sam2_hiera_large.pt \\
      --out half-0 --shard 0/2
  decaf evaluate --dataset reasonvos --root ~/data/ReasonVOS --merge half-0 half-1 --out whole
  decaf evaluate --dataset scenes --clips 200 --out scenes
"""


def add_evaluate(commands, formatter) -> None:
    """Adds the subcommand to `commands`, what `add_subparsers` returned."""
    evaluate = commands.add_parser(
        "evaluate", formatter_class=formatter, help="figures on the benchmarks of the paper", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    evaluate.set_defaults(run=_evaluate)
    needed = evaluate.add_argument_group("required")
    needed.add_argument("--dataset", required=True, choices=DATASETS, help="which benchmark; scenes are made up, and need no files")
    needed.add_argument("--root", metavar="DIR", type=Path, help="folder that it was unpacked into; not for scenes")
    add_models(needed, required=False)
    needed.add_argument("--out", metavar="DIR", type=Path, help="folder for the results; not with --dry-run")

    which = evaluate.add_argument_group("which queries")
    which.add_argument("--split", metavar="NAME", help="of the benchmark (default: valid; of mevis valid_u, and reasonvos has one alone)")
    which.add_argument("--limit", metavar="N", type=int, help="the first N queries alone; more can follow with --resume")
    which.add_argument(
        "--shard", metavar="I/N", type=_shard,
        help="part I, counted from 0, of N parts of the clips: for runs on several machines, each with an --out of its own, put together by "
        "--merge; or one after the other into the same --out with --resume",
    )  # fmt: skip
    which.add_argument("--merge", metavar="DIR", type=Path, nargs="+", help="ask nothing: put the results of these runs together in --out")
    which.add_argument("--resume", action="store_true", help="go on from an earlier run into --out; what failed is tried again")
    which.add_argument("--dry-run", action="store_true", help="check the files of the benchmark, say what is missing or damaged, and stop")
    which.add_argument("--scenes", choices=("usual", "hard"), default="usual", help='which made-up clips, as for "decaf demo"')
    which.add_argument("--clips", metavar="N", type=int, default=20, help="how many made-up clips")
    which.add_argument("--seed", metavar="N", type=int, default=900000, help="of the first made-up clip; the others have those after it")
    which.add_argument("--frames", metavar="N", type=int, help="length of made-up clips (default: 8; hard ones draw it)")

    ablations = evaluate.add_argument_group("parts left out, as in the paper's ablations")
    ablations.add_argument("--no-contrast", action="store_true", help="the background question's attention is not subtracted")
    ablations.add_argument("--maps", choices=MAPS, default=MAPS[0], help="of the clip as a video, of single frames, or both")
    ablations.add_argument("--no-v-max", action="store_true", help="all heads of the model count alike in the rollout")
    ablations.add_argument("--no-consistency", action="store_true", help="objects are judged by the attention at their point alone")
    ablations.add_argument("--no-tracking", action="store_true", help="coarse masks of the key frames alone, without SAM 2")
    ablations.add_argument(
        "--published-questions", action="store_true",
        help="ask for what the paper's questions ask for, in words of our own: the main object, which answers then name for the background question "
        "(setting class-name). --questions gives the very wording",
    )  # fmt: skip
    ablations.add_argument(
        "--as-published", action="store_true", help="the paper's method: --method as-published --presence-threshold 0 --published-questions"
    )
    ablations.add_argument(
        "--compare", action="store_true",
        help="also mask by the published rule from the same attention, and measure the maps before fusion (scenes: always)",
    )  # fmt: skip
    add_stages(evaluate)
    workers = evaluate.add_argument_group("workers")
    add_workers(workers)
    add_computation(evaluate)
    evaluate.add_argument("--verbose", action="store_true", help="a line for each step of the library instead of progress bars")
    evaluate.add_argument("--quiet", action="store_true", help="no progress bars and no table; what is missing, or goes wrong, is still printed")


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()) or not int(number) < int(count) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no part; give one such as 0/4, with the first number below the second")
    return int(number), int(count)


def _evaluate(arguments: argparse.Namespace) -> int:
    _check(arguments)
    from . import evaluate_run as command
    from .terminal import progress_bars, say

    dataset = command.read(arguments)
    if arguments.dry_run:
        report, sound = command.check(dataset, arguments)
        say(sys.stdout, report)
        return 0 if sound else 2
    logging.getLogger(__package__.rpartition(".")[0]).setLevel(logging.INFO if arguments.verbose else logging.NOTSET)
    if arguments.merge:
        found = command.merge(dataset, arguments)
    else:
        method = command.method_of(arguments, stage_settings(arguments), fusion_settings(arguments), _templates(arguments))
        with progress_bars(arguments.quiet or arguments.verbose) as progress:
            found = command.run(dataset, arguments, method, refine_settings(arguments.refine), progress)
    written = found.write(arguments.out)
    if arguments.quiet:
        for line in found.warnings:
            say(sys.stderr, f"decaf: {line}")
    else:
        say(sys.stdout, command.summary(found, written))
    return 0


def _templates(arguments):
    if not arguments.published_questions:
        return read_templates(arguments)
    from ..attention.questions import AS_PUBLISHED

    if arguments.questions is not None or arguments.object_question is not None or arguments.background_question is not None:
        raise DecafError("--published-questions and --as-published have questions of their own. Leave out the other options of questions.")
    return AS_PUBLISHED


def _check(arguments: argparse.Namespace) -> None:
    """What is wrong with the options is said before anything is read or loaded."""
    if arguments.dataset == "scenes":
        arguments.mllm = arguments.mllm or BUNDLED
        arguments.sam2 = arguments.sam2 or Path(BUNDLED)
        arguments.compare = True
        if arguments.root is not None:
            raise DecafError("--root has no meaning for scenes, which are made up. Leave it out.")
        if arguments.frames is None and arguments.scenes != "hard":
            arguments.frames = 8
        for name, lowest, highest in (("clips", 1, 1_000_000), ("seed", 0, 2**62), ("frames", 1, 1000)):
            value = getattr(arguments, name)
            if value is not None and not lowest <= value <= highest:
                raise DecafError(f"--{name} {value} is not between {lowest} and {highest}.")
    elif arguments.root is None:
        raise DecafError(f"--root is missing: the folder that {arguments.dataset} was unpacked into.")
    if arguments.as_published:
        arguments.method, arguments.presence_threshold, arguments.published_questions = "as-published", 0.0, True
    if arguments.published_questions:
        arguments.setting = "class-name"
    if arguments.limit is not None and arguments.limit < 1:
        raise DecafError(f"--limit {arguments.limit} is below 1. Leave it out for all queries.")
    if arguments.dry_run:
        return
    if arguments.out is None:
        raise DecafError("--out is missing: a folder for the results. Without one there is --dry-run.")
    if arguments.merge:
        return
    if arguments.mllm is None:
        raise DecafError('--mllm is missing: a folder of a model, or "bundled".')
    if arguments.sam2 is None and not arguments.no_tracking:
        raise DecafError("--sam2 is missing: a checkpoint. Without tracking, give --no-tracking.")
    check_workers(arguments)

