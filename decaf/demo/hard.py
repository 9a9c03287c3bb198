"""Harder clips with ground truth than those of `decaf.demo.scenes`: long, crowded, with doubles, brief visits, an order of events, and contact.

Each tells one of STORIES. Parts of objects are not asked about: nothing here has parts that a word names.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import DecafError
from .asking import NUMBERS, Query, missing, plural
from .painting import BACKGROUNDS, COLOURS, SHAPES
from .scenes import Scene, render
from .things import Thing

STORIES = ("doubles", "visit", "arrivals", "departures", "contact")
HARD_KINDS = ("double", "brief", "order", "contact", "two", "counting", "absent")
"""double: one of several objects of the same shape; brief: seen in an eighth to a fifth of the clip; order: what appears or disappears first,
second or last; contact: what hits another object; two: two objects named in one sentence; counting: all objects of a shape; absent."""

LENGTHS = (24, 64)
_RADIUS = (0.1, 0.17)
_PLACES = ("first", "second")
_TRIES = 400


def make_hard_scene(seed: int, *, size: tuple[int, int] = (280, 364), length: int | None = None) -> Scene:
    """Draws a scene of 3 to 6 objects from its seed; the same seed and settings always give the same pixels, masks and queries.

    Args:
        size: (H, W) of the frames in pixels, 112 or more.
        length: number of frames, 16 or more; None: drawn, within LENGTHS.

    Raises:
        DecafError: a size or length in which such a story has no room.
    """
    if min(size) < 112 or (length is not None and length < 16):
        raise DecafError(
            f"A hard scene of {length} frames of {size[1]}x{size[0]} pixels cannot be made. Give at least 16 frames and 112 pixels a side."
        )
    rng = np.random.default_rng((seed, len(STORIES)))
    story = STORIES[int(rng.integers(len(STORIES)))]
    drawn = int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
    length = drawn if length is None else length
    things = _contact(rng, size, length) if story == "contact" else []
    count = int(rng.integers(5, 7)) if story == "doubles" else int(rng.integers(3, 6))
    shapes = _shapes(rng, things, count, story)
    for _ in range(_TRIES):
        if len(things) == count:
            break
        thing = _wanderer(rng, things, shapes[len(things)], size, length)
        if all(_apart(thing, other) for other in things):
            things.append(thing)
    things = _timed(rng, things, story, length)
    background = str(rng.choice(BACKGROUNDS))
    frames, masks = render(rng, things, background, size, length)
    return Scene(frames, masks, tuple(things), background, tuple(_ask(rng, things, masks, story)))


def _shapes(rng, things: list[Thing], count: int, story: str) -> list[str]:
    """The shape of each object. Doubles come in twos and threes; what is hit is the only one of its shape."""
    taken = [thing.shape for thing in things]
    free = [shape for shape in rng.permutation(SHAPES).tolist() if shape not in taken]
    if story == "doubles":
        first = int(rng.integers(2, 4))
        return ([free[0]] * first + [free[1]] * 2 + free[2:])[:count]
    rest = [str(rng.choice(free[:3])) for _ in range(count - len(taken))]
    return taken + rest


def _wanderer(rng, things: list[Thing], shape: str, size, length: int) -> Thing:
    """An object that stays, or drifts on a straight line, within the frame."""
    side = min(size)
    radius = float(side * rng.uniform(*_RADIUS))
    heading = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)][int(rng.integers(5))], np.float32)
    path = np.arange(length, dtype=np.float32)[:, None] / length * heading * side * rng.uniform(0.2, 0.5)
    limits = np.array([size[1], size[0]], np.float32)
    start = rng.uniform(np.minimum(radius - path.min(0), limits / 2), np.maximum(limits - radius - path.max(0), limits / 2))
    motion = {(-1, 0): "left", (1, 0): "right", (0, -1): "up", (0, 1): "down"}.get(tuple(heading.astype(int).tolist()), "still")
    return Thing(shape, _free_colour(rng, things), radius, (start + path).astype(np.float32), motion, 0, length - 1)


def _contact(rng, size, length: int) -> list[Thing]:
    """An object that stays, and one that comes, hits it about the middle of the clip, and goes back."""
    side = min(size)
    radii = side * rng.uniform(*_RADIUS, 2)
    anchor_shape, shape = rng.choice(SHAPES, 2, replace=False).tolist()
    sign = 1 if rng.random() < 0.5 else -1
    travel = side * rng.uniform(0.35, 0.5)
    touch = float(0.85 * radii.sum())  # outlines of most shapes lie a little within their radius
    room = travel + touch
    middle = np.array([size[1], size[0]], np.float32) / 2
    anchor_at = middle + [sign * min(room / 2, size[1] / 2 - radii[0]), rng.uniform(-0.2, 0.2) * side]
    steps = np.arange(length, dtype=np.float32)
    hit = rng.uniform(0.4, 0.6) * length
    far = travel * np.abs(steps - hit) / max(hit, length - hit)
    centres = np.stack([anchor_at[0] - sign * (touch + far), np.full(length, anchor_at[1])], 1).astype(np.float32)
    anchor = Thing(
        anchor_shape, _free_colour(rng, []), float(radii[0]), np.repeat(np.float32(anchor_at)[None], length, 0), "still", 0, length - 1
    )
    return [anchor, Thing(shape, _free_colour(rng, [anchor]), float(radii[1]), centres, "bounces", 0, length - 1)]


def _free_colour(rng, things: list[Thing]) -> str:
    return str(rng.choice([colour for colour in COLOURS if colour not in {thing.colour for thing in things}]))


def _apart(first: Thing, second: Thing) -> bool:
    gaps = np.hypot(*(first.centres - second.centres).T)
    return bool((gaps >= 1.05 * (first.radius + second.radius)).all())


def _timed(rng, things: list[Thing], story: str, length: int) -> list[Thing]:
    """When each object comes and goes: in an order with gaps that cannot be missed, or all but one all the time."""

    def shown(thing: Thing, first: int, last: int) -> Thing:
        return Thing(thing.shape, thing.colour, thing.radius, thing.centres, thing.motion, first, last)

    if story == "visit":
        stay = int(rng.integers(max(4, length // 8), max(5, length // 5) + 1))
        first = int(rng.integers(2, length - stay - 2))
        return [*things[:-1], shown(things[-1], first, first + stay - 1)]
    if story not in ("arrivals", "departures"):
        return things
    gap = max(3, int(0.8 * length / (len(things) + 1)))
    times = rng.integers(1, 3) + gap * np.arange(len(things))
    if story == "arrivals":
        moved = [shown(thing, int(time), length - 1) for thing, time in zip(things, times, strict=True)]
    else:
        moved = [shown(thing, 0, length - 1 - int(time)) for thing, time in zip(things, times, strict=True)]
    return [moved[place] for place in rng.permutation(len(moved))]  # what is in front tells nothing about the order


def _ask(rng, things: list[Thing], masks: np.ndarray, story: str) -> Iterator[Query]:
    word = str(rng.choice(("object", "thing", "one", "shape")))
    shapes = [thing.shape for thing in things]
    for index, thing in enumerate(things):
        if shapes.count(thing.shape) > 1:
            yield Query("double", f"the {thing.colour} {thing.shape}", (index,))
    if story == "visit":
        yield Query("brief", f"the {things[-1].colour} {things[-1].shape}", (len(things) - 1,))
        yield Query("brief", f"the {things[-1].colour} {word}", (len(things) - 1,))
    if story in ("arrivals", "departures"):
        verb = "appears" if story == "arrivals" else "disappears"
        order = np.argsort([thing.first if story == "arrivals" else thing.last for thing in things]).tolist()
        for place, index in ((0, order[0]), (1, order[1]), (-1, order[-1])):
            yield Query("order", f"the {word} that {verb} {'last' if place < 0 else _PLACES[place]}", (index,))
    if story == "contact":
        yield Query("contact", f"the {word} that hits the {things[0].shape}", (1,))
    one, other = rng.permutation(len(things))[:2].tolist()
    names = [f"the {things[index].colour} {things[index].shape}" for index in (one, other)]
    yield Query("two", " and ".join(names), (one, other))
    for shape in dict.fromkeys(shapes):
        same = tuple(index for index, name in enumerate(shapes) if name == shape)
        if 1 < len(same) < len(NUMBERS) + 2:
            yield Query("counting", f"all {plural(shape)}" if rng.random() < 0.5 else f"the {NUMBERS[len(same) - 2]} {plural(shape)}", same)
    yield from missing(rng, things)
