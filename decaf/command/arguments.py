"""From the command line's words to the settings of each stage."""

from __future__ import annotations

import argparse

from ..settings import settings_of

DETAIL_HELP = "how finely the clip is looked at; fast: single frames as coarse as the video's, and at most 8 key frames"

_NAMES = ("max_key_frames", "tokens_per_frame", "start_layer", "detail", "point_threshold", "presence_threshold", "score_threshold", "max_tracks")


def stage_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """The settings of each stage by the names that `Options` has for them; defaults for what a subcommand has no option for."""
    given = {name: getattr(arguments, name) for name in _NAMES if hasattr(arguments, name)}
    records = settings_of({"setting": arguments.setting.replace("-", " "), **given})
    return dict(zip(("attention", "points", "tracking"), records, strict=True))
