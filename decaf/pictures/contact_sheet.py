"""The contact sheet: key frames with heat map, coarse mask, points and final masks in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..attention.fusion import coarse_masks
from ..clips.base import Clip
from ..data import FusedAttention, SAM2Prompts, Tracks, caption
from ..report import Progress, Report, silent
from .drawing import cut_out, heat_overlay, point_overlay
from .lettering import font_for, plain, wrapped, write
from .styles import show_objects

_LARGEST, _SMALLEST = (336, 252), (96, 40)  # width and height of a cell; very thin frames are stretched to stay visible
_GAP, _MARGIN, _LABEL = 8, 24, 76
_PAPER, _INK, _QUIET = (18, 20, 26), (240, 242, 246), (150, 158, 172)


def contact_sheet(
    clip: Clip,
    fused: FusedAttention,
    prompts: SAM2Prompts | None = None,
    tracks: Tracks | None = None,
    *,
    rows: int = 6,
    progress: Progress | Report = silent,
) -> Image.Image:
    """A heading with the query, then one row per key frame. Columns: the frame, its heat map, the coarse mask, points, final masks.

    Args:
        clip: may have another size than the clip that attention was taken from.
        prompts: adds the column of points. Frames with points are preferred to others.
        tracks: adds the column of final masks, one colour per object.
        rows: most key frames to show.
        progress: callback or `Report`, told of every row.
    """
    report = Report.of(progress)
    keys = _chosen_keys(len(fused.map), rows, [] if prompts is None else prompts.key.unique().tolist())
    coarse = coarse_masks(FusedAttention(fused.map[keys], fused.clip))
    columns = ["Key frame", "Heat map", "Coarse mask"] + ["Points"] * (prompts is not None) + ["Final masks"] * (tracks is not None)
    layout = _Layout.of(fused.clip.frame_size, len(columns), len(keys))
    lines = wrapped(plain(caption(fused)) or "(no query)", font_for(caption(fused), 26), layout.width - 2 * _MARGIN, 3)
    head = _MARGIN + 34 * len(lines) + 28 + 34
    sheet = Image.new("RGB", (layout.width, head + layout.height), _PAPER)

    for number, line in enumerate(lines):
        write(sheet, (_MARGIN, _MARGIN + 34 * number), line, 26, _INK)
    below = _MARGIN + 34 * len(lines) + 2
    facts = _facts(clip, fused, prompts, tracks)
    [facts] = wrapped(facts, font_for(facts, 15), layout.width - 2 * _MARGIN, 1)
    write(sheet, (_MARGIN, below), facts, 15, _QUIET)
    for column, title in enumerate(columns):
        write(sheet, (layout.left(column), head - 8), title, 16, _INK, "ls")

    for row, key in enumerate(keys):
        report.progress(row, len(keys), "Drawing the contact sheet")
        index = fused.clip.key_frames[key]
        top = head + row * (layout.cell[1] + _GAP)
        write(sheet, (_MARGIN, top), "frame", 13, _QUIET)
        write(sheet, (_MARGIN, top + 15), str(index), 20, _INK)
        frame = _scaled(clip[index], layout.drawn)
        pictures = [frame, heat_overlay(frame, fused.map[key]), cut_out(frame, _scaled_mask(coarse[row], layout.drawn))]
        if prompts is not None:
            pictures.append(point_overlay(frame, prompts.xy[prompts.key == key], fused.map.shape[1:]))
        if tracks is not None:
            masks = (tracks.masks(track, index, index + 1)[0] for track in range(len(tracks.tracks)))
            drawn = [_scaled_mask(mask, layout.drawn) for mask in masks]
            pictures.append(show_objects(frame, drawn, ids=[track.id for track in tracks.tracks]))
        for column, picture in enumerate(pictures):
            # Drawn at twice the size and halved, for antialiasing.
            sheet.paste(Image.fromarray(picture.numpy()).reduce(2), (layout.left(column), top))
    report.progress(len(keys), len(keys), "Drawing the contact sheet")
    return sheet


@dataclass(frozen=True)
class _Layout:
    cell: tuple[int, int]
    width: int
    height: int

    @classmethod
    def of(cls, frame_size: tuple[int, int], columns: int, rows: int) -> _Layout:
        height, width = frame_size
        scale = min(_LARGEST[0] / width, _LARGEST[1] / height)
        cell = max(round(width * scale), _SMALLEST[0]), max(round(height * scale), _SMALLEST[1])
        across = max(2 * _MARGIN + _LABEL + columns * (cell[0] + _GAP) - _GAP, 640)  # wide enough for the query above narrow pictures
        return cls(cell, across, rows * (cell[1] + _GAP) - _GAP + _MARGIN)

    @property
    def drawn(self) -> tuple[int, int]:
        return 2 * self.cell[1], 2 * self.cell[0]

    def left(self, column: int) -> int:
        return _MARGIN + _LABEL + column * (self.cell[0] + _GAP)


def _evenly(count: int, limit: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int).tolist()


def _chosen_keys(count: int, limit: int, with_points: list[int]) -> list[int]:
    """Key indices to show: those with points, evenly thinned out if there are too many, then the ones farthest from any chosen one."""
    chosen = {with_points[i] for i in _evenly(len(with_points), limit)} if with_points else set(_evenly(count, limit))
    while len(chosen) < min(count, limit):
        chosen.add(max((key for key in range(count) if key not in chosen), key=lambda key: min(abs(key - other) for other in chosen)))
    return sorted(chosen)


def _scaled(frame: Tensor, size: Sequence[int]) -> Tensor:
    picture = Image.fromarray(frame.numpy()).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture))


def _scaled_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A pixel is set where at least half of the pixels it covers are set; if a thin mask would vanish that way, where any is."""
    share = np.array(Image.fromarray(mask.numpy()).convert("L").resize((size[1], size[0]), Image.Resampling.BOX))
    scaled = torch.from_numpy(share >= 128)
    return scaled if scaled.any() or not mask.any() else torch.from_numpy(share > 0)


def _facts(clip: Clip, fused: FusedAttention, prompts: SAM2Prompts | None, tracks: Tracks | None) -> str:
    facts = [clip.name, _count(len(clip), "frame"), f"{clip.frame_size[1]} x {clip.frame_size[0]}", _count(len(fused.map), "key frame")]
    if prompts is not None:
        facts.append(_count(len(prompts.key), "point"))
    if fused.presence is not None:
        facts.append(f"presence {fused.presence:.2f}")
    if tracks is not None:
        facts.append(_count(len(tracks.tracks), "object") + (f": {tracks.message}" if tracks.message else ""))
    return " · ".join(facts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
