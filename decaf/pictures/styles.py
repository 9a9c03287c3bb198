"""Objects shown in a frame, for people: in one of several styles, each object with a line of its own colour and its number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .drawing import OBJECT_COLOURS, line_width
from .lettering import font_for

_CASING = (14, 14, 18)
_SQUARES = (96, 144)
"""Greys of the checkerboard."""

_NEARLY_GREY = (2 / 12, 1 / 12, 1 / 12, 0, 1 / 12, 2 / 12, 1 / 12, 0, 1 / 12, 1 / 12, 2 / 12, 0)
"""Red, green and blue from red, green, blue and 1: a quarter of the colour is left, at a third of the brightness."""

_LINE_EDGE = 1.5
"""Pixels over which the edge of a line rises, however soft the mask's is."""


def show_objects(
    frame: Tensor,
    masks: Sequence[Tensor],
    style: str = "spotlight",
    *,
    opacity: float = 1.0,
    ids: Sequence[int] | None = None,
    numbers: bool = False,
) -> Tensor:
    """The frame (H, W, 3) uint8 with its objects shown, of the same size.

    Args:
        masks: (h, w) of any size: bool; or with soft edges, uint8 0..255 or float 0..1.
        style: one of `decaf.settings.STYLES`.
        opacity: 0..1, how strongly the style shows: at 0 the frame stays as it is, but for lines and numbers.
        ids: each object's number, >= 0, which decides its colour: an object keeps it when others are dropped. None counts them through.
        numbers: writes each object's number at it.
    """
    ids = range(len(masks)) if ids is None else ids
    colours = [OBJECT_COLOURS[number % len(OBJECT_COLOURS)] for number in ids]
    picture = Image.fromarray(frame.numpy())
    alphas = [fit_alpha(mask, frame.shape[:2]) for mask in masks]
    shown = _filled(picture, alphas, colours, style, opacity)
    if style not in ("matte", "checkerboard"):
        width = max(line_width(frame), 2)
        for alpha, colour in zip(alphas, colours, strict=True):
            _line(shown, alpha, width, colour)
    if numbers and style != "matte":
        _write_numbers(shown, alphas, ids, colours)
    return torch.from_numpy(np.array(shown))


def on_checkerboard(picture: Tensor) -> Tensor:
    """A picture (H, W, 4) uint8 with straight alpha on a checkerboard, (H, W, 3) uint8; one without alpha as it is."""
    if picture.shape[-1] == 3:
        return picture
    pixels = picture.numpy()
    board = _checkerboard(tuple(picture.shape[:2])).copy()
    board.paste(Image.fromarray(np.ascontiguousarray(pixels[..., :3])), mask=Image.fromarray(np.ascontiguousarray(pixels[..., 3])))
    return torch.from_numpy(np.array(board))


def fit_alpha(mask: Tensor, size: Sequence[int]) -> np.ndarray:
    """A mask (h, w), bool, uint8 0..255 or float 0..1, as (*size) uint8 0..255. Made smaller, its edges become soft."""
    values = mask.numpy()
    if values.dtype == bool:
        alpha = values.view(np.uint8) * np.uint8(255)
    else:
        alpha = values if values.dtype == np.uint8 else np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    if alpha.shape == tuple(size):
        return alpha
    if not alpha.any():  # most objects are not on every frame
        return np.zeros(size, np.uint8)
    larger = size[0] > alpha.shape[0] or size[1] > alpha.shape[1]
    method, gap = (Image.Resampling.NEAREST, None) if larger else (Image.Resampling.BILINEAR, 1.0)
    return np.array(Image.fromarray(alpha).resize(tuple(size)[::-1], method, reducing_gap=gap))


def _filled(
    picture: Image.Image, alphas: Sequence[np.ndarray], colours: Sequence[tuple[int, int, int]], style: str, opacity: float
) -> Image.Image:
    """The frame in the style, without lines."""
    if style == "outline":
        return picture.copy()
    if style == "tint":
        shown, strengths = picture.copy(), [round(0.5 * opacity * level) for level in range(256)]
        for alpha, colour in zip(alphas, colours, strict=True):
            if box := _box(alpha, 0):
                rows, cols = box
                shown.paste(colour, (cols.start, rows.start, cols.stop, rows.stop), Image.fromarray(alpha[box]).point(strengths))
        return shown
    if style == "spotlight":
        shown = picture.convert("RGB", _NEARLY_GREY)
    else:
        shown = _checkerboard(picture.size[::-1]).copy() if style == "checkerboard" else Image.new("RGB", picture.size)
    if opacity < 1:
        shown = Image.blend(picture, shown, opacity)
    if alphas:
        # Along a border that two objects share, what is in part of both is wholly of them.
        together = alphas[0] if len(alphas) == 1 else np.add.reduce(alphas, dtype=np.uint16).clip(max=255).astype(np.uint8)
        inside = Image.new("RGB", picture.size, (255, 255, 255)) if style == "matte" else picture
        shown.paste(inside, mask=Image.fromarray(together))
    return shown


@lru_cache(maxsize=2)
def _checkerboard(size: tuple[int, int]) -> Image.Image:
    """Of (H, W) pixels; not to be drawn on."""
    height, width = size
    side = max(4 * line_width(torch.empty(size, device="meta")), 6)
    odd = (np.arange(height)[:, None] // side + np.arange(width) // side) % 2 == 1
    return Image.fromarray(np.where(odd, np.uint8(_SQUARES[0]), np.uint8(_SQUARES[1]))).convert("RGB")


def _box(mask: np.ndarray, margin: int) -> tuple[slice, slice] | None:
    """The part of the frame around a mask, or None if it is empty."""
    rows, cols = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    if not len(rows):
        return None
    return tuple(slice(max(int(places[0]) - margin, 0), int(places[-1]) + 1 + margin) for places in (rows, cols))


def _line(shown: Image.Image, alpha: np.ndarray, width: int, colour: tuple[int, int, int]) -> None:
    """A bright line along the edge with a dark casing on both sides, so that it stands out on any content. As smooth as the mask's edge."""
    casing = max(width // 2, 1)
    box = _box(alpha >= 128, width + casing + 2)
    if box is None:
        return
    part = _narrowed(alpha[box])
    wide = _grown(part, width)
    dark = np.minimum(_grown(wide, casing), 255 - _shrunk(part, casing))
    corner = box[1].start, box[0].start
    for paint, where in ((_CASING, dark), (colour, np.minimum(wide, 255 - part))):
        shown.paste(paint, (*corner, corner[0] + where.shape[1], corner[1] + where.shape[0]), Image.fromarray(where))


def _narrowed(alpha: np.ndarray) -> np.ndarray:
    """With the same half level, but an edge that rises over _LINE_EDGE pixels where it is wider."""
    soft = np.count_nonzero((alpha > 0) & (alpha < 255))
    if not soft:
        return alpha
    whole = (alpha >= 128).view(np.uint8)
    steeper = soft / max(np.count_nonzero(whole != _shrunk(whole, 1)), 1) / _LINE_EDGE
    if steeper <= 1:
        return alpha
    return np.rint((alpha - np.float32(127.5)) * np.float32(steeper) + np.float32(127.5)).clip(0, 255).astype(np.uint8)


def _grown(alpha: np.ndarray, by: int) -> np.ndarray:
    """(H, W) uint8: of each pixel the highest value within `by` steps. The frame's border is no edge."""
    grown = alpha.copy()
    for _ in range(by):
        before = grown.copy()
        np.maximum(grown[1:], before[:-1], out=grown[1:])
        np.maximum(grown[:-1], before[1:], out=grown[:-1])
        np.maximum(grown[:, 1:], before[:, :-1], out=grown[:, 1:])
        np.maximum(grown[:, :-1], before[:, 1:], out=grown[:, :-1])
    return grown


def _shrunk(alpha: np.ndarray, by: int) -> np.ndarray:
    """The lowest value."""
    return ~_grown(~alpha, by)


def _write_numbers(
    shown: Image.Image, alphas: Sequence[np.ndarray], numbers: Sequence[int], colours: Sequence[tuple[int, int, int]]
) -> None:
    """The number of each object in its colour on a dark plate, at the top of the object."""
    width, height = shown.size
    size = max(round(min(height, width) / 22), 11)
    draw = ImageDraw.Draw(shown)
    for alpha, number, colour in zip(alphas, numbers, colours, strict=True):
        box = _box(alpha >= 128, 0)
        if box is None:
            continue
        text, font = str(number), font_for(str(number), size)
        plate = (draw.textlength(text, font=font) + 0.7 * size, 1.35 * size)
        left = min(max((box[1].start + box[1].stop - plate[0]) / 2, 0), max(width - plate[0], 0))
        top = min(max(box[0].start - plate[1] / 2, 0), max(height - plate[1], 0))
        draw.rounded_rectangle((left, top, left + plate[0], top + plate[1]), radius=0.3 * size, fill=_CASING)
        draw.text((left + plate[0] / 2, top + plate[1] / 2), text, fill=colour, font=font, anchor="mm")
