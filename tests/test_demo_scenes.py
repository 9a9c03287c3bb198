"""The synthetic scenes: the same for a seed, and their truth is true."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from decaf.demo.asking import KINDS
from decaf.demo.painting import BACKGROUNDS, COLOURS, SHAPES, ground
from decaf.demo.scenes import make_scene
from decaf.errors import DecafError

SEEDS = range(60)


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(seed, size=(112, 140), length=9) for seed in SEEDS]


def test_a_seed_gives_the_same_scene_and_another_one_another():
    one, again, other = make_scene(3), make_scene(3), make_scene(4)
    assert one.frames.shape == (16, 280, 364, 3) and one.frames.dtype == np.uint8
    assert np.array_equal(one.frames, again.frames) and np.array_equal(one.masks, again.masks) and one.queries == again.queries
    assert not np.array_equal(one.frames, other.frames)


def test_every_kind_of_query_background_shape_and_colour_turns_up(scenes):
    assert {query.kind for scene in scenes for query in scene.queries} == set(KINDS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {one.shape for scene in scenes for one in scene.things} == set(SHAPES)
    assert {one.colour for scene in scenes for one in scene.things} == set(COLOURS)
    assert set(Counter(len(scene.things) for scene in scenes)) <= {1, 2, 3, 4}


def test_masks_are_disjoint_and_coloured_like_their_objects(scenes):
    for scene in scenes:
        assert (scene.masks.sum(0) <= 1).all()
        for index, one in enumerate(scene.things):
            shown = scene.masks[index].any((1, 2))
            assert not shown[: one.first].any() and not shown[one.last + 1 :].any()
            if scene.masks[index].sum() < 300:
                continue
            paint = scene.frames[scene.masks[index]].mean(0)
            mixed = {name: np.corrcoef(paint, np.array(value) * 0.6 + 1e-3 * np.arange(3))[0, 1] for name, value in COLOURS.items()}
            assert one.colour == "white" or mixed[one.colour] > 0.9, (one.colour, paint)


def test_truth_is_the_union_of_the_targets(scenes):
    for scene in scenes:
        for query in scene.queries:
            truth = scene.truth(query)
            assert truth.shape == scene.frames.shape[:3]
            assert np.array_equal(truth, scene.masks[list(query.targets)].any(0)) if query.targets else not truth.any()
            assert (query.kind == "absent") == (not query.targets)


def test_absent_objects_are_not_there(scenes):
    for scene in scenes:
        there = {(one.colour, one.shape) for one in scene.things}
        for query in scene.queries:
            if query.kind != "absent":
                continue
            words = set(query.text.split())
            assert not any(words & set(COLOURS) <= {colour} and words & set(SHAPES) <= {shape} for colour, shape in there), query.text


def test_places_sizes_and_motions_are_as_said(scenes):
    checked = Counter()
    for scene in scenes:
        for query in scene.queries:
            if query.kind not in ("position", "size", "motion", "relation", "time"):
                continue
            (target,) = query.targets
            one, others = scene.things[target], [thing for thing in scene.things if thing is not scene.things[target]]
            x, y = one.centres[-1] - one.centres[0]
            truth = {
                "leftmost": lambda: all(one.centres[0, 0] < thing.centres[0, 0] for thing in others),
                "bottommost": lambda: all(one.centres[0, 1] > thing.centres[0, 1] for thing in others),
                "largest": lambda: all(one.radius > thing.radius for thing in others),
                "smallest": lambda: all(one.radius < thing.radius for thing in others),
                "moving left": lambda: x < 0 and y == 0,
                "moving down": lambda: y > 0 and x == 0,
                "stays still": lambda: x == y == 0,
                "appears last": lambda: all(one.first > thing.first for thing in others),
                "disappears": lambda: all(one.last < thing.last for thing in others),
                "below": lambda: any(
                    query.text.endswith(f"{thing.colour} one") and one.centres[0, 1] > thing.centres[0, 1] for thing in others
                ),
            }
            for words, holds in truth.items():
                if words in query.text:
                    checked[words] += 1
                    assert holds(), (query.text, scene.things)
    assert len(checked) == 10, checked


def test_one_that_stops_moves_first_and_not_at_the_end(scenes):
    stopping = [one for scene in scenes for one in scene.things if one.motion == "stops"]
    assert stopping
    for one in stopping:
        steps = [float(np.abs(b - a).max()) for a, b in pairwise(one.centres)]
        assert steps[0] > 0 and steps[-1] == 0


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_grounds_fill_any_size_with_texture(name):
    picture = ground(np.random.default_rng(0), name, 60, 90)
    assert picture.shape == (60, 90, 3) and 0 <= picture.min() and picture.max() <= 255
    assert picture.std((0, 1)).max() > 2


@pytest.mark.parametrize("wrong", [{"length": 0}, {"size": (20, 90)}, {"count": (3, 2)}, {"count": (0, 1)}])
def test_a_scene_with_nothing_to_see_is_refused(wrong):
    with pytest.raises(DecafError, match="cannot be made"):
        make_scene(0, **wrong)
