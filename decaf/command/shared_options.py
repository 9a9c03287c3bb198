"""Options that every command has which masks clips: models, questions, attention, masks, computation."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path

from ..attention.questions import Templates
from ..errors import DecafError, reason, shown
from ..paths import look_at
from ..settings import DETAILS, KEY_FRAMES_BY, SINGLE_FRAMES, AttentionSettings, PointSettings, TrackingSettings
from .arguments import DETAIL_HELP, SINGLE_FRAMES_HELP, add_method, size_in_bytes


def add_models(needed, *, required: bool = True) -> None:
    """Adds --mllm and --sam2 to a group; `required`: neither can be left out."""
    needed.add_argument(
        "--mllm", required=required, metavar="DIR_OR_REPO",
        help="folder of a model of Qwen2-VL to Qwen3-VL, InternVL3 and 3.5, GLM-4.1V, GLM-4.6V, LLaVA-OneVision or SmolVLM2, or its repository "
        'id, which is downloaded if it is not there yet; "bundled" is the tiny model of "decaf demo"',
    )  # fmt: skip
    needed.add_argument(
        "--sam2", required=required, metavar="FILE", type=Path,
        help="SAM 2 or 2.1 checkpoint of any size, or SAM 3's file for its tracker, .pt or .safetensors; "
        '"bundled" is the tiny one of "decaf demo"',
    )  # fmt: skip


def add_stages(parser: argparse.ArgumentParser) -> None:
    """Adds what can be set in each stage; see `decaf.command.arguments.stage_settings`, `read_templates` and `refine_settings`."""
    _add_questions(parser)
    _add_attention(parser)
    _add_masks(parser)


def _add_questions(parser: argparse.ArgumentParser) -> None:
    questions = parser.add_argument_group("questions")
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


def _add_attention(parser: argparse.ArgumentParser) -> None:
    attention = parser.add_argument_group("attention")
    attention.add_argument(
        "--max-key-frames", metavar="N", type=int, default=AttentionSettings.max_key_frames,
        help="frames that the language model sees, evenly spread",
    )  # fmt: skip
    attention.add_argument(
        "--key-frames", metavar="N,N,...",
        help="these frames instead, counted from 0, for example 0,12,40; --max-key-frames then does not count",
    )  # fmt: skip
    attention.add_argument(
        "--key-frames-by", choices=KEY_FRAMES_BY, default=AttentionSettings.key_frames_by,
        help="spacing: evenly spread. presence: the model is first asked in which parts of the clip the query can be seen, and key frames are of "
        "these; it looks at six times as many frames; for what is seen briefly in a long clip",
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
    attention.add_argument("--single-frames", choices=SINGLE_FRAMES, default=AttentionSettings.single_frames, help=SINGLE_FRAMES_HELP)


def _add_masks(parser: argparse.ArgumentParser) -> None:
    masks = parser.add_argument_group("masks")
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
        "--score-threshold", metavar="X", type=float, default=TrackingSettings.score_threshold,
        help="higher keeps fewer objects, 0 to 1. As published: the score above which an object is kept; with the method agreement it counts "
        "where several objects are meant",
    )  # fmt: skip
    add_method(masks)
    masks.add_argument("--max-tracks", metavar="N", type=int, help="most objects to keep, those of the highest scores (default: all)")

    masks.add_argument(
        "--refine", metavar="WHAT=N,...",
        help="finish the masks, for example grow=2,feather=3: border (pixels), holes, specks (area in pixels), smooth (frames before and "
        "after), shortest (frames), grow (pixels, negative shrinks), feather (pixels); done in this order, 0 leaves a step out",
    )  # fmt: skip


def add_computation(parser: argparse.ArgumentParser) -> None:
    """Adds where and how the models compute."""
    compute = parser.add_argument_group("computation")
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


def _templates() -> list[str]:
    return [one.name for one in fields(Templates)]


def read_templates(arguments) -> Templates:
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
