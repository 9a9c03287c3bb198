"""Batches of scenes with questions, drawn without end from a seed; and the labels that the vision tower's pretraining uses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from build import PATCH
from PIL import Image

from decaf.attention.questions import Templates, clean_query
from decaf.demo.asking import Query, answer_to
from decaf.demo.painting import BACKGROUNDS, COLOURS, SHAPES
from decaf.demo.scenes import MOTIONS, Scene, draw_things, make_scene, shown_size
from decaf.demo.things import Thing

COLOUR_NAMES = list(COLOURS)
HEADINGS = ("left", "right", "up", "down", "still")
FLAGS = ("leftmost", "rightmost", "topmost", "bottommost", "largest", "smallest")
SIDES = 4 * len(COLOUR_NAMES)
"""Labels "something of this colour lies left, right, above, below of me"."""

TRAINING_SEEDS = 1 << 40
"""Scene seeds from here on are for training; smaller ones are left to tests and evaluation."""

TEMPLATES = Templates()
WEIGHTS = {
    "noun": 1.5,
    "colour": 1.5,
    "size": 2.0,
    "position": 2.0,
    "relation": 2.5,
    "motion": 3.0,
    "time": 2.5,
    "counting": 1.0,
    "absent": 1.5,
}
WEAK = WEIGHTS | {"noun": 1.0, "colour": 1.0, "size": 5.0, "position": 1.5, "relation": 1.5, "motion": 5.0, "time": 6.0, "counting": 5.0}
"""Weights of the stage "weak": by how often the answer was wrong after the others."""

GUESSED = 0.3
"""Share of a single frame's questions about motion and time that are asked: only a clip could tell."""


FIRST = ("noun", "colour", "absent")
"""What the stage "small" asks about, beside the background: the rest builds on it."""

_WORD = re.compile(r"\b(object|thing|one|shape)$")


@dataclass
class Batch:
    """`frames` (B, T, H, W, 3) uint8 at the size shown; `grid` of a frame in tokens; `labels`: per token, see `token_labels`;
    `asked`: per sample pairs of question and answer, the same number everywhere; `kinds`: their kinds."""

    frames: np.ndarray
    grid: tuple[int, int]
    labels: dict[str, np.ndarray]
    asked: list[list[tuple[str, str]]] = field(default_factory=list)
    kinds: list[list[str]] = field(default_factory=list)

    @property
    def video(self) -> bool:
        return self.frames.shape[1] > 1


def draw_shape(rng: np.random.Generator, stage: str) -> tuple[bool, int, int, int]:
    """(video, rows, cols, frames) of a batch. `rows`, `cols`: the video grid; single frames are shown at twice that."""
    video = rng.random() < (0.6 if stage == "weak" else 0.5)
    if stage == "weak" and rng.random() < (0.65 if video else 0.45):  # small pictures teach sizes as well, and more of them a second
        rows, cols = [(10, 13), (10, 13), (10, 13), (12, 12), (13, 10), (9, 16)][rng.integers(6)]
        return video, rows, cols, int(rng.choice([4, 4, 8, 8, 8, 8, 8, 16])) if video else 1
    # Many fine tokens on one object are the harder sight.
    if stage == "full" and rng.random() < (0.6 if video else 0.85):
        rows, cols = [(10, 13), (10, 13), (12, 12), (10, 10), (13, 10), (9, 16)][rng.integers(6)]
        return video, rows, cols, int(rng.choice([2, 4, 8, 16])) if video else 1
    if stage in ("middle", "full", "weak"):
        if video:
            rows, cols = rng.integers(6, 11, 2)
            return True, int(rows), int(cols), int(rng.choice([4, 4, 8, 8] if stage == "weak" else [2, 4, 6, 8]))
        rows, cols = rng.integers(4, 9, 2)
        return False, int(rows), int(cols), 1
    if video:
        rows, cols = rng.integers(5, 8, 2)
        return True, int(rows), int(cols), int(rng.choice([2, 4]))
    rows, cols = rng.integers(3, 5, 2)
    return False, int(rows), int(cols), 1


def draw_scene(rng: np.random.Generator, stage: str, rows: int, cols: int, length: int) -> Scene:
    side = min(rows, cols)
    radius = (min(1.2 / side, 0.26), min(2.5 / side, 0.36))  # in tokens as in the full-size scenes
    most = 4 if side >= 6 else 3 if side >= 4 else 2
    drawn = {"size": (rows * PATCH, cols * PATCH), "length": length, "count": (1 if stage == "small" else 2, most), "radius": radius}
    wanted = rng.choice(("size", "time", "counting", "any"), p=(0.35, 0.35, 0.15, 0.15)) if stage == "weak" else "any"
    for _ in range(30):
        seed = TRAINING_SEEDS + int(rng.integers(1 << 40))
        if wanted == "any" or _can_ask(wanted, draw_things(seed, **drawn), length):
            break
    return make_scene(seed, **drawn)


def _can_ask(kind: str, things: list[Thing], length: int) -> bool:
    """Whether a scene of these objects is likely to have a query of the kind."""
    if kind == "size":
        radii = sorted(thing.radius for thing in things)
        return len(radii) > 1 and (radii[-1] > 1.25 * radii[-2] or radii[1] > 1.25 * radii[0])
    if kind == "counting":
        return len({thing.shape for thing in things}) < len(things)
    return length < 6 or sum(thing.first > 0 for thing in things) == 1 or sum(thing.last < length - 1 for thing in things) == 1


def make_batch(rng: np.random.Generator, stage: str, tokens: int, questions: int) -> Batch:
    """About `tokens` visual tokens, with so many `questions` a sample (0: only labels)."""
    video, rows, cols, length = draw_shape(rng, stage)
    scale = 1 if video else 2
    each = rows * cols * scale * scale * ((length + 1) // 2)
    frames, labels, asked, kinds = [], [], [], []
    while len(frames) < max(1, min(48, round(tokens / each))):
        # A single frame now and then comes from a clip, so that it is asked about what only the clip shows, too.
        scene = draw_scene(rng, stage, rows, cols, length if video else int(rng.choice([1, 1, 8])))
        if not scene.things:
            continue
        chosen = range(len(scene.frames)) if video else [int(rng.integers(len(scene.frames)))]
        weights = WEAK if stage == "weak" else {kind: WEIGHTS[kind] for kind in FIRST} if stage == "small" else WEIGHTS
        pairs = _questions(rng, scene, questions, None if video else chosen[0], weights)
        frames.append(np.stack([shown(scene.frames[index], scale) for index in chosen]))
        labels.append(token_labels(scene, chosen, scale))
        asked.append([(question, reply) for _, question, reply in pairs])
        kinds.append([kind for kind, _, _ in pairs])
    stacked = {name: np.stack([one[name] for one in labels]) for name in labels[0]}
    return Batch(np.stack(frames), (rows * scale, cols * scale), stacked, asked, kinds)


def shown(frame: np.ndarray, scale: int) -> np.ndarray:
    if scale == 1:
        return frame
    height, width = frame.shape[:2]
    return np.asarray(Image.fromarray(frame).resize((width * scale, height * scale), Image.Resampling.BICUBIC))


def _questions(rng, scene: Scene, count: int, frame: int | None, weights: dict[str, float]) -> list[tuple[str, str, str]]:
    """(kind, question, answer), of the kinds that `weights` names. `frame`: the one shown alone, else the whole clip is."""
    if not count:
        return []
    some_of = [query for query in scene.queries if query.kind in weights]
    pairs = []

    def visible(query: Query) -> bool:
        return frame is None or scene.masks[list(query.targets), frame].any((1, 2)).all()

    def fits(query: Query) -> bool:
        if frame is not None and query.kind in ("motion", "time") and rng.random() > GUESSED:
            return False
        return not query.targets or query.kind in ("noun", "colour") or visible(query)

    kinds = [query.kind for query in some_of]
    share = np.array([weights[kind] / kinds.count(kind) for kind in kinds])
    last = 4 if weights is not WEAK else 8
    while len(pairs) < count - last:
        # In an order by weight and luck, each once before any is asked again, then perhaps in other words.
        order = np.argsort(rng.exponential(size=len(share)) / share)
        for query in [some_of[place] for place in order if fits(some_of[place])][: count - last - len(pairs)]:
            text = _WORD.sub(str(rng.choice(("object", "thing", "one", "shape"))), clean_query(query.text))
            reply = answer_to(query, scene.things) if not query.targets or visible(query) else "none"
            pairs.append((query.kind, TEMPLATES.ask_object(text), reply))
    for place in range(last - 2):
        some = [query for query in some_of if bool(query.targets) == bool(place % 2)]
        query = some[rng.integers(len(some))]
        there = bool(query.targets) and visible(query)
        pairs.append(("present" if there else "missing", TEMPLATES.ask_presence(clean_query(query.text)), "yes" if there else "no"))
    query = scene.queries[rng.integers(len(scene.queries))]
    pairs.append(("background", TEMPLATES.ask_background(clean_query(query.text)), scene.background))
    one = scene.things[rng.integers(len(scene.things))]
    pairs.append(("class background", TEMPLATES.ask_class_background(f"{one.colour}-{one.shape}"), scene.background))
    return pairs


def choice_question(rng: np.random.Generator) -> tuple[str, str]:
    """The question, asked without pictures, which of several names fits a query: one that the query does not rule out."""
    colour, shape = COLOUR_NAMES[rng.integers(len(COLOUR_NAMES))], SHAPES[rng.integers(len(SHAPES))]
    truth = f"{colour}-{shape}"
    others = [
        f"{COLOUR_NAMES[rng.integers(len(COLOUR_NAMES))]}-{SHAPES[rng.integers(len(SHAPES))]}" for _ in range(int(rng.integers(0, 3)))
    ]
    free = rng.random() < 0.3
    text = [f"the {colour} {shape}", f"the {shape}", f"the {colour} object"][rng.integers(3)]
    if free:  # nothing in the query decides: the first answer comes from the clip
        text = ["the largest one", "the object moving left", "the leftmost thing", "the one that stops"][rng.integers(4)]
    else:
        others = [name for name in others if colour not in name and shape not in name]
    names = [truth, *others] if free else list(rng.permutation([truth, *others]))
    if rng.random() < 0.3:
        names.insert(int(rng.integers(len(names) + 1)), "none")
    return TEMPLATES.ask_choice(clean_query(text), [str(name) for name in names]), truth


def token_labels(scene: Scene, chosen, scale: int) -> dict[str, np.ndarray]:
    """What each visual token shows, (slots * rows * cols, ...): `thing` 0 or 1 (-1: partly), `shape`, `colour`, `heading` of the object
    there, `flags` and `sides` 0/1 (see FLAGS and SIDES), `ground`; `change`: whether it grows (1) or shrinks (2) between the two frames;
    `radius`: logarithm to base 2 of what is shown of it, in tokens, less `scale`; and what only the clip up to there tells: `motion` (-1:
    too early to say) and `late`, whether the object came after the clip began."""
    cell = PATCH // scale
    masks = scene.masks[:, list(chosen)]
    if masks.shape[1] % 2:
        masks = np.concatenate([masks, masks[:, -1:]], 1)
    count, frames, height, width = masks.shape
    rows, cols = height // cell, width // cell
    share = masks.reshape(count, frames // 2, 2, rows, cell, cols, cell).mean((2, 4, 6), dtype=np.float32)  # (N, slots, rows, cols)
    best, cover = share.argmax(0), share.max(0)
    slots = frames // 2
    attributes = np.zeros((count, slots, 6), np.int64)
    shown = np.zeros((count, slots), np.float32)
    length = len(scene.frames)
    extra = np.zeros((count, slots, len(FLAGS) + SIDES), np.float32)
    for slot in range(slots):
        first = chosen[min(2 * slot, len(chosen) - 1)]
        last = chosen[min(2 * slot + 1, len(chosen) - 1)]
        seen = [index for index in range(count) if masks[index, 2 * slot : 2 * slot + 2].any()]
        centre = {index: scene.things[index].centres[[first, last]].mean(0) for index in seen}
        for index, one in enumerate(scene.things):
            step = one.centres[last] - one.centres[first]
            axis = int(np.abs(step).argmax())
            heading = 4 if np.abs(step).max() < 0.5 else 2 * axis + int(step[axis] > 0)
            before, after = shown_size(one, first, length), shown_size(one, last, length)
            change = 1 if after > before else 2 if after < before else 0
            motion = MOTIONS.index(one.motion) if slot >= 2 * slots // 3 else -1
            attributes[index, slot] = SHAPES.index(one.shape), COLOUR_NAMES.index(one.colour), heading, change, motion, one.first > 0
            shown[index, slot] = np.log2(one.radius * (max(before, after) or 1) / cell) - scale
        for index in seen:
            others = [other for other in seen if other != index]
            x, y = centre[index]
            radius = scene.things[index].radius
            for place, truth in enumerate((
                all(x < centre[other][0] for other in others), all(x > centre[other][0] for other in others),
                all(y < centre[other][1] for other in others), all(y > centre[other][1] for other in others),
                all(radius > scene.things[other].radius for other in others), all(radius < scene.things[other].radius for other in others),
            )):  # fmt: skip
                extra[index, slot, place] = truth
            for other in others:
                dx, dy = centre[other] - centre[index]
                side = (0 if dx < 0 else 1) if abs(dx) > abs(dy) else (2 if dy < 0 else 3)
                extra[index, slot, len(FLAGS) + side * len(COLOUR_NAMES) + COLOUR_NAMES.index(scene.things[other].colour)] = 1
    slot = np.arange(slots)[:, None, None]
    there = attributes[best, slot].reshape(-1, 6)
    marks = extra[best, slot].reshape(len(there), -1)
    thing = np.where(cover > 0.3, 1, np.where(share.sum(0) < 0.1, 0, -1)).reshape(-1)
    return {
        "thing": thing,
        "shape": there[:, 0],
        "colour": there[:, 1],
        "heading": there[:, 2],
        "change": there[:, 3],
        "motion": there[:, 4],
        "late": there[:, 5],
        "radius": shown[best, slot].reshape(-1),
        "flags": marks[:, : len(FLAGS)],
        "sides": marks[:, len(FLAGS) :],
        "ground": np.full(len(there), BACKGROUNDS.index(scene.background)),
    }
