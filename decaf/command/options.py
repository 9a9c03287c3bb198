"""The options of `decaf segment`, and what can be checked of them before anything is opened, made or loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..attention.questions import Templates
from ..demo import BUNDLED, SAM2_FILE
from ..errors import DecafError, reason, shown
from ..finishing.refine import check_refine
from ..mllm.folder import read_json
from ..paths import look_at, real_path
from ..results import files as outputs
from ..settings import MOST_KEY_FRAMES, MOST_TOKENS_PER_FRAME, AttentionSettings, PointSettings, RefineSettings, TrackingSettings


@dataclass(frozen=True)
class Options:
    """The command line of `decaf segment`, see `decaf segment --help`.

    Attributes:
        queries: each a sentence, or several of them, one a line.
        cut_out: one of `decaf.settings.CUT_OUTS`, or None for no cut-out.
    """

    clip: Path
    queries: tuple[str, ...]
    mllm: str
    sam2: Path
    out: Path
    attention: AttentionSettings
    points: PointSettings
    tracking: TrackingSettings
    templates: Templates
    device: str
    dtype: str
    sam2_dtype: str
    memory_budget: int | None
    objects: bool
    overlay: bool
    style: str
    resume: bool
    refine: RefineSettings = RefineSettings()
    cut_out: str | None = None


def sam2_file(path: Path) -> Path:
    """The checkpoint that --sam2 names: a file or "bundled"."""
    return SAM2_FILE if path == Path(BUNDLED) else path


_HIGHEST = {"max_key_frames": MOST_KEY_FRAMES, "tokens_per_frame": MOST_TOKENS_PER_FRAME}


def check_models(mllm: str, sam2: Path) -> None:
    """DecafError if what --mllm or --sam2 names is plainly no model. Opens nothing."""
    look_at(os.path.expanduser(mllm), "--mllm")
    found = look_at(sam2, "--sam2")
    if found != "file":
        problem = "is a folder. Give the checkpoint file in it." if found else "does not exist. Check the path."
        raise DecafError(f"--sam2 {shown(sam2)} {problem}")


def check_options(options: Options) -> None:
    """DecafError for what is wrong with the options, but for the clip. Nothing is opened, made or loaded for it."""
    check_models(options.mllm, sam2_file(options.sam2))
    if look_at(options.out, "--out") == "file":
        raise DecafError(f"--out {shown(options.out)} is a file. Give a folder.")
    check_stages(options.attention, options.points, options.tracking)
    check_refine(options.refine)


def check_stages(attention: AttentionSettings, points: PointSettings, tracking: TrackingSettings) -> None:
    """DecafError for a setting that no clip can have."""
    for record, name in ((points, "point_threshold"), (points, "presence_threshold"), (tracking, "score_threshold")):
        value, usual = getattr(record, name), getattr(type(record), name)
        if not 0 <= value <= 1 or (value == 0 and name == "point_threshold"):
            raise DecafError(f"--{name.replace('_', '-')} {value:g} is not between 0 and 1. Give a number such as {usual}.")
    if tracking.max_tracks is not None and tracking.max_tracks < 1:
        raise DecafError(f"--max-tracks {tracking.max_tracks} is below 1. Leave it out to keep all objects that are found.")
    for name, highest in _HIGHEST.items():
        value = getattr(attention, name)
        if not 1 <= value <= highest:
            raise DecafError(f"--{name.replace('_', '-')} {value} is not between 1 and {highest}. Leave it out for the usual number.")
    if attention.start_layer is not None and attention.start_layer < 0:
        raise DecafError(f"--start-layer {attention.start_layer} is below 0, the first layer. Leave it out for half of the layers.")


def check_start_layer(start: int | None, mllm: Path) -> None:
    """DecafError if the model's config.json has no such layer, before its weights are loaded. A file without the number is left to the loader."""
    layers = layer_count(mllm) if start is not None else None
    if layers is not None and start >= layers:
        raise DecafError(f"--start-layer {start} is no layer of {shown(mllm)}, which has layers 0 to {layers - 1}. The middle is usual.")


def layer_count(mllm: Path) -> int | None:
    """Decoder layers of the language model in a folder, as its config.json has them; None if that does not say."""
    try:
        config = read_json(mllm / "config.json")
        layers = (config.get("text_config") or config)["num_hidden_layers"]
        return layers if isinstance(layers, int) and layers > 0 else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def check_paths(options: Options, folders: list[Path]) -> None:
    """DecafError if there is no clip, or if results in `folders` would come to lie in it or over it."""
    if look_at(options.clip, "CLIP") is None:
        raise DecafError(f"CLIP {shown(options.clip)} does not exist. Check the path.")
    clip = real_path(options.clip)
    try:
        # Results of other queries in --out go at the end: the clip must not be among those either.
        overwritten = {folder: outputs.replaced(folder) for folder in {options.out, *folders, *outputs.query_folders(options.out)}}
    except OSError as error:
        raise DecafError(f"--out {shown(options.out)} cannot be looked into ({reason(error)}). Give another folder.") from error
    for folder, replaced in overwritten.items():
        if clip == real_path(folder):
            raise DecafError(
                f"--out {shown(folder)} is the clip itself; results would mix with its frames. Give another folder, outside the clip."
            )
        if clip in replaced:
            raise DecafError(
                f"CLIP {shown(options.clip)} is a result in --out {shown(folder)} and would be overwritten. Give another folder."
            )
