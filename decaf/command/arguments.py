"""From the command line's words to the settings of each stage."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields

from ..errors import DecafError, shown
from ..settings import METHODS, TARGETS, FusionSettings, RefineSettings, settings_of

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def size_in_bytes(text: str) -> int:
    """ "10GB", "9.5 GiB" or a number of bytes. ArgumentTypeError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in _UNITS or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no size; give one such as 10GB")
    return int(float(found[1]) * _UNITS[found[2]])


DETAIL_HELP = (
    "how finely the clip is looked at; fast: single frames as coarse as the video's, and at most 8 key frames. About a sixth of the "
    "visual tokens of 16 key frames; with the bundled models J&F is 0.85 instead of 0.84, but of motion 0.70 instead of 0.97, "
    "of sizes 0.61 instead of 0.70"
)

SINGLE_FRAMES_HELP = (
    "what the model is shown of a key frame by itself; zoom: the quarter of it that it attends in the video, as fine as the whole and with a "
    "quarter of the visual tokens; whole frames where a quarter does not hold what it attends"
)

_NAMES = (
    "max_key_frames", "tokens_per_frame", "start_layer", "detail", "single_frames", "key_frames_by", "not_this", "point_threshold",
    "presence_threshold", "score_threshold", "max_tracks", "first_frame", "last_frame", "method", "targets",
)  # fmt: skip


def add_method(options) -> None:
    """Adds --method and --targets to a parser or a group of its options."""
    options.add_argument(
        "--method", choices=tuple(method.replace(" ", "-") for method in METHODS), default=METHODS[0],
        help="how maps are fused and objects chosen. agreement: single frames count as far as they agree with the video, and objects by the "
        "attention to where they are; better for motion, order in time and several objects",
    )  # fmt: skip
    options.add_argument(
        "--targets", choices=TARGETS, default=TARGETS[0],
        help='how many objects to keep. auto: what the query says ("the two dogs", "all cars", a plural), else one. Not as published, which '
        "goes by the score",
    )  # fmt: skip


def refine_settings(text: str | None) -> RefineSettings:
    """From `grow=2,feather=3`; None gives settings that change nothing. DecafError: something else is written."""
    given = {}
    for word in (text or "").replace(",", " ").split():
        name, _, number = word.partition("=")
        known = {field.name: field for field in fields(RefineSettings)}
        if name not in known:
            raise DecafError(f"--refine has '{shown(name, 40)}'; known are {', '.join(known)}. Write for example --refine grow=2,feather=3.")
        try:
            given[name] = type(known[name].default)(number)
        except ValueError as error:
            kind = "whole number" if isinstance(known[name].default, int) else "number"
            raise DecafError(f"--refine {shown(word, 40)} needs a {kind}. Write for example --refine grow=2,feather=3.") from error
    return RefineSettings(**given)


def fusion_settings(arguments: argparse.Namespace) -> FusionSettings:
    """From --no-contrast and --maps."""
    return FusionSettings(contrast=not arguments.no_contrast, maps=arguments.maps)


def stage_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """The settings of each stage by the names that `Options` has for them; defaults for what a subcommand has no option for."""
    given = {name: getattr(arguments, name) for name in _NAMES if hasattr(arguments, name)}
    if getattr(arguments, "key_frames", None) is not None:
        from ..attention.frames import read_key_frames  # imports numpy, which --help does not need

        given["key_frames"] = read_key_frames(arguments.key_frames)
    if "method" in given:
        given["method"] = given["method"].replace("-", " ")
    records = settings_of({"setting": arguments.setting.replace("-", " "), **given})
    return dict(zip(("attention", "points", "tracking"), records, strict=False))
