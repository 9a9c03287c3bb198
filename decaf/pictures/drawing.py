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
"""Colour-blind-safe palette (Okabe and Ito, with grey instead of black). It starts again for further objects."""

# From violet over red to yellow with rising brightness, so that more attention is lighter in a greyscale print too.
_HEAT = torch.tensor([[24, 12, 58], [92, 20, 116], [164, 36, 102], [222, 66, 62], [248, 124, 30], [253, 194, 52], [252, 252, 176]]) / 255

_LINE, _CUT = torch.tensor([255, 255, 255], dtype=torch.uint8), torch.tensor([255, 196, 0], dtype=torch.uint8)
_DOT, _RING = torch.tensor([64.0, 230.0, 255.0]), torch.tensor([10.0, 16.0, 28.0])


def heat_colours(values: Tensor) -> Tensor:
    """Values (...) in 0..1 -> colours (..., 3) float in 0..1."""
    position = values.clamp(0, 1) * (len(_HEAT) - 1)
    low = position.floor().long().clamp(max=len(_HEAT) - 2)
    return torch.lerp(_HEAT[low], _HEAT[low + 1], (position - low)[..., None])


def heat_overlay(frame: Tensor, attention: Tensor, mask: Tensor | None = None, points: Tensor | None = None) -> Tensor:
    """A heat map over the frame.

    Args:
        attention: (rows, cols) in 0..1.
        mask: bool, any size; its outline is drawn.
        points: (n, 2) in 0..1; drawn as dots.
    """
    height, width = frame.shape[:2]
    value = resize(attention[None].float(), (height, width))[0]
    # The frame shows through where attention is low and is mostly covered where it is high.
    opacity = (0.25 + 0.55 * value)[..., None]
    shown = torch.lerp(_dimmed(frame, 0.65), heat_colours(value) * 255, opacity)
    shown = shown.round_().to(torch.uint8)
    if mask is not None:
        shown = torch.where(_outline(fit_mask(mask, (height, width)), line_width(frame))[..., None], _LINE, shown)
    if points is not None:
        shown = dots(shown, points, attention.shape)
    return shown


def cut_out(frame: Tensor, mask: Tensor) -> Tensor:
    """The frame inside `mask` (any size, bool) with an outline; the rest is nearly black."""
    mask = fit_mask(mask, frame.shape[:2])
    shown = torch.where(mask[..., None], frame, _dimmed(frame, 0.25).to(torch.uint8))
    return torch.where(_outline(mask, line_width(frame))[..., None], _CUT, shown)


def point_overlay(frame: Tensor, points: Tensor, grid: Sequence[int]) -> Tensor:
    """`points` (n, 2) in 0..1 as dots over the dimmed frame. `grid`: (rows, cols) of the attention map that they come from."""
    return dots(_dimmed(frame, 0.6).to(torch.uint8), points, grid)


def dots(frame: Tensor, points: Tensor, grid: Sequence[int]) -> Tensor:
    """`points` (n, 2) in 0..1 as bright dots with a dark ring. They are smaller than the cells of `grid` (rows, cols), so neighbours do not touch."""
    height, width = frame.shape[:2]
    cell = min(height / grid[0], width / grid[1])
    radius = min(max(0.33 * cell, 1.2), max(math.hypot(height, width) / 100, 1.2))
    shown = frame.float()
    half_size = math.ceil(radius * 1.5) + 1
    for x, y in (points.double() * torch.tensor([width, height])).tolist():
        top, left = max(int(y) - half_size, 0), max(int(x) - half_size, 0)
        patch = shown[top : int(y) + half_size + 1, left : int(x) + half_size + 1]
        ys = torch.arange(top, top + patch.shape[0]) + 0.5 - y
        xs = torch.arange(left, left + patch.shape[1]) + 0.5 - x
        distance = torch.hypot(ys[:, None].expand(patch.shape[:2]), xs[None].expand(patch.shape[:2])).float()[..., None]
        for disc_radius, colour in ((radius * 1.5, _RING), (radius, _DOT)):  # pixels on the edge are blended (antialiasing)
            patch.lerp_(colour.expand_as(patch), (disc_radius + 0.5 - distance).clamp(0, 1).expand_as(patch))
    return shown.round_().to(torch.uint8)


def line_width(frame: Tensor) -> int:
    """Width of a line over the frame, in pixels: 3 at 720p."""
    return max(round(math.hypot(*frame.shape[:2]) / 500), 1)


def fit_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """(H, W) bool -> (*size) bool by nearest neighbour; the mask itself if it has that size."""
    if tuple(mask.shape) == tuple(size):
        return mask
    return interpolate(mask[None, None].to(torch.uint8), size=tuple(size), mode="nearest-exact")[0, 0].bool()


def _outline(mask: Tensor, width: int) -> Tensor:
    """(H, W) bool: the pixels of `mask` within `width` of its edge. The frame's border does not count as an edge."""
    inner = mask.clone()
    for _ in range(width):
        previous = inner.clone()
        inner[1:] &= previous[:-1]
        inner[:-1] &= previous[1:]
        inner[:, 1:] &= previous[:, :-1]
        inner[:, :-1] &= previous[:, 1:]
    return mask & ~inner


def _dimmed(frame: Tensor, brightness: float) -> Tensor:
    """(H, W, 3) float 0..255: darker and half desaturated, so that drawings on it stand out."""
    pixels = frame.float()
    return torch.lerp(pixels, pixels.mean(-1, keepdim=True).expand_as(pixels), 0.5) * brightness
