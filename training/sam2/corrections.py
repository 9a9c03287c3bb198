"""Corrections to learn from: masks that are wrong, and what a person would click at them. Each kind is drawn for a picture of labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

NEGATIVE, POSITIVE, LEFT_TOP, RIGHT_BOTTOM = 0, 1, 2, 3
"""What SAM 2's prompt encoder calls them."""

SMALLEST = 300
"""Pixels of an object below which it is not corrected."""

_WORTH_A_CLICK = 250
"""Pixels that are wrong before somebody clicks at them."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Correction:
    """`picture`: its index; `truth`: (S, S) bool, the object that is wanted; `before`: (S, S) bool, the mask as it was, or None; `xy`: points
    in pixels, a box as its two corners; `labels`: of the points."""

    picture: int
    truth: np.ndarray
    before: np.ndarray | None
    xy: tuple[Point, ...]
    labels: tuple[int, ...]


def inside(rng: np.random.Generator, region: np.ndarray) -> Point:
    """Where a person would click at a region: well inside its largest part."""
    parts, _ = ndimage.label(region)
    largest = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    depth = ndimage.distance_transform_edt(np.pad(largest, 1))[1:-1, 1:-1]
    ys, xs = np.nonzero(depth >= depth.max() * rng.uniform(0.5, 1.0))
    i = rng.integers(len(ys))
    return float(xs[i] + 0.5), float(ys[i] + 0.5)


def objects_of(labels: np.ndarray) -> list[int]:
    return [k for k, area in enumerate(np.bincount(labels.ravel())) if k and area >= SMALLEST]


def neighbours(labels: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of objects that touch, in both orders."""
    pairs = set()
    for step in (1, 2):
        for one, other in ((labels[:, step:], labels[:, :-step]), (labels[step:], labels[:-step])):
            met = (one != other) & (one > 0) & (other > 0)
            pairs |= {pair for a, b in zip(one[met].tolist(), other[met].tolist(), strict=True) for pair in ((a, b), (b, a))}
    large = set(objects_of(labels))
    return sorted(pair for pair in pairs if large.issuperset(pair))


def wobble(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """A mask as a tracker leaves it: at times grown or shrunk a little, or with a ragged edge."""
    if rng.random() < 0.3:
        return mask
    noise = ndimage.gaussian_filter(rng.normal(size=mask.shape), rng.uniform(2, 8))
    depth = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
    return depth + noise / noise.std() * rng.uniform(0, 3) + rng.normal() > 0


def of_own_mask(rng: np.random.Generator, picture: int, truth: np.ndarray, mask: np.ndarray, point: Point) -> dict[str, Correction]:
    """Corrections of what the model itself has made of a point, by kind; none if there is little to correct or hardly anything is right."""
    extra, missing = mask & ~truth, truth & ~mask
    if (mask & truth).sum() < 200 or max(extra.sum(), missing.sum()) < _WORTH_A_CLICK:
        return {}
    if extra.sum() > missing.sum():
        click = inside(rng, extra)
        return {
            "spill": Correction(picture, truth, mask, (click,), (NEGATIVE,)),
            "points of both kinds": Correction(picture, truth, None, (point, click), (POSITIVE, NEGATIVE)),
        }
    return {"missing": Correction(picture, truth, mask, (inside(rng, missing),), (POSITIVE,))}


def made_up(rng: np.random.Generator, picture: int, labels: np.ndarray, kind: str) -> Correction | None:
    """A correction of this kind of `MADE_UP`; None if the picture has no objects for it."""
    if kind in ("neighbour", "part of a neighbour", "neighbour, two points", "neighbour, box"):
        pairs = neighbours(labels)
        if not pairs:
            return None
        wanted, other = (labels == k for k in pairs[rng.integers(len(pairs))])
        if kind == "part of a neighbour":
            other = _disc(rng, other)
            if other.sum() < 80:
                return None
        before = wobble(rng, wanted | other)
        if kind == "neighbour, box":
            return Correction(picture, wanted, before, _box(rng, wanted), (LEFT_TOP, RIGHT_BOTTOM))
        if kind == "neighbour, two points":
            return Correction(picture, wanted, before, (inside(rng, wanted), inside(rng, other)), (POSITIVE, NEGATIVE))
        return Correction(picture, wanted, before, (inside(rng, other),), (NEGATIVE,))
    objects = objects_of(labels)
    if not objects:
        return None
    wanted = labels == rng.choice(objects)
    if kind == "box":
        return Correction(picture, wanted, None, _box(rng, wanted), (LEFT_TOP, RIGHT_BOTTOM))
    if kind == "another object":
        others = [k for k in objects if not wanted[labels == k].any()]
        if not others:
            return None
        other = labels == rng.choice(others)
        return Correction(picture, wanted, wobble(rng, wanted | other), (inside(rng, other),), (NEGATIVE,))
    ys, xs = np.nonzero(wanted)  # "half"
    angle = rng.uniform(0, 2 * np.pi)
    along = xs * np.cos(angle) + ys * np.sin(angle)
    gone = along > np.quantile(along, rng.uniform(0.3, 0.7))
    missing = np.zeros_like(wanted)
    missing[ys[gone], xs[gone]] = True
    return Correction(picture, wanted, wanted & ~missing, (inside(rng, missing),), (POSITIVE,))


MADE_UP = ("neighbour", "part of a neighbour", "another object", "half", "box", "neighbour, box", "neighbour, two points")


def _disc(rng: np.random.Generator, region: np.ndarray) -> np.ndarray:
    x, y = inside(rng, region)
    ys, xs = np.mgrid[: len(region), : region.shape[1]]
    return region & ((ys - y) ** 2 + (xs - x) ** 2 < rng.uniform(10, 50) ** 2)


def _box(rng: np.random.Generator, mask: np.ndarray) -> tuple[Point, Point]:
    """Around the object, drawn by hand: a few pixels off."""
    ys, xs = np.nonzero(mask)
    off = rng.uniform(-3, 5, 4)
    corners = np.array([xs.min() - off[0], ys.min() - off[1], xs.max() + 1 + off[2], ys.max() + 1 + off[3]]).clip(0, len(mask))
    left, top, right, bottom = corners.tolist()
    return (left, top), (right, bottom)
