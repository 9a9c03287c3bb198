"""The made-up scenes of the demo as a set: no files, any number of them, and the truth of each query is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...clips import Clip, clip_from_images
from ...demo.asking import KINDS, Query, answer_to
from ...demo.hard import HARD_KINDS, make_hard_scene
from ...demo.scenes import Scene, make_scene
from ...report import Report
from .base import Dataset, Item

NAME, TITLE = "scenes", "Made-up scenes"

ABSENT = "absent"
"""The kind of a query whose object is not in the clip."""


@dataclass(frozen=True)
class SceneClip:
    """The clip of a scene, made when it is opened. `length`: of frames; None as the hard scene draws it."""

    seed: int
    length: int | None
    hard: bool = False

    def open(self, report: Report) -> Clip:
        return clip_from_images(torch.from_numpy(scene_of(self).frames))

    def frame_names(self, length: int) -> Sequence[str]:
        return [f"{index:05d}" for index in range(length)]


@lru_cache(2)
def scene_of(clip: SceneClip) -> Scene:
    return make_hard_scene(clip.seed, length=clip.length) if clip.hard else make_scene(clip.seed, length=clip.length)


@dataclass(frozen=True)
class SceneTruth:
    """Masks of some of a scene's objects."""

    clip: SceneClip
    targets: tuple[int, ...]

    def read(self, length: int, size: tuple[int, int]) -> tuple[list[int], Tensor]:
        scene = scene_of(self.clip)
        masks = scene.masks[list(self.targets)].any(0) if self.targets else np.zeros(scene.frames.shape[:3], bool)
        return list(range(len(masks))), torch.from_numpy(masks)

    def problem(self, length: int, size: tuple[int, int]) -> str:
        return ""


def read(scenes: int, seed: int, length: int | None = 8, *, hard: bool = False) -> Dataset:
    """Queries about each of `scenes` scenes, whose seeds are `seed` and those after it: a noun or a colour in turn, another kind, and an absent
    object; of hard ones, one of each kind.

    Args:
        length: frames of a scene; None, for hard ones, as each draws them.
        hard: scenes of `decaf.demo.hard`.
    """
    items = []
    for number in range(seed, seed + scenes):
        clip = SceneClip(number, length, hard)
        scene = scene_of(clip)
        for query in one_of_each(scene, number) if hard else chosen(scene, number):
            name = f"{number}/{query.kind.replace(' ', '-')}"
            truth = SceneTruth(clip, tuple(query.targets))
            items.append(Item(name, clip, query.text, truth, (query.kind,), answer=answer_to(query, scene.things)))
    return Dataset(NAME, TITLE, f"{'hard, ' * hard}{scenes} from seed {seed}", tuple(items))


def chosen(scene: Scene, seed: int) -> Iterator[Query]:
    """The queries about the scene of this seed that are asked, one of each of up to three kinds."""
    rng = np.random.default_rng(seed)
    by_kind = {kind: [query for query in scene.queries if query.kind == kind] for kind in KINDS}
    others = [kind for kind in KINDS if kind not in ("noun", "colour", ABSENT) and by_kind[kind]]
    kinds = ["noun" if seed % 2 else "colour", *([str(rng.choice(others))] if others else []), ABSENT]
    for kind in kinds:
        if by_kind[kind]:
            yield by_kind[kind][rng.integers(len(by_kind[kind]))]


def one_of_each(scene: Scene, seed: int) -> Iterator[Query]:
    """The queries about the hard scene of this seed that are asked."""
    rng = np.random.default_rng(seed)
    for kind in HARD_KINDS:
        of_kind = [query for query in scene.queries if query.kind == kind]
        if of_kind:
            yield of_kind[rng.integers(len(of_kind))]
