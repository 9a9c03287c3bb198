"""Queries about a scene with their targets. Only queries with one clear answer are made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .painting import COLOURS, SHAPES
from .things import Thing

KINDS = ("noun", "colour", "size", "position", "relation", "motion", "time", "counting", "absent")
NUMBERS = ("two", "three", "four")
_WORDS = ("object", "thing", "one", "shape")
_PLURALS = {"cross": "crosses"}


@dataclass(frozen=True)
class Query:
    """A query about a scene.

    Attributes:
        kind: one of KINDS.
        targets: indices of the objects that it refers to; empty if the object is absent.
    """

    kind: str
    text: str
    targets: tuple[int, ...]


def plural(shape: str) -> str:
    return _PLURALS.get(shape, shape + "s")


def answer_to(query: Query, things: Sequence[Thing]) -> str:
    """What the bundled model learned to answer to the object question: "red-star", "two-circles", or "none" if it is not there.

    Of two objects that a query names: both names, which it did not learn."""
    if not query.targets:
        return "none"
    names = [f"{things[index].colour}-{things[index].shape}" for index in query.targets]
    shapes = {things[index].shape for index in query.targets}
    if query.kind == "counting":
        return f"{NUMBERS[len(names) - 2]}-{plural(*shapes)}"
    return " and ".join(names)


def says(answer: str, truth: str) -> bool:
    """Whether a model's answer names what `answer_to` gives: all of its words, with or without hyphens, in any order."""
    return set(re.findall(r"[a-z]+", truth)) <= set(re.findall(r"[a-z]+", answer.lower()))


def ask_about(rng: np.random.Generator, things: list[Thing], side: int) -> Iterator[Query]:
    """All queries about the objects. `side`: the frame's shorter side in pixels."""

    def word() -> str:
        return str(rng.choice(_WORDS))

    shapes = [thing.shape for thing in things]
    for index, thing in enumerate(things):
        if shapes.count(thing.shape) == 1:
            yield Query("noun", f"the {thing.shape}", (index,))
        yield Query("noun", f"the {thing.colour} {thing.shape}", (index,))
        yield Query("colour", f"the {thing.colour} {word()}", (index,))
    yield from _sizes(things, word)
    yield from _positions(things, side, word)
    yield from _relations(things, word)
    yield from _motions(things, word)
    yield from _times(things, word)
    for shape in SHAPES:
        same = tuple(index for index, name in enumerate(shapes) if name == shape)
        if len(same) > 1:
            number = NUMBERS[len(same) - 2] if len(same) < len(NUMBERS) + 2 else "many"
            yield Query("counting", f"all {plural(shape)}" if rng.random() < 0.5 else f"the {number} {plural(shape)}", same)
    yield from missing(rng, things, word)


def missing(rng: np.random.Generator, things: Sequence[Thing], word: Callable[[], str] = lambda: "object") -> Iterator[Query]:
    """Queries about objects that the scene does not have. `word`: gives a general word for an object."""
    shapes, colours = [thing.shape for thing in things], [thing.colour for thing in things]
    missing_shape = str(rng.choice([name for name in SHAPES if name not in shapes] or SHAPES))
    missing_colour = str(rng.choice([name for name in COLOURS if name not in colours]))
    if missing_shape not in shapes:
        yield Query("absent", f"the {missing_shape}", ())
    yield Query("absent", f"the {missing_colour} {word()}", ())
    # The hard case: colour and shape both occur, but not on the same object.
    pairs = set(zip(colours, shapes, strict=True))
    mixed = [(colour, shape) for colour in colours for shape in shapes if (colour, shape) not in pairs]
    colour, shape = mixed[int(rng.integers(len(mixed)))] if mixed else (missing_colour, shapes[0])
    yield Query("absent", f"the {colour} {shape}", ())


def _sizes(things, word) -> Iterator[Query]:
    order = np.argsort([thing.radius for thing in things])
    if len(things) < 2:
        return
    if things[order[-1]].radius > 1.25 * things[order[-2]].radius:
        yield Query("size", f"the largest {word()}", (int(order[-1]),))
    if things[order[1]].radius > 1.25 * things[order[0]].radius:
        yield Query("size", f"the smallest {word()}", (int(order[0]),))


def _positions(things, side: int, word) -> Iterator[Query]:
    """Leftmost, rightmost, topmost and bottommost objects, where they are so in every frame."""
    if len(things) < 2:
        return
    for axis, names in enumerate((("left", "right"), ("top", "bottom"))):
        positions = np.stack([thing.centres[:, axis] for thing in things])
        for name, signed in zip(names, (positions, -positions), strict=True):
            index = int(signed.mean(1).argmin())
            others = np.delete(signed, index, 0)
            if (others.min(0) - signed[index] > 0.12 * side).all():
                superlative = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}[name]
                yield Query("position", f"the {superlative} {word()}", (index,))


def _relations(things, word) -> Iterator[Query]:
    """Objects that clearly lie in one direction from another in every frame, where no third object even roughly does."""
    for index, anchor in enumerate(things):
        for name, axis, sign in (("to the left of", 0, -1), ("to the right of", 0, 1), ("above", 1, -1), ("below", 1, 1)):
            clear, rough = [], []
            for other, thing in enumerate(things):
                offset = thing.centres - anchor.centres
                ahead, aside = sign * offset[:, axis], np.abs(offset[:, 1 - axis])
                if other != index and (ahead > 1.2 * aside).all():
                    clear.append(other)
                if other != index and (ahead > 0.5 * aside).any():
                    rough.append(other)
            if len(clear) == 1 and rough == clear:
                yield Query("relation", f"the {word()} {name} the {anchor.colour} one", (clear[0],))


def _motions(things, word) -> Iterator[Query]:
    motions = [thing.motion for thing in things]
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
        ):  # an object that moves that way and then stops would match for half of the clip
            yield Query("motion", f"the {word()} moving {motion}", (index,))


def _heading(thing) -> str:
    dx, dy = thing.centres[-1] - thing.centres[0]
    return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("up" if dy < 0 else "down")


def _times(things, word) -> Iterator[Query]:
    late = [index for index, thing in enumerate(things) if thing.first > 0]
    early = [index for index, thing in enumerate(things) if thing.last < len(thing.centres) - 1]
    if len(late) == 1:
        yield Query("time", f"the {word()} that appears last", (late[0],))
    if len(early) == 1:
        yield Query("time", f"the {word()} that disappears", (early[0],))
