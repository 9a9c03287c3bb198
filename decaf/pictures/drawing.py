"""Pictures over frames: heat maps, masks, outlines, points. Frames go in and come out as (H, W, 3) uint8 RGB tensors of the same size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..attention.fusion import resize

OBJECT_COLOURS = (
    (86, 180, 233), (230, 159, 0), (204, 121, 167), (240, 228, 66), (0, 158, 115), (213, 94, 0), (0, 114, 178), (170, 170, 170),
)  # fmt: skip
"""Told apart also by the colour-blind (the palette of Okabe and Ito, the last one grey); used again from the start for more objects."""

# Ever brighter from violet over red to yellow, so that more attention reads as more light, also in a grey print.
_HEAT = torch.tensor([[24, 12, 58], [92, 20, 116], [164, 36, 102], [222, 66, 62], [248, 124, 30], [253, 194, 52], [252, 252, 176]]) / 255

_LINE, _CUT = torch.tensor([255, 255, 255], dtype=torch.uint8), torch.tensor([255, 196, 0], dtype=torch.uint8)
_DOT, _RING = torch.tensor([64.0, 230.0, 255.0]), torch.tensor([10.0, 16.0, 28.0])


def heat_colours(values: Tensor) -> Tensor:
    """(...) in 0..1 -> (..., 3) float in 0..1."""
    place = values.clamp(0, 1) * (len(_HEAT) - 1)
    low = place.floor().long().clamp(max=len(_HEAT) - 2)
    return torch.lerp(_HEAT[low], _HEAT[low + 1], (place - low)[..., None])


def heat_overlay(frame: Tensor, attention: Tensor, mask: Tensor | None = None, points: Tensor | None = None) -> Tensor:
    """`attention` (rows, cols) in 0..1 as a heat map over the frame; on it the outline of `mask` (any size, bool) and `points` (n, 2)."""
    height, width = frame.shape[:2]
    value = resize(attention[None].float(), (height, width))[0]
    # Little attention leaves a dimmed frame, much leaves hardly any of it: what is there stays visible, where the model looks stands out.
    opacity = (0.25 + 0.55 * value)[..., None]
    shown = torch.lerp(_dimmed(frame, 0.65), heat_colours(value) * 255, opacity)
    shown = shown.round_().to(torch.uint8)
    if mask is not None:
        shown = torch.where(_outline(fit_mask(mask, (height, width)), line_width(frame))[..., None], _LINE, shown)
    if points is not None:
        shown = dots(shown, points, attention.shape)
    return shown


def cut_out(frame: Tensor, mask: Tensor) -> Tensor:
    """The frame inside `mask` (any size, bool), outlined, and nearly dark elsewhere."""
    mask = fit_mask(mask, frame.shape[:2])
    shown = torch.where(mask[..., None], frame, _dimmed(frame, 0.25).to(torch.uint8))
    return torch.where(_outline(mask, line_width(frame))[..., None], _CUT, shown)


def point_overlay(frame: Tensor, points: Tensor, grid: Sequence[int]) -> Tensor:
    """`points` (n, 2) in 0..1 as dots over the dimmed frame; `grid`: (rows, cols) of the attention they come from."""
    return dots(_dimmed(frame, 0.6).to(torch.uint8), points, grid)


def mask_overlay(frame: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Each of the `masks` (any size, bool) in a colour of its own, half transparent with a solid outline, later ones on top."""
    shown = frame.clone()
    for place, mask in enumerate(masks):
        mask = fit_mask(mask, frame.shape[:2])
        pixels = mask.numpy()  # whose any is thirty times faster
        rows, cols = pixels.any(1).nonzero()[0], pixels.any(0).nonzero()[0]
        if not len(rows):
            continue
        # With a pixel around it, so that an edge of the mask does not pass for the border of the frame.
        box = tuple(slice(max(int(one[0]) - 1, 0), int(one[-1]) + 2) for one in (rows, cols))
        mask, part = mask[box], shown[box]
        colour = torch.tensor(OBJECT_COLOURS[place % len(OBJECT_COLOURS)], dtype=torch.uint8)
        # Halves are added as bytes: 255 // 2 + 255 // 2 fits one.
        tinted = torch.where(mask[..., None], part // 2 + colour // 2, part)
        shown[box] = torch.where(_outline(mask, line_width(frame))[..., None], colour, tinted)
    return shown


def dots(frame: Tensor, points: Tensor, grid: Sequence[int]) -> Tensor:
    """`points` (n, 2) in 0..1 as bright dots with a dark ring, smaller than the cells of `grid` (rows, cols): neighbours stay apart."""
    height, width = frame.shape[:2]
    cell = min(height / grid[0], width / grid[1])
    radius = min(max(0.33 * cell, 1.2), max(math.hypot(height, width) / 100, 1.2))
    shown = frame.float()
    reach = math.ceil(radius * 1.5) + 1
    for x, y in (points.double() * torch.tensor([width, height])).tolist():
        top, left = max(int(y) - reach, 0), max(int(x) - reach, 0)
        patch = shown[top : int(y) + reach + 1, left : int(x) + reach + 1]
        ys = torch.arange(top, top + patch.shape[0]) + 0.5 - y
        xs = torch.arange(left, left + patch.shape[1]) + 0.5 - x
        distance = torch.hypot(ys[:, None].expand(patch.shape[:2]), xs[None].expand(patch.shape[:2])).float()[..., None]
        for reaches, colour in ((radius * 1.5, _RING), (radius, _DOT)):  # a pixel that the edge crosses is covered in part
            patch.lerp_(colour.expand_as(patch), (reaches + 0.5 - distance).clamp(0, 1).expand_as(patch))
    return shown.round_().to(torch.uint8)


def line_width(frame: Tensor) -> int:
    """Pixels that a line over the frame is wide: 3 on 720p."""
    return max(round(math.hypot(*frame.shape[:2]) / 500), 1)


def fit_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """(H, W) bool -> (*size) bool, nearest; the same mask if it has that size."""
    if tuple(mask.shape) == tuple(size):
        return mask
    return interpolate(mask[None, None].to(torch.uint8), size=tuple(size), mode="nearest-exact")[0, 0].bool()


def _outline(mask: Tensor, width: int) -> Tensor:
    """(H, W) bool: the pixels of `mask` within `width` of its edge, which does not run along the frame's border."""
    inner = mask.clone()
    for _ in range(width):
        previous = inner.clone()
        inner[1:] &= previous[:-1]
        inner[:-1] &= previous[1:]
        inner[:, 1:] &= previous[:, :-1]
        inner[:, :-1] &= previous[:, 1:]
    return mask & ~inner


def _dimmed(frame: Tensor, brightness: float) -> Tensor:
    """(H, W, 3) float 0..255, darker and half grey, so that what is drawn on it stands out."""
    pixels = frame.float()
    return torch.lerp(pixels, pixels.mean(-1, keepdim=True).expand_as(pixels), 0.5) * brightness
