"""Objects shown in a frame, for people: in one of several styles, each object with a line of its own colour and its number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .drawing import OBJECT_COLOURS, fit_mask, line_width
from .lettering import font_for

_CASING = torch.tensor([14, 14, 18], dtype=torch.uint8)
_SQUARES = (96, 144)
"""Greys of the checkerboard."""


def show_objects(
    frame: Tensor, masks: Sequence[Tensor], style: str = "spotlight", *, opacity: float = 1.0, numbers: Sequence[int] | None = None
) -> Tensor:
    """The frame (H, W, 3) uint8 with its objects shown, of the same size.

    Args:
        masks: (h, w) of any size: bool, or float 0..1 with soft edges. Later ones lie on top.
        style: one of `decaf.settings.STYLES`.
        opacity: 0..1, how strongly the style shows: at 0 the frame stays as it is, but for lines and numbers.
        numbers: of each object, written at it; None writes none.
    """
    masks = [fit_mask(mask, frame.shape[:2]) for mask in masks]
    shown = _filled(frame, masks, style, opacity)
    if style == "matte":
        return shown
    whole = [mask if mask.dtype == torch.bool else mask >= 0.5 for mask in masks]
    if style != "checkerboard":
        for index, mask in enumerate(whole):
            _line(shown, mask, OBJECT_COLOURS[index % len(OBJECT_COLOURS)])
    return shown if numbers is None else _numbered(shown, whole, numbers)


def on_checkerboard(picture: Tensor) -> Tensor:
    """A picture (H, W, 4) uint8 with straight alpha on a checkerboard, (H, W, 3) uint8; one without alpha as it is."""
    return picture if picture.shape[-1] == 3 else _mixed(_checkerboard(picture), picture[..., :3], picture[..., 3])


def _filled(frame: Tensor, masks: Sequence[Tensor], style: str, opacity: float) -> Tensor:
    """The frame in the style, without lines."""
    if style == "outline":
        return frame.clone()
    if style == "tint":
        shown = frame.clone()
        for index, mask in enumerate(masks):
            colour = torch.tensor(OBJECT_COLOURS[index % len(OBJECT_COLOURS)], dtype=torch.uint8)
            box = _box(mask > 0, 0)
            if box is not None:
                shown[box] = _mixed(shown[box], colour.expand_as(shown[box]), _alpha(mask[box], 0.5 * opacity))
        return shown
    shown = {"spotlight": _dark, "checkerboard": _checkerboard, "matte": torch.zeros_like}[style](frame).clone()
    if opacity < 1:
        shown = _mixed(frame, shown, torch.full(frame.shape[:2], round(255 * opacity), dtype=torch.uint8))
    inside = torch.full_like(frame, 255) if style == "matte" else frame
    for mask in masks:
        box = _box(mask > 0, 0)
        if box is not None:
            cut, seen, part = mask[box], inside[box], shown[box]
            shown[box] = torch.where(cut[..., None], seen, part) if cut.dtype == torch.bool else _mixed(part, seen, _alpha(cut, 1.0))
    return shown


def _alpha(mask: Tensor, strength: float) -> Tensor:
    """0..255 uint8."""
    if mask.dtype == torch.bool:
        return mask.to(torch.uint8) * round(255 * strength)
    return (mask.clamp(0, 1) * (255 * strength)).round_().to(torch.uint8)


def _mixed(below: Tensor, above: Tensor, alpha: Tensor) -> Tensor:
    """`above` over `below`, all uint8; whole numbers are several times faster here than floating point."""
    share = alpha[..., None].to(torch.int32)
    return (below + ((above.to(torch.int32) - below) * share + 127).div_(255, rounding_mode="floor")).to(torch.uint8)


def _dark(frame: Tensor) -> Tensor:
    """Nearly grey, and at a third of its brightness."""
    pixels = frame.to(torch.int16)
    red, green, blue = pixels.unbind(-1)
    return (pixels + (red + green + blue)[..., None]).div_(12, rounding_mode="floor").to(torch.uint8)


def _checkerboard(frame: Tensor) -> Tensor:
    height, width = frame.shape[:2]
    side = max(4 * line_width(frame), 6)
    odd = (torch.arange(height)[:, None] // side + torch.arange(width) // side) % 2 == 1
    return torch.where(odd, *(torch.tensor(grey, dtype=torch.uint8) for grey in _SQUARES))[..., None].expand(-1, -1, 3)


def _box(mask: Tensor, margin: int) -> tuple[slice, slice] | None:
    """The part of the frame around a mask, or None if it is empty."""
    pixels = mask.numpy()  # its any() is thirty times faster than PyTorch's
    rows, cols = pixels.any(1).nonzero()[0], pixels.any(0).nonzero()[0]
    if not len(rows):
        return None
    return tuple(slice(max(int(places[0]) - margin, 0), int(places[-1]) + 1 + margin) for places in (rows, cols))


def _line(shown: Tensor, mask: Tensor, colour: tuple[int, int, int]) -> None:
    """A bright line along the mask's edge with a dark casing on both sides, so that it stands out on any content."""
    width = max(line_width(shown), 2)
    casing = max(width // 2, 1)
    box = _box(mask, width + casing + 1)
    if box is None:
        return
    mask, part = mask[box], shown[box]
    wide = _grown(mask, width)
    dark = _grown(wide, casing) & ~_grown(mask, -casing)
    part[dark] = _CASING
    part[wide & ~mask] = torch.tensor(colour, dtype=torch.uint8)


def _grown(mask: Tensor, by: int) -> Tensor:
    """(H, W) bool, with every pixel within `by` steps; negative takes as many away. The frame's border is no edge."""
    grown = mask.clone() if by >= 0 else ~mask
    for _ in range(abs(by)):
        before = grown.clone()
        grown[1:] |= before[:-1]
        grown[:-1] |= before[1:]
        grown[:, 1:] |= before[:, :-1]
        grown[:, :-1] |= before[:, 1:]
    return grown if by >= 0 else ~grown


def _numbered(shown: Tensor, masks: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """The number of each object in its colour on a dark plate, at the top of the object."""
    height, width = shown.shape[:2]
    size = max(round(min(height, width) / 22), 11)
    picture = Image.fromarray(shown.numpy())
    draw = ImageDraw.Draw(picture)
    for index, (mask, number) in enumerate(zip(masks, numbers, strict=True)):
        box = _box(mask, 0)
        if box is None:
            continue
        text, font = str(number), font_for(str(number), size)
        plate = (draw.textlength(text, font=font) + 0.7 * size, 1.35 * size)
        left = min(max((box[1].start + box[1].stop - plate[0]) / 2, 0), max(width - plate[0], 0))
        top = min(max(box[0].start - plate[1] / 2, 0), max(height - plate[1], 0))
        draw.rounded_rectangle((left, top, left + plate[0], top + plate[1]), radius=0.3 * size, fill=tuple(_CASING.tolist()))
        colour = OBJECT_COLOURS[index % len(OBJECT_COLOURS)]
        draw.text((left + plate[0] / 2, top + plate[1] / 2), text, fill=colour, font=font, anchor="mm")
    return torch.from_numpy(np.array(picture))
