"""Synthetic clips with truth: coloured shapes that move over a textured ground, and queries whose answer is known.

A scene is made from its seed alone: the same seed and settings give the same pixels, masks and queries.
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
"""An object that turns up late or goes away early has these sizes in its first or last two frames."""


@dataclass(frozen=True)
class Scene:
    """`frames` (T, H, W, 3) uint8; `masks` (N, T, H, W) bool, the visible pixels of each object (a nearer one, later in the list, hides
    those behind it); `background`: one of BACKGROUNDS; `queries`: all that the scene can be asked, with truth."""

    frames: np.ndarray
    masks: np.ndarray
    things: tuple[Thing, ...]
    background: str
    queries: tuple[Query, ...]

    def truth(self, query: Query) -> np.ndarray:
        """(T, H, W) bool: pixels of all the query's targets; empty where nothing is meant."""
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
    """A clip with its truth.

    Args:
        size: (H, W) of the frames in pixels.
        length: frames.
        count: fewest and most objects.
        radius: smallest and largest, as shares of the shorter side.
        lively: some objects turn up late, leave early, come in over the border or are partly hidden by others.

    Raises DecafError for a size, length or count that leaves nothing to see.
    """
    if min(size) < 28 or length < 1 or not 1 <= count[0] <= count[1] <= len(COLOURS):
        raise DecafError(
            f"A scene of {length} frames of {size[1]}x{size[0]} pixels with {count[0]} to {count[1]} objects cannot be made. "
            f"Give at least one frame, 28 pixels a side and 1 to {len(COLOURS)} objects."
        )
    rng = np.random.default_rng(seed)
    things: list[Thing] = []
    wanted = int(rng.integers(count[0], count[1] + 1))
    spread = 0.62 if lively and rng.random() < 0.4 else 1.0  # below 1 objects may hide parts of each other
    for tries in range(120):
        # A crowded draw is thinned out rather than given up: the later the try, the smaller the object.
        shrink = 1 if tries < 60 else 0.7
        one = _draw_thing(rng, things, size, length, (radius[0] * shrink, radius[1] * shrink), lively)
        if all(_apart(one, other, spread) for other in things):
            things.append(one)
        if len(things) == wanted:
            break
    background = str(rng.choice(BACKGROUNDS))
    frames, masks = _render(rng, things, background, size, length)
    return Scene(frames, masks, tuple(things), background, tuple(ask_about(rng, things, min(size))))


def _draw_thing(rng, things: list[Thing], size, length: int, radius, lively: bool) -> Thing:
    side = min(size)
    reach = float(side * np.exp(rng.uniform(*np.log(radius))))
    free = [colour for colour in COLOURS if colour not in {one.colour for one in things}]
    shape = things[0].shape if things and rng.random() < 0.15 else str(rng.choice(SHAPES))
    rare = [motion for motion in MOTIONS if motion not in {one.motion for one in things}] or list(MOTIONS)
    motion = str(rng.choice(rare if rng.random() < 0.7 else MOTIONS)) if length > 1 else "still"
    path = _path(rng, motion, side, length)
    first, last = 0, length - 1
    if lively and length >= 6 and things and rng.random() < 0.22:
        if rng.random() < 0.6:
            first = int(rng.integers(length // 3, 2 * length // 3))
        else:
            last = int(rng.integers(length // 3, 2 * length // 3))
    # The whole path lies inside the frame, but for some that come in or go out over the border.
    margin = reach * (rng.uniform(-0.3, 0.5) if lively and motion in _DIRECTIONS and motion != "still" and rng.random() < 0.2 else 1.0)
    limits = np.array([size[1], size[0]], np.float32)
    low, high = margin - path.min(0), limits - margin - path.max(0)
    middle = (low + high) / 2
    low, high = np.minimum(low, middle), np.maximum(high, middle)
    start = rng.uniform(low, high)
    return Thing(shape, str(rng.choice(free)), reach, (start + path).astype(np.float32), motion, first, last)


def _path(rng, motion: str, side: int, length: int) -> np.ndarray:
    """(T, 2) offsets from the first place."""
    speed = rng.uniform(0.55, 1.0) * min(0.08 * side, 0.5 * side / max(length - 1, 1))
    steps = np.arange(length, dtype=np.float32)
    if motion == "stops":
        direction = list(_DIRECTIONS.values())[int(rng.integers(4))]
        steps = 1.6 * np.minimum(steps, rng.uniform(0.35, 0.55) * length)
    else:
        direction = _DIRECTIONS[motion]
    return steps[:, None] * speed * np.array(direction, np.float32)


def _apart(one: Thing, other: Thing, spread: float) -> bool:
    gaps = np.hypot(*(one.centres - other.centres).T)
    return bool((gaps >= spread * 0.95 * (one.radius + other.radius)).all())


def _render(rng, things: list[Thing], background: str, size, length: int) -> tuple[np.ndarray, np.ndarray]:
    height, width = size
    still = ground(rng, background, height, width)
    frames = np.repeat(np.rint(still).astype(np.uint8)[None], length, 0)
    masks = np.zeros((len(things), length, height, width), bool)
    for index, one in enumerate(things):
        full = sprite(rng, one.shape, one.colour, one.radius)
        brief = one.first > 0 or one.last < length - 1
        grown = [sprite(rng, one.shape, one.colour, one.radius * scale) for scale in _GROWTH] if brief else []
        for frame in range(one.first, one.last + 1):
            age = frame - one.first if one.first else len(_GROWTH)
            left = one.last - frame if one.last < length - 1 else len(_GROWTH)
            step = min(age, left)
            paint, cover = grown[step] if step < len(grown) else full
            half = len(cover) // 2
            x, y = (int(round(float(place))) for place in one.centres[frame])
            top, left_, bottom, right = max(0, y - half), max(0, x - half), min(height, y + half + 1), min(width, x + half + 1)
            if top >= bottom or left_ >= right:
                continue
            rows, cols = slice(top - y + half, bottom - y + half), slice(left_ - x + half, right - x + half)
            share = cover[rows, cols, None]
            spot = frames[frame, top:bottom, left_:right]
            spot[...] = np.rint(spot * (1 - share) + paint[rows, cols] * share)
            hidden = share[..., 0] > 0.5
            masks[:index, frame, top:bottom, left_:right] &= ~hidden
            masks[index, frame, top:bottom, left_:right] = hidden
    return frames, masks
