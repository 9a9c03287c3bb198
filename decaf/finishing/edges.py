"""One mask made larger, smaller, soft, or whole. Masks are (H, W) bool arrays. The frame's border is no edge: nothing shrinks or softens there."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter

from ..contours import WIDTH
from ..errors import DecafError


def box_of(mask: np.ndarray, margin: int = 0) -> tuple[slice, slice] | None:
    """The rectangle around a mask, wider by `margin` where the frame has room, or None if the mask is empty."""
    rows, cols = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    if not len(rows):
        return None
    return tuple(slice(max(int(places[0]) - margin, 0), int(places[-1]) + 1 + margin) for places in (rows, cols))


def distance(mask: np.ndarray, reach: int) -> np.ndarray:
    """(H, W) float32: how far each pixel's centre is from the nearest one in the mask. Exact up to `reach`; farther ones have reach + 1."""
    far = reach + 1
    whole = np.int16 if far < 128 and len(mask) < 32000 else np.int32  # holds the sum of two squares of `far`, and a row before the first
    rows = np.arange(len(mask), dtype=whole)[:, None]
    above = np.maximum.accumulate(np.where(mask, rows, whole(-far)), axis=0)
    below = np.minimum.accumulate(np.where(mask, rows, whole(len(mask) + far))[::-1], axis=0)[::-1]
    # First along columns, then along rows: squares of distances add up.
    columns = np.minimum(np.minimum(rows - above, below - rows), whole(far)) ** 2
    best = columns.copy()
    for step in range(1, min(reach, mask.shape[1] - 1) + 1):
        nearer = columns + whole(step * step)
        np.minimum(best[:, step:], nearer[:, :-step], out=best[:, step:])
        np.minimum(best[:, :-step], nearer[:, step:], out=best[:, :-step])
    return np.sqrt(np.minimum(best, whole(far * far)), dtype=np.float32)


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    """The mask with every pixel within `by` pixels of it, as if a disc were drawn along it; negative: without those as near to the outside."""
    box = box_of(mask, max(by, 0) + 1)
    if not by or box is None:
        return mask
    changed = np.zeros_like(mask)
    part = mask[box]
    changed[box] = distance(part, by) <= by if by > 0 else distance(~part, -by) > -by
    return changed


def feathered(mask: np.ndarray, width: float) -> np.ndarray:
    """(H, W) uint8: 0 outside and 255 inside, rising over `width` pixels to either side of the contour. At least 128 just inside the mask.

    The value follows the distance to the contour. The stairs of the contour are smoothed, but no pixel changes its side of the half level.
    """
    alpha = mask.astype(np.uint8) * np.uint8(255)
    reach = int(np.ceil(width)) + 2
    box = box_of(mask, reach + 1)
    if width <= 0 or box is None:
        return alpha
    part = mask[box]
    signed = np.where(part, distance(~part, reach), -distance(part, reach))
    signed -= np.where(part, np.float32(0.5), np.float32(-0.5))  # the contour lies between two pixels
    for _ in range(2):
        signed = _smoothed(signed)
    near = (signed > -width) & (signed < width)
    rise = signed[near] / (2 * width) + 0.5
    soft = np.rint(rise * rise * (3 - 2 * rise) * 255).astype(np.uint8)
    alpha[box][near] = np.where(part[near], np.maximum(soft, 128), np.minimum(soft, 127))
    return alpha


def softened(alpha: np.ndarray, mask: np.ndarray, width: float) -> np.ndarray:
    """The same from a mask that has a narrow soft edge already, `alpha`, and knows the contour more exactly than to a pixel: no stairs are left."""
    box = box_of(alpha > 0, math.ceil(width) + 2)
    if box is None:
        return alpha
    part, picture = mask[box], Image.fromarray(np.ascontiguousarray(alpha[box]))
    # Twice, so that the edge rises slowly at both ends; as far as makes it, as it is, as wide as `feathered` would.
    radius = (math.sqrt(1 + 6 * max(width * width / 5 - WIDTH * WIDTH / 12, 0)) - 1) / 2
    for _ in range(2):
        picture = picture.filter(ImageFilter.BoxBlur(radius))
    soft = np.asarray(picture)
    changed = np.zeros_like(alpha)
    changed[box] = np.where(part, np.maximum(soft, 128), np.minimum(soft, 127))
    return changed


def ramp(alpha: np.ndarray, whole: np.ndarray) -> int:
    """How far soft pixels of an alpha (H, W) uint8 lie from the contour of its mask `whole`, in pixels, rounded up; at most _FARTHEST + 1."""
    soft = (alpha > 0) & (alpha < 255)
    box = box_of(soft, _FARTHEST)
    if box is None:
        return 0
    soft, part = soft[box], whole[box]
    farthest = [distance(side, _FARTHEST)[soft & ~side].max(initial=0) for side in (part, ~part)]
    return int(np.ceil(max(farthest)))


_FARTHEST = 32


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Each value mixed with its eight neighbours, by weights 1, 2, 1 along rows and columns."""
    for axis in (0, 1):
        padded = np.pad(values, [(1, 1) if one == axis else (0, 0) for one in (0, 1)], mode="edge")
        before, after = (padded[:-2], padded[2:]) if axis == 0 else (padded[:, :-2], padded[:, 2:])
        values = (before + 2 * values + after) / 4
    return values


def extended_to_border(mask: np.ndarray, width: int) -> np.ndarray:
    """The mask, whose `width` outermost rows and columns repeat the ones next to them."""
    height, length = mask.shape
    if not width or min(height, length) <= 2 * width:
        return mask
    return np.pad(mask[width : height - width, width : length - width], width, mode="edge")


def without_holes_and_specks(mask: np.ndarray, holes: int, specks: int) -> np.ndarray:
    """The mask without separate parts of fewer than `specks` pixels, and with holes of up to `holes` pixels filled. Parts are connected over
    edges and corners, holes over edges. What touches the frame's border is no hole.

    DecafError: scipy, which finds the parts, is not installed.
    """
    box = box_of(mask)
    if box is None or not (holes or specks):
        return mask
    label = part_finder()
    part = np.pad(mask[box], 1)
    if specks:
        numbers, _ = label(part, np.ones((3, 3), bool))
        sizes = np.bincount(numbers.ravel())
        kept = sizes >= specks
        kept[0] = False
        part = kept[numbers]
    if holes:
        numbers, _ = label(~part)
        small = np.bincount(numbers.ravel()) <= holes
        small[0] = small[numbers[0, 0]] = False  # the mask itself, and what lies around it
        part = part | small[numbers]
    changed = np.zeros_like(mask)
    changed[box] = part[1:-1, 1:-1]
    return changed


def part_finder():
    """scipy's `ndimage.label`; DecafError if it is not installed. ComfyUI brings scipy. The command does without: it is as large as all else
    that the command needs."""
    try:
        from scipy.ndimage import label
    except ImportError as error:
        raise DecafError(
            "To fill holes and drop specks, scipy is needed, which is not installed here. Install it (pip install scipy), or set holes and "
            "specks to 0."
        ) from error
    return label
