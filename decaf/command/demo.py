"""`decaf demo`: a synthetic clip through the whole pipeline, and the evaluation on many of them."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ..demo import BUNDLED
from ..settings import DETAILS, PointSettings
from .arguments import DETAIL_HELP, add_method, stage_settings

_DESCRIPTION = """\
Makes a clip of moving shapes, asks for one of them and masks it, with two tiny models that come with the package: no download, no GPU.
They know nothing but such scenes. Writes what "decaf segment" writes, and the clip and its true masks beside it:
  clip/00000.png ...     the frames
  truth/00000.png ...    the true masks
"""

_EXAMPLES = """\
examples:
  decaf demo
  decaf demo --seed 7 --query "the red star" --out star
  decaf demo --evaluate 200 --json figures.json
  decaf demo --evaluate 20 --scenes hard
"""

_SAME = re.compile(r"\b(object|thing|shape)\b")


def add_demo(commands, formatter) -> None:
    """Adds the subcommand to `commands`, what `add_subparsers` returned."""
    demo = commands.add_parser(
        "demo", formatter_class=formatter, help="see it work on a made-up clip, offline", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--seed", metavar="N", type=int, default=4, help="which clip; with --evaluate, the first of them")
    demo.add_argument("--query", metavar="TEXT", help="what to mask (default: a sentence that no noun can replace, where the clip has one)")
    demo.add_argument("--out", metavar="DIR", type=Path, default=Path("decaf-demo"), help="folder for the results")
    demo.add_argument("--frames", metavar="N", type=int, help="length of the clip (default: 10; with --evaluate 8)")
    demo.add_argument("--setting", choices=("expression", "class-name"), default="expression", help='as for "decaf segment"')
    demo.add_argument(
        "--presence-threshold",
        metavar="X",
        type=float,
        default=PointSettings.presence_threshold,
        help='as for "decaf segment"; not with --evaluate',
    )
    demo.add_argument("--detail", choices=DETAILS, default=DETAILS[0], help=DETAIL_HELP)
    add_method(demo)
    demo.add_argument("--mllm", metavar="DIR_OR_REPO", default=BUNDLED, help="another language model")
    demo.add_argument("--sam2", metavar="FILE", type=Path, default=Path(BUNDLED), help="another SAM 2 checkpoint")
    demo.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="cpu", help="where both models run")
    demo.add_argument("--quiet", action="store_true", help="no progress bars, no closing summary")
    many = demo.add_argument_group("evaluation")
    many.add_argument("--evaluate", metavar="N", type=int, help="instead: ask N clips and print figures for each kind of query")
    many.add_argument(
        "--scenes", choices=("usual", "hard"), default="usual",
        help="hard: clips of 24 to 64 frames with doubles, brief visits, an order of events, contact, and two objects in a sentence",
    )  # fmt: skip
    many.add_argument("--json", metavar="FILE", type=Path, help="write the figures of --evaluate and each query's to a file")


def _demo(arguments: argparse.Namespace) -> int:
    from .terminal import progress_bars, say

    _check(arguments)
    with progress_bars(arguments.quiet) as progress:
        summary, warnings = _evaluate(arguments, progress) if arguments.evaluate is not None else _show(arguments, progress)
    if not arguments.quiet:
        say(sys.stdout, summary)
    else:
        for warning in warnings:
            say(sys.stderr, f"decaf: {warning}")
    return 0


_LONGEST = 1000
_MOST = 1_000_000


def _check(arguments) -> None:
    """What is wrong with the options is reported before anything is made or loaded."""
    from ..errors import DecafError, shown
    from ..paths import look_at
    from ..results.files import prepare_folder

    if arguments.seed < 0:
        raise DecafError(f"--seed {arguments.seed} is below 0. Give 0 or more.")
    if arguments.scenes == "hard" and arguments.evaluate is None:
        raise DecafError("--scenes hard is for --evaluate. Give the number of clips to ask with it, such as --evaluate 20.")
    if arguments.frames is None and arguments.scenes != "hard":
        arguments.frames = 10 if arguments.evaluate is None else 8
    if arguments.frames is not None and not 1 <= arguments.frames <= _LONGEST:
        raise DecafError(f"--frames {arguments.frames} is not between 1 and {_LONGEST}. Give a number such as 10.")
    if arguments.evaluate is not None and not 1 <= arguments.evaluate <= _MOST:
        raise DecafError(f"--evaluate {arguments.evaluate} is not between 1 and {_MOST}. Give the number of clips to ask, such as 200.")
    if arguments.json is not None:
        if look_at(arguments.json, "--json") == "folder":
            raise DecafError(f"--json {shown(arguments.json)} is a folder. Give a file in it.")
        prepare_folder(arguments.json.parent, "--json")


def _show(arguments, progress) -> tuple[str, tuple[str, ...]]:
    """The closing summary, and the warnings in it."""
    import torch
    from PIL import Image

    from ..attention.questions import Templates, clean_query
    from ..clips import open_clip
    from ..demo.scenes import make_scene
    from ..files import write_image
    from ..folder_lock import FolderLocks
    from ..results import files as outputs
    from . import segment as command
    from .options import Options, check_options

    scene = make_scene(arguments.seed, length=arguments.frames)
    query = clean_query(arguments.query) if arguments.query is not None else _telling(scene).text
    known = _same_query(scene, query)
    folder = arguments.out
    options = Options(
        clip=folder / "clip", queries=(query,), mllm=arguments.mllm, sam2=arguments.sam2, out=folder, templates=Templates(),
        device=arguments.device, dtype="auto", sam2_dtype="auto", memory_budget=None, objects=False, overlay=True, style="spotlight",
        resume=False, **stage_settings(arguments),
    )  # fmt: skip
    check_options(options)
    outputs.prepare_folder(folder)
    with FolderLocks() as locks:
        locks.take(folder)
        for name in ("clip", "truth"):
            outputs.prepare_folder(folder / name)
            outputs.clear_images(folder / name)
        for index, frame in enumerate(scene.frames):
            write_image(folder / "clip" / f"{index:05d}.png", Image.fromarray(frame))
        if known is not None:
            truth = torch.from_numpy(scene.truth(known))
            outputs.write_masks(folder / "truth", iter(truth), len(truth))
        outcome = command.run(options, progress, locks)
        lines = [f'Clip {arguments.seed}, "{query}"', outcome.summary]
        if known is None:
            lines.append("The truth of this query is not known; of these it is: " + "; ".join(one.text for one in scene.queries) + ".")
        else:
            masks = torch.stack([frame[..., 0] > 127 for frame in _frames(open_clip(folder / outputs.MASKS))])
            lines.append(_score(masks, truth))
            lines.append("Other queries for this clip: " + "; ".join(one.text for one in scene.queries if one is not known) + ".")
    lines.append(f"Look at {folder / outputs.SHEET} and {folder / outputs.OVERLAY}.")
    return "\n".join(lines), outcome.warnings


def _telling(scene):
    """The query that shows best what a sentence can say and a noun cannot: about order in time, else motion, else where something is."""
    kinds = ("time", "motion", "relation", "position")
    told = [query for query in scene.queries if query.kind in kinds]
    return min(told, key=lambda query: kinds.index(query.kind), default=scene.queries[0])


def _frames(clip):
    return (clip[index] for index in range(len(clip)))


def _score(masks, truth) -> str:
    from ..evaluation.metrics import contour_accuracy, region_similarity

    j, f = float(region_similarity(masks, truth).mean()), float(contour_accuracy(masks, truth).mean())
    return f"Against the truth: J&F {(j + f) / 2:.3f} (J {j:.3f}, F {f:.3f})."


def _same_query(scene, text: str):
    """The scene's query of these words, whichever general word it uses for an object; None if there is none."""

    def plain(words: str) -> str:
        return _SAME.sub("one", " ".join(words.lower().split()).rstrip(".?"))

    return next((query for query in scene.queries if plain(query.text) == plain(text)), None)


def _evaluate(arguments, progress) -> tuple[str, tuple[str, ...]]:
    from ..bulk.clip_worker import Models
    from ..evaluation.evaluate import evaluate
    from ..files import write_json
    from .options import check_models, sam2_file
    from .segment import mllm_folder

    check_models(arguments.mllm, sam2_file(arguments.sam2))
    folder = mllm_folder(arguments.mllm, progress)
    mllm, sam2 = Models(folder, sam2_file(arguments.sam2), arguments.device).load(progress)
    found = evaluate(
        mllm, sam2, arguments.evaluate, arguments.seed, length=arguments.frames, detail=arguments.detail,
        hard=arguments.scenes == "hard", progress=progress,
    )  # fmt: skip
    if arguments.json is not None:
        asked = {"scenes": arguments.evaluate, "seed": arguments.seed, "frames": arguments.frames, "detail": arguments.detail}
        asked["kind"] = arguments.scenes
        write_json(arguments.json, asked | found)
    return tables(found), ()


def _cell(value: float | dict | None) -> str:
    if value is None:
        return "-"
    return (
        f"{value:g}"
        if not isinstance(value, dict)
        else f"{value['gain']:+.3f} ({value['interval'][0]:+.3f} to {value['interval'][1]:+.3f})"
    )


def tables(found: dict) -> str:
    """The figures of `evaluate` as tables."""
    lines = []
    for setting, table in found["settings"].items():
        columns = list(next(iter(table.values())))
        lines.append(f'Setting "{setting}"')
        titles = [name.replace("coarse_j_", "J ").replace("jf_", "jf ").replace("_", " ") for name in columns]
        widths = [26 if name == "jf_gain" else max(12, len(title) + 2) for name, title in zip(columns, titles, strict=True)]
        lines.append("".join(["kind".ljust(14), *(title.rjust(width) for title, width in zip(titles, widths, strict=True))]))
        for kind, figures in table.items():
            cells = [_cell(figures[name]) for name in columns]
            lines.append("".join([kind.ljust(14), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))]))
        took = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found["seconds"][setting].items())
        lines += [f"seconds of all clips: {took}", ""]
    for name, step in found["steps"].items():
        lines.append(f"coarse J, {name.replace('_', ' ')}: {step['gain']:+.3f} ({step['interval'][0]:+.3f} to {step['interval'][1]:+.3f})")
    lines += [f"{name}: {'-' if value is None else value}" for name, value in found["summary"].items()]
    return "\n".join(lines)
