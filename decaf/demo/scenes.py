"""Synthetic clips with ground truth: coloured shapes that move over a textured background, and queries whose answer is known.

The same seed and settings always give the same pixels, masks and queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import DecafError
from .asking import Query, ask_about
from .painting import BACKGROUNDS, COLOURS, SHAPES, ground, sprite
from .things import Thing

MOTIONS = ("left", "right", "up", "down", "still", "stops")
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
_GROWTH = (0.45, 0.75)
"""Relative sizes of an object in its first two frames if it appears late, and in its last two if it disappears early."""


@dataclass(frozen=True)
class Scene:
    """A clip with its objects and queries.

    Attributes:
        frames: (T, H, W, 3) uint8.
        masks: (N, T, H, W) bool, the visible pixels of each object. Objects later in the list are in front of earlier ones.
        background: one of BACKGROUNDS.
        queries: all queries about this scene, with their targets.
    """

    frames: np.ndarray
    masks: np.ndarray
    things: tuple[Thing, ...]
    background: str
    queries: tuple[Query, ...]

    def truth(self, query: Query) -> np.ndarray:
        """(T, H, W) bool: pixels of all the query's targets; empty for an absent object."""
        return self.masks[list(query.targets)].any(0) if query.targets else np.zeros(self.frames.shape[:3], bool)


def make_scene(
    seed: int,
    *,
    size: tuple[int, int] = (280, 364),
    length: int = 16,
    count: tuple[int, int] = (2, 4),
    radius: tuple[float, float] = (0.13, 0.24),
    lively: bool = True,
) -> Scene:
    """Draws a scene from its seed.

    Args:
        size: (H, W) of the frames in pixels.
        length: number of frames.
        count: minimum and maximum number of objects.
        radius: minimum and maximum, as shares of the shorter side.
        lively: some objects appear late, disappear early, cross the border or are partly hidden by others.

    Raises:
        DecafError: a size, length or count with which nothing can be seen.
    """
    if min(size) < 28 or length < 1 or not 1 <= count[0] <= count[1] <= len(COLOURS):
        raise DecafError(
            f"A scene of {length} frames of {size[1]}x{size[0]} pixels with {count[0]} to {count[1]} objects cannot be made. "
            f"Give at least one frame, 28 pixels a side and 1 to {len(COLOURS)} objects."
        )
    rng = np.random.default_rng(seed)
    things = _draw_things(rng, size, length, count, radius, lively)
    background = str(rng.choice(BACKGROUNDS))
    frames, masks = render(rng, things, background, size, length)
    return Scene(frames, masks, tuple(things), background, tuple(ask_about(rng, things, min(size))))


def draw_things(seed: int, *, size: tuple[int, int], length: int, count: tuple[int, int], radius: tuple[float, float]) -> list[Thing]:
    """The objects of the scene that `make_scene` draws with the same arguments, without its pixels: a hundredth of the time."""
    return _draw_things(np.random.default_rng(seed), size, length, count, radius, lively=True)


def _draw_things(rng, size, length: int, count, radius, lively: bool) -> list[Thing]:
    things: list[Thing] = []
    wanted = int(rng.integers(count[0], count[1] + 1))
    spread = 0.62 if lively and rng.random() < 0.4 else 1.0  # below 1, objects may overlap
    for tries in range(120):
        # Later tries are smaller, so that a crowded scene still gets its objects.
        shrink = 1 if tries < 60 else 0.7
        thing = _draw_thing(rng, things, size, length, (radius[0] * shrink, radius[1] * shrink), lively)
        if all(_apart(thing, other, spread) for other in things):
            things.append(thing)
        if len(things) == wanted:
            break
    return things


def _draw_thing(rng, things: list[Thing], size, length: int, radius, lively: bool) -> Thing:
    side = min(size)
    thing_radius = float(side * np.exp(rng.uniform(*np.log(radius))))
    free = [colour for colour in COLOURS if colour not in {thing.colour for thing in things}]
    shape = things[0].shape if things and rng.random() < 0.15 else str(rng.choice(SHAPES))
    rare = [motion for motion in MOTIONS if motion not in {thing.motion for thing in things}] or list(MOTIONS)
    motion = str(rng.choice(rare if rng.random() < 0.7 else MOTIONS)) if length > 1 else "still"
    path = _path(rng, motion, side, length)
    first, last = 0, length - 1
    if lively and length >= 6 and things and rng.random() < 0.22:
        if rng.random() < 0.6:
            first = int(rng.integers(length // 3, 2 * length // 3))
        else:
            last = int(rng.integers(length // 3, 2 * length // 3))
    # The whole path lies inside the frame, except for some objects that cross the border.
    margin = thing_radius * (
        rng.uniform(-0.3, 0.5) if lively and motion in _DIRECTIONS and motion != "still" and rng.random() < 0.2 else 1.0
    )
    limits = np.array([size[1], size[0]], np.float32)
    low, high = margin - path.min(0), limits - margin - path.max(0)
    middle = (low + high) / 2
    low, high = np.minimum(low, middle), np.maximum(high, middle)
    start = rng.uniform(low, high)
    return Thing(shape, str(rng.choice(free)), thing_radius, (start + path).astype(np.float32), motion, first, last)


def _path(rng, motion: str, side: int, length: int) -> np.ndarray:
    """(T, 2) offsets from the start position."""
    speed = rng.uniform(0.55, 1.0) * min(0.08 * side, 0.5 * side / max(length - 1, 1))
    steps = np.arange(length, dtype=np.float32)
    if motion == "stops":
        direction = list(_DIRECTIONS.values())[int(rng.integers(4))]
        steps = 1.6 * np.minimum(steps, rng.uniform(0.35, 0.55) * length)
    else:
        direction = _DIRECTIONS[motion]
    return steps[:, None] * speed * np.array(direction, np.float32)


def _apart(first: Thing, second: Thing, spread: float) -> bool:
    gaps = np.hypot(*(first.centres - second.centres).T)
    return bool((gaps >= spread * 0.95 * (first.radius + second.radius)).all())


def shown_size(thing: Thing, frame: int, length: int) -> float:
    """0..1, relative to `thing.radius`: 0 where a scene of `length` frames does not show it, less than 1 while it comes and goes."""
    if not thing.first <= frame <= thing.last:
        return 0.0
    step = _growing(thing, frame, length)
    return _GROWTH[step] if step < len(_GROWTH) else 1.0


def _growing(thing: Thing, frame: int, length: int) -> int:
    """Place in _GROWTH of a frame that shows the object; its length or more for full size."""
    age = frame - thing.first if thing.first else len(_GROWTH)
    remaining = thing.last - frame if thing.last < length - 1 else len(_GROWTH)
    return min(age, remaining)


def render(
    rng: np.random.Generator, things: list[Thing], background: str, size: tuple[int, int], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """`frames` and `masks` of a `Scene` of these objects."""
    height, width = size
    backdrop = ground(rng, background, height, width)
    frames = np.repeat(np.rint(backdrop).astype(np.uint8)[None], length, 0)
    masks = np.zeros((len(things), length, height, width), bool)
    for index, thing in enumerate(things):
        full = sprite(rng, thing.shape, thing.colour, thing.radius)
        brief = thing.first > 0 or thing.last < length - 1
        smaller = [sprite(rng, thing.shape, thing.colour, thing.radius * scale) for scale in _GROWTH] if brief else []
        for frame in range(thing.first, thing.last + 1):
            step = _growing(thing, frame, length)
            paint, coverage = smaller[step] if step < len(smaller) else full
            half = len(coverage) // 2
            x, y = (int(round(float(coordinate))) for coordinate in thing.centres[frame])
            top, left, bottom, right = max(0, y - half), max(0, x - half), min(height, y + half + 1), min(width, x + half + 1)
            if top >= bottom or left >= right:
                continue
            rows, cols = slice(top - y + half, bottom - y + half), slice(left - x + half, right - x + half)
            alpha = coverage[rows, cols, None]
            patch = frames[frame, top:bottom, left:right]
            patch[...] = np.rint(patch * (1 - alpha) + paint[rows, cols] * alpha)
            covered = alpha[..., 0] > 0.5
            masks[:index, frame, top:bottom, left:right] &= ~covered
            masks[index, frame, top:bottom, left:right] = covered
    return frames, masks
