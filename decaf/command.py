"""What `decaf segment` does: load, compute, write; and how a stopped run is taken up again."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from . import outputs
from .attention import extract_attention
from .data import Attention, Tracks
from .demo import BUNDLED, MLLM_FOLDER, SAM2_FILE
from .errors import DecafError
from .files import write_image, write_json
from .mllm import find_mllm, load_mllm
from .pipeline import Result, segment_clip
from .progress import Progress
from .questions import Templates, clean_query
from .tracking import load_sam2
from .video import Clip, open_clip, write_video
from .visualize import contact_sheet, mask_overlay

DEFAULT_FPS = Fraction(24)
"""Of the overlay video of a clip without a frame rate: a folder of images."""


@dataclass(frozen=True)
class Options:
    """The command line of `decaf segment`, see `decaf segment --help`. `start_layer` None: half of the layers."""

    clip: Path
    query: str
    mllm: str
    sam2: Path
    out: Path
    setting: str
    templates: Templates
    max_key_frames: int
    tokens_per_frame: int
    start_layer: int | None
    point_threshold: float
    score_threshold: float
    device: str
    dtype: str
    objects: bool
    overlay: bool
    resume: bool


def run(options: Options, progress: Progress) -> str:
    """Runs the command and returns a closing summary in a few lines. Raises DecafError for every input that cannot be used."""
    query = clean_query(options.query)
    options = replace(options, sam2=sam2_file(options.sam2))
    for path, name in ((options.clip, "CLIP"), (options.sam2, "--sam2")):
        if not os.path.exists(path):  # Path.exists raises for a name that is too long
            raise DecafError(f"{name} {path} does not exist. Check the path.")
    for value, name in ((options.point_threshold, "--point-threshold"), (options.score_threshold, "--score-threshold")):
        if not 0 <= value <= 1:  # told before the language model takes its minutes
            raise DecafError(f"{name} {value:g} is not between 0 and 1. Give a number such as 0.8.")
    if options.clip.resolve() == options.out.resolve():
        raise DecafError(
            f"--out {options.out} is the clip itself; results would mix with its frames. Give another folder, outside the clip."
        )
    if options.clip.resolve() in outputs.replaced(options.out):
        raise DecafError(f"CLIP {options.clip} is a result in --out {options.out} and would be overwritten. Give another folder.")
    device = choose_device(options.device)
    dtype = _dtype(options.dtype, device)
    outputs.prepare_folder(options.out)
    folder = mllm_folder(options.mllm, progress)

    settings = {
        "setting": options.setting,
        "templates": asdict(options.templates),
        "max_key_frames": options.max_key_frames,
        "tokens_per_frame": options.tokens_per_frame,
        "start_layer": options.start_layer,
        "dtype": str(dtype).removeprefix("torch."),
    }
    attention_from = {
        "decaf": outputs.versions()["comfyui-decaf"],
        "clip": outputs.stamp(options.clip),
        "mllm": outputs.stamp(folder),
        "query": query,
        **settings,
    }
    settings |= {name: getattr(options, name) for name in ("point_threshold", "score_threshold", "objects", "overlay")}
    made_from = attention_from | settings | {"sam2": outputs.stamp(options.sam2)}
    if options.resume and outputs.is_finished(options.out, made_from):
        return f"Already finished in {options.out}; nothing to do."

    clock = _Clock()
    with clock("open clip"):
        clip = open_clip(options.clip)
    # SAM 2 loads in a second: a wrong file is told before the language model takes its minutes.
    with clock("load SAM 2"):
        sam2 = load_sam2(options.sam2, device=device)
    attention, record = _attention(options, clip, folder, device, dtype, attention_from, clock, progress)
    counts = Counter(record["counts"])
    result = segment_clip(
        None, sam2, clip, query,
        attention=attention, point_threshold=options.point_threshold, score_threshold=options.score_threshold, progress=progress,
    )  # fmt: skip
    counts.update(result.counts)
    # Only now: until there is something better, an earlier result stays whole.
    outputs.clear(options.out)
    with clock("write"):
        filled = _write(options, clip, result, progress)

    height, width = clip.frame_size
    write_json(
        options.out / outputs.RESULT,
        {
            "query": query,
            "message": result.tracks.message,
            "clip": {
                "name": clip.name,
                "frames": len(clip),
                "width": width,
                "height": height,
                "fps": float(clip.fps) if clip.fps else None,
            },
            "key_frames": list(result.fused.clip.key_frames),
            "frames_with_mask": filled,
            "tracks": outputs.track_records(result.tracks),
            "questions": {one.kind: one.question for one in attention},
            "answers": list(attention[0].answers),
            "settings": settings | {"device": str(device)},
            "seconds": {name: round(spent, 3) for name, spent in (clock.seconds | record["seconds"] | result.seconds).items()},
            "attention_from_earlier_run": record["earlier"],
            "counts": dict(counts),
            "versions": outputs.versions(),
            "files": [outputs.ATTENTION, outputs.SHEET] + [outputs.OVERLAY] * options.overlay,
            "made_from": made_from,
        },
    )
    return _summary(options, result.tracks, filled)


def _attention(
    options: Options, clip: Clip, folder: Path, device, dtype, made_from: dict, clock: _Clock, progress: Progress
) -> tuple[tuple[Attention, Attention], dict]:
    """(object, background) attention and {"seconds", "counts", "earlier"}: of the earlier run with --resume, else asked for now."""
    path = options.out / outputs.ATTENTION
    found = outputs.load_attention(path, made_from) if options.resume else None
    if found:
        attention, record = found
        return attention, record | {"earlier": True}
    counts: dict[str, int] = {}
    with clock("load MLLM"):
        mllm = load_mllm(folder, device=device, dtype=dtype, progress=progress)
    start = time.perf_counter()
    attention = extract_attention(
        mllm, clip, options.query,
        setting=options.setting, max_key_frames=options.max_key_frames, tokens_per_frame=options.tokens_per_frame,
        templates=options.templates, start_layer=options.start_layer, progress=progress, counts=counts,
    )  # fmt: skip
    record = {"seconds": {"attention": time.perf_counter() - start}, "counts": counts}
    # SAM 2's sweeps need the memory that a language model of many gigabytes holds.
    del mllm
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    outputs.save_attention(path, attention, made_from, record)
    return attention, record | {"earlier": False}


def _write(options: Options, clip: Clip, result: Result, progress: Progress) -> int:
    """Writes masks and pictures; returns in how many frames something is masked."""
    folder, tracks = options.out, result.tracks
    filled = outputs.write_masks(folder / outputs.MASKS, outputs.union_masks(tracks), tracks.length, progress)
    if options.objects:
        for index, track in enumerate(tracks.tracks):
            outputs.write_masks(folder / outputs.OBJECTS / str(track.id), outputs.object_masks(tracks, index), tracks.length, progress)
    write_image(folder / outputs.SHEET, contact_sheet(clip, result.fused, result.prompts, tracks))
    if options.overlay:
        write_video(folder / outputs.OVERLAY, _overlay(clip, tracks, progress), clip.fps or DEFAULT_FPS, clip.frame_size)
    return filled


def _overlay(clip: Clip, tracks: Tracks, progress: Progress) -> Iterator[Tensor]:
    for index in range(len(clip)):
        masks = [tracks.masks(place, index, index + 1)[0] for place in range(len(tracks.tracks))]
        yield mask_overlay(clip[index], masks)
        progress(index + 1, len(clip), "Writing the overlay")


def mllm_folder(name: str, progress: Progress) -> Path:
    """The folder of the model that --mllm names: a folder, a repository id or "bundled"."""
    return MLLM_FOLDER if name == BUNDLED else find_mllm(name, progress)


def sam2_file(path: Path) -> Path:
    """The checkpoint that --sam2 names: a file or "bundled"."""
    return SAM2_FILE if path == Path(BUNDLED) else path


def choose_device(name: str) -> torch.device:
    """The device that --device names, "auto" the fastest there is. DecafError if there is no such one here."""
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(one for one in ("cuda", "mps", "cpu") if has[one]))
    if not has[name]:
        raise DecafError(
            f"--device {name} was asked for, but PyTorch {torch.__version__} finds no such device here. Use --device auto or cpu."
        )
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def _summary(options: Options, tracks: Tracks, filled: int) -> str:
    if not tracks.tracks:
        return f"{tracks.message} The masks in {options.out} are empty."
    many = f"{len(tracks.tracks)} object" + "s" * (len(tracks.tracks) != 1)
    told = f"{many}, masked in {filled} of {tracks.length} frames. Results are in {options.out}."
    return f"{told}\n{tracks.message} Look at {outputs.SHEET}." if tracks.message else told


class _Clock:
    """Seconds per stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str):
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start
