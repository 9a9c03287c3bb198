"""The command `decaf`. Nothing heavy is imported before there is something to compute, so that `decaf --help` answers at once."""

from __future__ import annotations

import argparse
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
from ..errors import DecafError
from ..settings import CUT_OUTS, STYLES
from .arguments import refine_settings, stage_settings
from .batch import add_batch
from .demo import add_demo
from .evaluate import add_evaluate
from .gallery import add_gallery
from .shared_options import add_computation, add_models, add_stages, read_templates
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
    add_models(needed)
    needed.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for the results; earlier results in it are replaced")
    add_stages(segment)
    add_computation(segment)

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
    add_batch(commands, _Help)
    add_demo(commands, _Help)
    add_evaluate(commands, _Help)
    add_gallery(commands, _Help)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, 2 for an error that the user can act on, 130 when stopped with Ctrl-C, 143 when asked to end."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    asked_to_end = threading.Event()
    try:
        with _polite_kill(asked_to_end):
            return arguments.run(arguments)
    except DecafError as error:
        say(sys.stderr, f"decaf: {error}")
        return 2
    except KeyboardInterrupt:
        how = getattr(arguments, "again", "Run the same command with --resume to go on" if hasattr(arguments, "resume") else None)
        again = f" {how} in {arguments.out}." if how else ""
        say(sys.stderr, f"decaf: stopped.{again}")
        return 143 if asked_to_end.is_set() else 130


@contextmanager
def _polite_kill(asked_to_end: threading.Event) -> Iterator[None]:
    """Within it, a polite kill sets `asked_to_end` and unwinds like Ctrl-C does, so that no temporary file stays behind. Only the main thread can
    see to that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number, frame):
        asked_to_end.set()  # an exception of our own would not tell: Ray raises a plain KeyboardInterrupt in its place
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _segment(arguments) -> int:
    templates = read_templates(arguments)
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
