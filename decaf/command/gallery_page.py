"""One run of the gallery: computed, drawn as a moving picture, and described."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..clips import Clip, clip_from_images, open_clip
from ..data import Tracks
from ..demo.scenes import make_scene
from ..evaluation.metrics import contour_accuracy, region_similarity
from ..files import write_image
from ..finishing import refine
from ..finishing.effects import fitted, has_alpha, made
from ..mllm import MLLM
from ..pictures.drawing import heat_overlay
from ..pictures.lettering import font_for, wrapped, write
from ..pictures.styles import on_checkerboard, show_objects
from ..pipeline import Result, segment_clip
from ..report import Progress, Report
from ..sam2 import SAM2
from ..settings import EffectSettings, RefineSettings
from .gallery_entries import LOOKS, Entry
from .memory_log import MemoryLog

_FINISHED = RefineSettings(border=2, holes=0, specks=0, feather=1.5)
_PANEL = 304
"""Pixels of a panel's longer side."""
_MOST_FRAMES = 24
_GAP, _TOP = 8, 56
_PAPER, _INK, _QUIET = (18, 20, 26), (240, 242, 246), (150, 158, 172)
_TITLES = ("clip", "what the model looks at", "result")
_LIGHT, _DARK = (247, 214, 165), (92, 60, 110)
"""Top and bottom of the background that stands in where none is given."""


@dataclass(frozen=True)
class Shown:
    """What is told of a run. `peak`: bytes, of the device's memory on a GPU, of the process where Linux tells it, else None. `j_and_f`: None where
    the truth is not known."""

    entry: Entry
    picture: str
    frames: int
    frame_size: tuple[int, int]
    seconds: dict[str, float]
    peak: int | None
    objects: int
    message: str
    j_and_f: float | None


def picture_name(number: int, entry: Entry) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", entry.title.lower()).strip("-")[:40].strip("-")
    return f"{number:02}-{words or 'clip'}.webp"


def show(mllm: MLLM, sam2: SAM2, entry: Entry, path: Path, progress: Progress) -> Shown:
    """Runs one entry and writes its moving picture. DecafError as in `segment_clip`."""
    clip, truth = _clip(entry, progress)
    with MemoryLog(progress) as memory:
        report = Report(memory)
        result = segment_clip(mllm, sam2, clip, entry.query, progress=report, not_this=entry.not_this)
        start = time.perf_counter()
        pictures = [_picture(entry, clip, result, index) for index in _frames(len(clip))]
        seconds = {name: report.seconds.get(name, 0.0) for name in ("attention", "segmentation")}
        seconds["finishing and drawing"] = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if sam2.device.type == "cuda" else max(memory.peaks.values(), default=None)
    rate = min(float(clip.fps or 10), 12)
    moving = {"save_all": True, "append_images": pictures[1:], "duration": round(1000 / rate), "loop": 0} if len(pictures) > 1 else {}
    write_image(path, pictures[0], quality=70, method=4, **moving)
    found = _score(result.tracks, truth) if truth is not None else None
    return Shown(
        entry, path.name, len(clip), tuple(clip.frame_size), seconds, peak, len(result.tracks.tracks), result.tracks.message, found
    )


def _clip(entry: Entry, progress: Progress) -> tuple[Clip, np.ndarray | None]:
    """The clip, and its true masks (T, H, W) if they are known."""
    if entry.clip is not None:
        return open_clip(entry.clip, progress=progress), None
    scene = make_scene(entry.seed, length=entry.frames)
    known = next((one for one in scene.queries if one.text == entry.query), None)
    return clip_from_images(torch.from_numpy(scene.frames)), None if known is None else scene.truth(known)


def _frames(length: int) -> list[int]:
    """Clip indices of the frames that are shown: all, or evenly spread."""
    count = min(length, _MOST_FRAMES)
    return [index * length // count for index in range(count)]


def _score(tracks: Tracks, truth: np.ndarray) -> float:
    masks, true = tracks.union(), torch.from_numpy(truth)
    return float((region_similarity(masks, true).mean() + contour_accuracy(masks, true).mean()) / 2)


# -- the picture -------------------------------------------------------------------------------------------------------------------------------


def _picture(entry: Entry, clip: Clip, result: Result, index: int) -> Image.Image:
    """The query above, and below it the frame, its heat map and the result, side by side."""
    frame, keys = clip[index], result.fused.clip.key_frames
    nearest = min(range(len(keys)), key=lambda key: abs(keys[key] - index))
    panels = [frame, heat_overlay(frame, result.fused.map[nearest]), _result(entry, frame, result.tracks, index)]
    scale = _PANEL / max(frame.shape[:2])
    size = tuple(max(round(pixels * scale), 1) for pixels in (frame.shape[1], frame.shape[0]))
    width = len(panels) * size[0] + (len(panels) + 1) * _GAP
    picture = Image.new("RGB", (width, _TOP + size[1] + _GAP), _PAPER)
    said = f"“{entry.query}”" + (f", not “{entry.not_this}”" if entry.not_this else "")
    [line] = wrapped(said, font_for(said, 18), width - 2 * _GAP, 1)
    write(picture, (_GAP, 6), line, 18, _INK)
    for place, (panel, title) in enumerate(zip(panels, _TITLES, strict=True)):
        left = _GAP + place * (size[0] + _GAP)
        write(picture, (left, _TOP - 20), title, 13, _QUIET)
        picture.paste(Image.fromarray(panel.numpy()).resize(size, Image.Resampling.LANCZOS), (left, _TOP))
    return picture


def _result(entry: Entry, frame: torch.Tensor, tracks: Tracks, index: int) -> torch.Tensor:
    """(H, W, 3) uint8."""
    if entry.effect == LOOKS[0]:
        return show_objects(frame, [tracks.masks(place, index, index + 1)[0] for place in range(len(tracks.tracks))], entry.effect)
    settings = EffectSettings(entry.effect, strength=1.0 if entry.effect.endswith(" rest") else EffectSettings.strength)
    background = _background(entry, index, tuple(frame.shape[:2])) if entry.effect == "new background" else None
    alpha = refine(tracks, _FINISHED).alpha(index, index + 1)[0].numpy()
    pixels = torch.from_numpy(made(frame.numpy(), alpha, settings, background))
    return on_checkerboard(pixels) if has_alpha(settings) else pixels


def _background(entry: Entry, index: int, size: tuple[int, int]) -> np.ndarray:
    if entry.background is not None:
        behind = open_clip(entry.background)
        return fitted(behind[index % len(behind)].numpy(), size)
    share = np.linspace(0, 1, size[0])[:, None, None]
    return np.broadcast_to(np.array(_LIGHT) * (1 - share) + np.array(_DARK) * share, (*size, 3)).astype(np.uint8)


# -- the page ----------------------------------------------------------------------------------------------------------------------------------


def page(shown: Sequence[Shown], models: dict[str, str], device: torch.device) -> str:
    """The page as Markdown."""
    used = "; ".join(f"{role}: {name}" for role, name in models.items())
    where = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
    lines = ["# Gallery", "", f"Made by `decaf gallery` on a {where}, {torch.get_num_threads()} threads. {used}.", ""]
    for one in shown:
        lines += [f"## {one.entry.title}", "", f"![{one.entry.query}]({one.picture})", "", *_told(one), ""]
    return "\n".join(lines)


def _told(one: Shown) -> list[str]:
    height, width = one.frame_size
    seconds = ", ".join(f"{name} {spent:.1f} s" for name, spent in one.seconds.items())
    found = f"{one.objects} object{'s' * (one.objects != 1)}" + (f", J&F {one.j_and_f:.2f}" if one.j_and_f is not None else "")
    rows = [
        ("query", one.entry.query),
        ("not this", one.entry.not_this),
        ("made of it", one.entry.effect),
        ("found", found),
        ("clip", f"{one.frames} frames, {width}x{height}"),
        ("time", seconds),
        ("memory at most", None if one.peak is None else f"{one.peak / 1e9:.1f} GB"),
        ("in ComfyUI", one.entry.template and f"the template *{one.entry.template}*"),
    ]
    told = ["| | |", "| --- | --- |", *(f"| {name} | {text.replace('|', '/')} |" for name, text in rows if text)]
    return [*filter(None, (one.entry.note, one.message)), *([""] if one.entry.note or one.message else []), *told]
