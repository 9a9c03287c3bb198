"""A few key frames with their heat maps in one picture, legible where it is shown small: in a node of ComfyUI."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..clips.base import Clip
from ..data import FusedAttention, SAM2Prompts, caption
from .drawing import heat_colours, heat_overlay
from .lettering import font_for, plain, wrapped, write

MOST = 6
"""Frames in one picture."""

_WIDTH = 720
"""Of the picture, in pixels: twice that of a node."""

_GAP, _MARGIN, _TEXT, _SMALL = 8, 10, 26, 22
_PAPER, _INK, _QUIET = (18, 20, 26), (240, 242, 246), (176, 184, 196)


def shown_keys(fused: FusedAttention, most: int = MOST) -> list[int]:
    """Key indices of at most so many frames, in order: the key frames are divided into that many parts, as long as each other, and of each part
    the frame with the strongest attention is shown, the first if equal."""
    peaks = fused.map.flatten(1).amax(1)
    parts = np.array_split(np.arange(len(peaks)), min(most, len(peaks)))
    return [int(part[int(peaks[part].argmax())]) for part in parts]


def heat_frames(
    clip: Clip, fused: FusedAttention, prompts: SAM2Prompts | None = None, *, fps: Fraction | float | None = None, note: str = ""
) -> Image.Image:
    """The query, a scale of colours, and at most `MOST` key frames with heat map, number and time.

    Args:
        prompts: its points are drawn, too.
        fps: frames per second, for the times; None where they are not known.
        note: a few words behind the scale.
    """
    keys = shown_keys(fused)
    columns = _columns(len(keys), clip.frame_size)
    cell = _cell(clip.frame_size, columns)
    query = plain(caption(fused)) or "(no query)"
    lines = wrapped(query, font_for(query, _TEXT), _WIDTH - 2 * _MARGIN, 2)
    head = _MARGIN + 32 * len(lines) + 38
    rows = -(-len(keys) // columns)
    sheet = Image.new("RGB", (_WIDTH, head + rows * (cell[0] + _GAP) - _GAP + _MARGIN), _PAPER)
    for number, line in enumerate(lines):
        write(sheet, (_MARGIN, _MARGIN + 32 * number), line, _TEXT, _INK)
    _scale(sheet, (_MARGIN, head - 36), note)
    left = (_WIDTH - columns * (cell[1] + _GAP) + _GAP) // 2
    for place, key in enumerate(keys):
        index = fused.clip.key_frames[key]
        frame = _scaled(clip[index], cell)
        points = None if prompts is None else prompts.xy[prompts.key == key]
        picture = Image.fromarray(heat_overlay(frame, fused.map[key], None, points).numpy())
        _label(picture, f"frame {index}" if fps is None else f"frame {index} · {float(index / fps):.1f} s")
        row, column = divmod(place, columns)
        sheet.paste(picture, (left + column * (cell[1] + _GAP), head + row * (cell[0] + _GAP)))
    return sheet


def _columns(count: int, frame_size: tuple[int, int]) -> int:
    """So many that the picture comes closest to a square, which is what a node has room for, with few places left empty."""

    def off(columns: int) -> float:
        rows = -(-count // columns)
        return abs(np.log((rows * _cell(frame_size, columns)[0] + 100) / _WIDTH)) + 0.3 * (rows * columns - count)

    return min(range(1, count + 1), key=off)


def _cell(frame_size: tuple[int, int], columns: int) -> tuple[int, int]:
    """(height, width) of a frame; very thin ones are stretched to stay visible."""
    height, width = frame_size
    across = (_WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) // columns
    high = max(round(across * height / width), 60)
    return (high, across) if high <= _WIDTH else (_WIDTH, max(round(_WIDTH * width / height), 60))


def _scaled(frame: Tensor, size: tuple[int, int]) -> Tensor:
    picture = Image.fromarray(frame.numpy()).resize(size[::-1], Image.Resampling.BILINEAR, reducing_gap=2.0)
    return torch.from_numpy(np.array(picture))


def _scale(sheet: Image.Image, at: tuple[int, int], note: str) -> None:
    """The colours from no attention to the strongest, with words."""
    left, top = at
    write(sheet, (left, top), "low", _SMALL, _QUIET)
    left += 48
    bar = (heat_colours(torch.linspace(0, 1, 180)) * 255).to(torch.uint8)[None].expand(18, -1, -1)
    sheet.paste(Image.fromarray(bar.contiguous().numpy()), (left, top + 5))
    write(sheet, (left + 190, top), "high attention", _SMALL, _QUIET)
    if note:
        write(sheet, (_WIDTH - _MARGIN, top), note, _SMALL, _INK, "ra")


def _label(picture: Image.Image, text: str) -> None:
    """On a dark plate in the upper left corner."""
    font = font_for(text, _SMALL)
    draw = ImageDraw.Draw(picture)
    if draw.textlength(text, font=font) + 14 > picture.width:
        text = text.split(" · ")[0].removeprefix("frame ")
    draw.rectangle((0, 0, draw.textlength(text, font=font) + 14, 31), fill=_PAPER)
    write(picture, (7, 3), text, _SMALL, _INK)
