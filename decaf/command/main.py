"""The command `decaf`. Nothing heavy is imported before there is something to compute, so that `decaf --help` answers at once."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from .. import __version__
from ..attention.questions import Templates
from ..errors import DecafError, reason, shown
from ..paths import look_at
from ..settings import CUT_OUTS, DETAILS, STYLES, AttentionSettings, PointSettings, TrackingSettings
from .arguments import DETAIL_HELP, refine_settings, size_in_bytes, stage_settings
from .demo import add_demo
from .gallery import add_gallery
from .terminal import progress_bars, say

log = logging.getLogger(__name__)

_EXAMPLES = """\
examples:
  decaf segment dog.mp4 --query "the dog that gets the ball first" --mllm ~/models/Qwen2.5-VL-7B-Instruct \\
      --sam2 ~/models/sam2_hiera_large.pt --out dog
  decaf segment frames/ --query "the leftmost cup" --mllm OpenGVLab/InternVL3-8B-hf --sam2 sam2.1_hiera_small.safetensors \\
      --out cup --objects --resume
"""

_WRITES = """\
Writes into the folder --out:
  masks/00000.png ...    one mask per frame, all objects together: 255 inside, 0 outside; between at soft edges (--refine)
  objects/0/00000.png .. one folder per object (with --objects)
  cut-out.mov            the objects with alpha and the clip's sound (with --cut-out mov; or .webm, or a folder of pictures)
  cut-out-0.mov ...      the same of each object by itself (with --cut-out and --objects)
  overlay.mp4            the clip with the objects in a spotlight (without --no-overlay)
  attention.png          key frames with attention, coarse mask, points and final mask
  result.json            settings, seconds per stage, memory per step, counts, scores of each object
  attention.safetensors  the attention maps; with --resume the language model is not asked again
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Paragraphs as written, defaults shown where there are any."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=min(120, int(os.environ.get("COLUMNS", 120))))

    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if shown else action.help


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """A value of thousands of characters is not repeated as a whole."""
        super().error(message if len(message) <= 300 else f"{message[:200]}...{message[-60:]}")


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="decaf",
        formatter_class=_Help,
        description="Mask what a sentence means in a video: the attention of a multimodal language model, tracked with SAM 2.",
        epilog=_EXAMPLES,
    )
    top.add_argument("--version", action="version", version=f"decaf {__version__}", help="show the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    segment = commands.add_parser(
        "segment",
        formatter_class=_Help,
        help="clip and query in, a mask for every frame out",
        description="Masks in every frame of CLIP what the query means.\n\n" + _WRITES,
        epilog=_EXAMPLES,
    )
    segment.set_defaults(run=_segment)
    segment.add_argument("clip", metavar="CLIP", type=Path, help="video file, folder of images (in the order of their names), or one image")

    needed = segment.add_argument_group("required")
    needed.add_argument(
        "--query", required=True, metavar="TEXT", dest="queries", action="append",
        help="what to mask, in any language the model knows; given again, or with several lines, each query gets its own folder "
        "query-1, query-2, ... in --out, or query-ball for \"ball: the ball he throws\", and the model looks at the clip once for all of them",
    )  # fmt: skip
    needed.add_argument(
        "--mllm", required=True, metavar="DIR_OR_REPO",
        help="folder of a model of Qwen2-VL to Qwen3-VL, InternVL3, GLM-4.1V, LLaVA-OneVision or SmolVLM2, or its repository id, which is "
        "downloaded if it is not there "
        'yet; "bundled" is the tiny model of "decaf demo"',
    )  # fmt: skip
    needed.add_argument(
        "--sam2", required=True, metavar="FILE", type=Path,
        help='SAM 2 or 2.1 checkpoint of any size, .pt or .safetensors; "bundled" is the tiny one of "decaf demo"',
    )  # fmt: skip
    needed.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for the results; earlier results in it are replaced")

    questions = segment.add_argument_group("questions")
    questions.add_argument(
        "--not", metavar="TEXT", dest="not_this",
        help="what must not be masked, in words of its own: what the model looks at for this more than for the query is left out; one for all "
        "queries, in the same passes of the model",
    )  # fmt: skip
    questions.add_argument(
        "--setting", choices=("expression", "class-name"), default=AttentionSettings.setting,
        help="what the background question leaves out: what the whole expression refers to (nothing is generated), "
        "or a class name that the model is asked for first",
    )  # fmt: skip
    questions.add_argument("--object-question", metavar="TEXT", help="wording of the object question; must contain {query}")
    questions.add_argument(
        "--background-question", metavar="TEXT",
        help="wording of the background question; must contain {query}, or {object} in the setting class-name",
    )  # fmt: skip
    questions.add_argument("--questions", metavar="FILE", type=Path, help=f"JSON object with any of {', '.join(_templates())}")

    attention = segment.add_argument_group("attention")
    attention.add_argument(
        "--max-key-frames", metavar="N", type=int, default=AttentionSettings.max_key_frames,
        help="frames that the language model sees, evenly spread",
    )  # fmt: skip
    attention.add_argument(
        "--key-frames", metavar="N,N,...",
        help="these frames instead, counted from 0, for example 0,12,40; --max-key-frames then does not count",
    )  # fmt: skip
    attention.add_argument(
        "--first", metavar="N", type=int, default=AttentionSettings.first_frame, dest="first_frame",
        help="first frame that is asked about and masked, counted from 0; masks before it are empty",
    )  # fmt: skip
    attention.add_argument("--last", metavar="N", type=int, dest="last_frame", help="last such frame, itself included (default: the clip's last one)")
    attention.add_argument(
        "--tokens-per-frame", metavar="N", type=int, default=AttentionSettings.tokens_per_frame,
        help="visual tokens per frame when asked as a video, at most"
    )
    attention.add_argument(
        "--start-layer", metavar="N", type=int, help="first layer of the rollout, counted from 0 (default: half of the layers)"
    )

    attention.add_argument("--detail", choices=DETAILS, default=AttentionSettings.detail, help=DETAIL_HELP)

    masks = segment.add_argument_group("masks")
    masks.add_argument(
        "--point-threshold", metavar="X", type=float, default=PointSettings.point_threshold,
        help="attention from which a cell becomes a point, 0 to 1"
    )
    masks.add_argument(
        "--presence-threshold", metavar="X", type=float, default=PointSettings.presence_threshold,
        help='the model\'s "yes" against "no", 0 to 1, to whether the clip shows the object; below this the masks are empty. '
        "0: always mask the best match",
    )  # fmt: skip
    masks.add_argument(
        "--score-threshold", metavar="X", type=float, default=TrackingSettings.score_threshold, help="score above which an object is kept"
    )
    masks.add_argument("--max-tracks", metavar="N", type=int, help="most objects to keep, those of the highest scores (default: all)")

    masks.add_argument(
        "--refine", metavar="WHAT=N,...",
        help="finish the masks, for example grow=2,feather=3: border (pixels), holes, specks (area in pixels), smooth (frames before and "
        "after), shortest (frames), grow (pixels, negative shrinks), feather (pixels); done in this order, 0 leaves a step out",
    )  # fmt: skip

    compute = segment.add_argument_group("computation")
    compute.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where both models run")
    compute.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the language model's weights; auto is bfloat16, but on a CPU float32 unless that has AMX and the weights are stored so",
    )  # fmt: skip
    compute.add_argument(
        "--memory-budget", metavar="SIZE", type=size_in_bytes,
        help="GPU memory that may be taken, such as 10GB; weights that do not fit wait in the computer's memory and come layer by layer",
    )  # fmt: skip
    compute.add_argument(
        "--sam2-dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="in which SAM 2 computes; auto is bfloat16 on a GPU that has it, as SAM 2 was trained, else float32",
    )  # fmt: skip

    output = segment.add_argument_group("output")
    output.add_argument("--objects", action="store_true", help="also write the masks of each object by itself, and its cut-out")
    output.add_argument(
        "--style", choices=tuple(STYLES), default="spotlight",
        help="how overlay.mp4 shows the objects: " + "; ".join(f"{name}: {what}" for name, what in STYLES.items()),
    )  # fmt: skip
    output.add_argument(
        "--cut-out", choices=tuple(CUT_OUTS),
        help="also write the objects cut out, with alpha and the clip's sound; " + "; ".join(f"{name}: {what}" for name, what in CUT_OUTS.items()),
    )  # fmt: skip
    output.add_argument("--no-overlay", action="store_true", help="write no overlay.mp4")
    output.add_argument(
        "--resume", action="store_true", help="go on from an earlier run into the same folder; a finished one is left as it is"
    )
    output.add_argument(
        "--verbose",
        action="store_true",
        help="instead of progress bars, a line every ten seconds with what is done and, on Linux, the memory held",
    )
    output.add_argument(
        "--quiet", action="store_true", help="no progress bars, no closing summary; errors, and that nothing was found, are still printed"
    )
    add_demo(commands, _Help)
    add_gallery(commands, _Help)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, 2 for an error that the user can act on, 130 when stopped with Ctrl-C, 143 when asked to end."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        with _polite_kill():
            return arguments.run(arguments)
    except DecafError as error:
        say(sys.stderr, f"decaf: {error}")
        return 2
    except KeyboardInterrupt as stop:
        again = f" Run the same command with --resume to go on in {arguments.out}." if hasattr(arguments, "resume") else ""
        say(sys.stderr, f"decaf: stopped.{again}")
        return 143 if isinstance(stop, _Terminated) else 130


@contextmanager
def _polite_kill() -> Iterator[None]:
    """Within it, a polite kill unwinds like Ctrl-C does, so that no temporary file stays behind. Only the main thread can see to that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


class _Terminated(KeyboardInterrupt):
    pass


def _terminate(number, frame):
    raise _Terminated


def _templates() -> list[str]:
    return [one.name for one in fields(Templates)]


def _questions(arguments) -> Templates:
    """The question templates: ours, changed by the file, changed by the options."""
    changed = _questions_file(arguments.questions) if arguments.questions is not None else {}
    if arguments.object_question is not None:
        changed["object"] = arguments.object_question
    if arguments.background_question is not None:
        changed["background" if arguments.setting == "expression" else "class_background"] = arguments.background_question
    return Templates(**changed)


_LARGEST_QUESTIONS = 1 << 20


def _questions_file(path: Path) -> dict[str, str]:
    named = f"--questions {shown(path)}"
    kind = look_at(path, "--questions")
    if kind != "file":
        raise DecafError(f"{named} " + ("is a folder. Give the JSON file in it." if kind else "does not exist. Check the path."))
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_QUESTIONS + 1)
        if len(content) > _LARGEST_QUESTIONS:
            raise DecafError(f"{named} is larger than 1 MB. Give a JSON file of a few questions.")
        changed = json.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise DecafError(f"{named} cannot be read ({reason(error)}). Change its permissions or give another file.") from error
    except RecursionError as error:
        raise DecafError(f"{named} is nested too deeply. It must hold one JSON object of texts.") from error
    except DecafError:
        raise
    except ValueError as error:
        raise DecafError(f'{named} is not JSON: {error}. Write an object like {{"object": "{{query}} ..."}}.') from error
    if not isinstance(changed, dict) or not all(isinstance(text, str) for text in changed.values()):
        raise DecafError(f"{named} must hold one JSON object of texts, with any of {', '.join(_templates())}.")
    unknown = sorted(set(changed) - set(_templates()))
    if unknown:
        listed = ", ".join(name[:40] for name in unknown[:5]) + ", ..." * (len(unknown) > 5)
        raise DecafError(f"{named} has {listed}; known are {', '.join(_templates())}.")
    return changed


def _segment(arguments) -> int:
    templates = _questions(arguments)
    from . import segment as command

    options = {one.name: getattr(arguments, one.name) for one in fields(command.Options) if hasattr(arguments, one.name)}
    options |= {
        "queries": tuple(arguments.queries),
        "templates": templates,
        "overlay": not arguments.no_overlay,
        "refine": refine_settings(arguments.refine),
        **stage_settings(arguments),
    }
    logging.getLogger(__package__.rpartition(".")[0]).setLevel(logging.INFO if arguments.verbose else logging.NOTSET)
    with progress_bars(arguments.quiet or arguments.verbose) as progress:
        outcome = command.run(command.Options(**options), progress)
    if not arguments.quiet:
        say(sys.stdout, outcome.summary)
    else:  # masks that are empty must not go unnoticed
        for warning in outcome.warnings:
            say(sys.stderr, f"decaf: {warning}")
    return 0
