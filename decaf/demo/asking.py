"""Queries that a scene can be asked, with their truth: only such as have one clear answer in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .painting import COLOURS, SHAPES
from .things import Thing

KINDS = ("noun", "colour", "size", "position", "relation", "motion", "time", "counting", "absent")
_WORDS = ("object", "thing", "one", "shape")
_PLURALS = {"cross": "crosses"}


@dataclass(frozen=True)
class Query:
    """`kind`: one of KINDS; `text`: what is asked; `targets`: places of the meant objects in the scene's list, none if there is no such."""

    kind: str
    text: str
    targets: tuple[int, ...]


def plural(shape: str) -> str:
    return _PLURALS.get(shape, shape + "s")


def ask_about(rng: np.random.Generator, things: list[Thing], side: int) -> Iterator[Query]:
    """All queries about the objects; `side`: the frame's shorter side in pixels."""

    def word() -> str:
        return str(rng.choice(_WORDS))

    shapes, colours = [one.shape for one in things], [one.colour for one in things]
    for index, one in enumerate(things):
        if shapes.count(one.shape) == 1:
            yield Query("noun", f"the {one.shape}", (index,))
        yield Query("noun", f"the {one.colour} {one.shape}", (index,))
        yield Query("colour", f"the {one.colour} {word()}", (index,))
    yield from _sizes(things, word)
    yield from _places(things, side, word)
    yield from _relations(things, word)
    yield from _motions(things, word)
    yield from _times(things, word)
    for shape in SHAPES:
        found = tuple(index for index, name in enumerate(shapes) if name == shape)
        if len(found) > 1:
            number = {2: "two", 3: "three", 4: "four"}.get(len(found), "many")
            yield Query("counting", f"all {plural(shape)}" if rng.random() < 0.5 else f"the {number} {plural(shape)}", found)
    missing_shape = str(rng.choice([name for name in SHAPES if name not in shapes] or SHAPES))
    missing_colour = str(rng.choice([name for name in COLOURS if name not in colours]))
    if missing_shape not in shapes:
        yield Query("absent", f"the {missing_shape}", ())
    yield Query("absent", f"the {missing_colour} {word()}", ())
    # The hard one: colour and shape are both there, but not on the same object.
    pairs = set(zip(colours, shapes, strict=True))
    mixed = [(colour, shape) for colour in colours for shape in shapes if (colour, shape) not in pairs]
    colour, shape = mixed[int(rng.integers(len(mixed)))] if mixed else (missing_colour, shapes[0])
    yield Query("absent", f"the {colour} {shape}", ())


def _sizes(things, word) -> Iterator[Query]:
    order = np.argsort([one.radius for one in things])
    if len(things) < 2:
        return
    if things[order[-1]].radius > 1.25 * things[order[-2]].radius:
        yield Query("size", f"the largest {word()}", (int(order[-1]),))
    if things[order[1]].radius > 1.25 * things[order[0]].radius:
        yield Query("size", f"the smallest {word()}", (int(order[0]),))


def _places(things, side: int, word) -> Iterator[Query]:
    """Extremes that stay so through the clip."""
    if len(things) < 2:
        return
    for axis, names in enumerate((("left", "right"), ("top", "bottom"))):
        places = np.stack([one.centres[:, axis] for one in things])
        for name, signed in zip(names, (places, -places), strict=True):
            index = int(signed.mean(1).argmin())
            others = np.delete(signed, index, 0)
            if (others.min(0) - signed[index] > 0.12 * side).all():
                most = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}[name]
                yield Query("position", f"the {most} {word()}", (index,))


def _relations(things, word) -> Iterator[Query]:
    """Exactly one object clearly lies in that direction from another one of a colour, through the clip, and no other one roughly does."""
    for index, anchor in enumerate(things):
        for name, axis, sign in (("to the left of", 0, -1), ("to the right of", 0, 1), ("above", 1, -1), ("below", 1, 1)):
            clear, rough = [], []
            for other, one in enumerate(things):
                offset = one.centres - anchor.centres
                ahead, aside = sign * offset[:, axis], np.abs(offset[:, 1 - axis])
                if other != index and (ahead > 1.2 * aside).all():
                    clear.append(other)
                if other != index and (ahead > 0.5 * aside).any():
                    rough.append(other)
            if len(clear) == 1 and rough == clear:
                yield Query("relation", f"the {word()} {name} the {anchor.colour} one", (clear[0],))


def _motions(things, word) -> Iterator[Query]:
    motions = [one.motion for one in things]
    if len(things[0].centres) < 4:
        return
    for index, motion in enumerate(motions):
        if motions.count(motion) > 1:
            continue
        if motion == "still":
            yield Query("motion", f"the {word()} that stays still", (index,))
        elif motion == "stops":
            yield Query("motion", f"the {word()} that stops", (index,))
        elif not any(
            other.motion == "stops" and _heading(other) == motion for other in things
        ):  # one that moves there and then stops would fit half of the time
            yield Query("motion", f"the {word()} moving {motion}", (index,))


def _heading(one) -> str:
    dx, dy = one.centres[-1] - one.centres[0]
    return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("up" if dy < 0 else "down")


def _times(things, word) -> Iterator[Query]:
    late = [index for index, one in enumerate(things) if one.first > 0]
    early = [index for index, one in enumerate(things) if one.last < len(one.centres) - 1]
    if len(late) == 1:
        yield Query("time", f"the {word()} that appears last", (late[0],))
    if len(early) == 1:
        yield Query("time", f"the {word()} that disappears", (early[0],))
