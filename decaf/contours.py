"""Soft edges of masks, from what a segmenter's logits say near the contour.

A segmenter gives few logits, 256 x 256 for SAM 2, which are enlarged to the frame; the mask is where they are above 0. How fast they rise
there says how far the contour is from the middle of each pixel, in fractions of a pixel: that is how much of the pixel belongs to the object.
"""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
from torch import Tensor

REACH = 1
"""Pixels to either side of the contour, along rows and columns, whose alpha may be soft."""

WIDTH = 1.5
"""Pixels over which a soft edge rises. One is a sharp edge seen by a grid of pixels; a camera and compression blur it a little more."""

_HEAD = struct.Struct("<HHf")  # rows and columns of logits, and the largest of those that are kept
_LEVELS = 127


def packed_edge(logits: Tensor, frame_size: tuple[int, int]) -> bytes:
    """(h, w) logits, before they are enlarged to a frame of `frame_size` (H, W) -> what `edge_alpha` needs of them, compressed.

    The sign of all, and the size of those near the contour in 127 levels, which are finer towards 0: one to three kB for an object on a full HD
    frame.
    """
    values = logits.detach().float().cpu().numpy()
    inside = values > 0
    kept = _kept(inside, frame_size)
    sizes = np.abs(values[kept])
    highest = float(sizes.max(initial=0))
    if not 0 < highest < math.inf:
        return b""
    levels = np.rint(np.sqrt(sizes / highest) * _LEVELS).astype(np.uint8)
    return zlib.compress(_HEAD.pack(*values.shape, highest) + np.packbits(inside).tobytes() + levels.tobytes(), 1)


def edge_alpha(packed: bytes, frame_size: tuple[int, int], rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """(n,) uint8: how much of the pixels at (n,) `rows` and `cols` of the frame belongs to the object, 255 all. Right within REACH of its
    contour, and 0 or 255 beyond.
    """
    data = zlib.decompress(packed)
    height, width, highest = _HEAD.unpack_from(data)
    bits = (height * width + 7) // 8
    inside = np.unpackbits(np.frombuffer(data, np.uint8, bits, _HEAD.size), count=height * width).view(bool).reshape(height, width)
    kept = _kept(inside, frame_size)
    values = np.where(inside, np.float32(highest), np.float32(-highest))
    values[kept] *= (np.frombuffer(data, np.uint8, -1, _HEAD.size + bits).astype(np.float32) / _LEVELS) ** 2
    down, along = _Axis(height, frame_size[0]), _Axis(width, frame_size[1])
    alpha = inside[down.low[rows], along.low[cols]] * np.uint8(255)
    near = kept[down.low[rows], along.low[cols]].nonzero()[0]
    y, x = rows[near], cols[near]
    here = _enlarged(values, down, along, y, x)
    steepness = np.hypot(_slope(values, down, along, y, x, 0), _slope(values, down, along, y, x, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 0.5 + here / (steepness * WIDTH)  # `here / steepness` is the distance to the contour, in pixels
    alpha[near] = np.rint(np.clip(np.nan_to_num(share, nan=0.5, posinf=1, neginf=0), 0, 1) * 255).astype(np.uint8)
    return alpha


def near_contour(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a mask (H, W) bool that have the other side of its contour within REACH of them."""
    rows, cols = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    if not len(rows):
        return rows, cols
    top, left = max(int(rows[0]) - REACH, 0), max(int(cols[0]) - REACH, 0)
    part = mask[top : rows[-1] + REACH + 1, left : cols[-1] + REACH + 1]
    y, x = (_widened(part, REACH, REACH) & _widened(~part, REACH, REACH)).nonzero()
    return y + top, x + left


def _kept(inside: np.ndarray, frame_size: tuple[int, int]) -> np.ndarray:
    """(h, w) bool: the logits on which the pixels within REACH of the contour depend, and their neighbours."""
    changes = np.zeros_like(inside)
    for first, second in (((slice(None, -1),), (slice(1, None),)), ((slice(None), slice(None, -1)), (slice(None), slice(1, None)))):
        differ = inside[first] != inside[second]
        changes[first] |= differ
        changes[second] |= differ
    # Between two logits of different sign lies the contour: how many logits further do REACH pixels and one more reach?
    return _widened(changes, *(math.ceil((REACH + 1) * few / many) for few, many in zip(inside.shape, frame_size, strict=True)))


def _widened(mask: np.ndarray, down: int, along: int) -> np.ndarray:
    """With every pixel up to so many rows and columns away."""
    for axis, by in ((0, down), (1, along)):
        wider = mask.copy()
        to, into = (wider, mask) if axis == 0 else (wider.T, mask.T)
        for step in range(1, min(by, len(into) - 1) + 1):
            to[step:] |= into[:-step]
            to[:-step] |= into[step:]
        mask = wider
    return mask


class _Axis:
    """Where the pixels of one side of the frame lie among the logits, as in PyTorch's bilinear enlargement: between `low` and `high`, at `share`
    of the way."""

    def __init__(self, few: int, many: int):
        places = np.maximum((np.arange(many) + 0.5) * few / many - 0.5, 0)
        self.low = np.minimum(places.astype(np.intp), few - 1)
        self.high = np.minimum(self.low + 1, few - 1)
        self.share = (places - self.low).astype(np.float32)
        self.last = many - 1


def _enlarged(values: np.ndarray, down: _Axis, along: _Axis, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(n,) values between the logits, at pixels of the frame."""
    top, bottom, left, right, across = down.low[y], down.high[y], along.low[x], along.high[x], along.share[x]
    upper = values[top, left] + (values[top, right] - values[top, left]) * across
    lower = values[bottom, left] + (values[bottom, right] - values[bottom, left]) * across
    return upper + (lower - upper) * down.share[y]


def _slope(values: np.ndarray, down: _Axis, along: _Axis, y: np.ndarray, x: np.ndarray, axis: int) -> np.ndarray:
    """(n,) change from pixel to pixel, along columns (axis 0) or rows."""
    here, last = (y, down.last) if axis == 0 else (x, along.last)
    before, after = np.maximum(here - 1, 0), np.minimum(here + 1, last)
    places = [(one, x) if axis == 0 else (y, one) for one in (before, after)]
    first, second = (_enlarged(values, down, along, *place) for place in places)
    return (second - first) / np.maximum(after - before, 1)
