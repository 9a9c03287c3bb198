"""The hard synthetic scenes: the same for a seed, and what their queries say is so."""

import numpy as np
import pytest

from decaf.command import main as cli
from decaf.demo import MLLM_FOLDER
from decaf.demo.asking import answer_to
from decaf.demo.hard import HARD_KINDS, LENGTHS, make_hard_scene
from decaf.errors import DecafError
from decaf.evaluation.evaluate import evaluate
from decaf.mllm import load_mllm


@pytest.fixture(scope="module")
def scenes():
    return [make_hard_scene(seed, size=(112, 140)) for seed in range(60)]


def seen(scene, index: int) -> np.ndarray:
    """Frames that show an object."""
    return np.flatnonzero(scene.masks[index].any((1, 2)))


def queries(scenes, kind: str):
    found = [(scene, query) for scene in scenes for query in scene.queries if query.kind == kind]
    assert len(found) >= 4
    return found


def test_a_seed_gives_the_same_scene_and_another_one_another(scenes):
    again = make_hard_scene(3, size=(112, 140))
    assert (
        np.array_equal(again.frames, scenes[3].frames)
        and np.array_equal(again.masks, scenes[3].masks)
        and again.queries == scenes[3].queries
    )
    assert again.frames.shape != scenes[4].frames.shape or not np.array_equal(again.frames, scenes[4].frames)


def test_they_are_long_and_crowded_and_ask_everything(scenes):
    assert all(LENGTHS[0] <= len(scene.frames) <= LENGTHS[1] and 3 <= len(scene.things) <= 6 for scene in scenes)
    assert {query.kind for scene in scenes for query in scene.queries} == set(HARD_KINDS)
    for scene in scenes:
        assert all(len(seen(scene, index)) for query in scene.queries for index in query.targets)
        assert all(("absent" == query.kind) == (not query.targets) for query in scene.queries)


def test_doubles_share_their_shape_with_another(scenes):
    for scene, query in queries(scenes, "double"):
        one = scene.things[query.targets[0]]
        assert sum(other.shape == one.shape for other in scene.things) > 1
        assert [other.colour for other in scene.things].count(one.colour) == 1


def test_brief_visits_are_brief(scenes):
    for scene, query in queries(scenes, "brief"):
        assert 4 <= len(seen(scene, query.targets[0])) <= len(scene.frames) / 4


def test_order_is_what_the_clip_shows(scenes):
    for scene, query in queries(scenes, "order"):
        ends = [seen(scene, index)[0 if " appears" in query.text else -1] for index in range(len(scene.things))]
        order = np.argsort(ends)
        place = {"first": 0, "second": 1, "last": -1}[query.text.split()[-1]]
        assert order[place] == query.targets[0] and np.diff(np.sort(ends)).min() >= 3


def test_contact_is_made_once_and_by_the_target_alone(scenes):
    for scene, query in queries(scenes, "contact"):
        anchor = next(index for index, one in enumerate(scene.things) if query.text.endswith(one.shape))
        assert [one.shape for one in scene.things].count(scene.things[anchor].shape) == 1
        near = {}
        for index, one in enumerate(scene.things):
            gap = np.hypot(*(one.centres - scene.things[anchor].centres).T) - one.radius - scene.things[anchor].radius
            near[index] = gap if index != anchor else np.full(len(gap), np.inf)
        (target,) = query.targets
        assert 0.3 < near[target].argmin() / len(scene.frames) < 0.7 and near[target].min() < 0 < near[target][[0, -1]].min()
        assert all(gap.min() > 0 for index, gap in near.items() if index != target)


def test_two_and_several_are_all_of_what_is_named(scenes):
    for scene, query in queries(scenes, "two"):
        assert query.text == " and ".join(f"the {scene.things[index].colour} {scene.things[index].shape}" for index in query.targets)
        assert answer_to(query, scene.things) == query.text.replace("the ", "").replace(" ", "-").replace("-and-", " and ")
    for scene, query in queries(scenes, "counting"):
        assert len({scene.things[index].shape for index in query.targets}) == 1
        assert [one.shape for one in scene.things].count(scene.things[query.targets[0]].shape) == len(query.targets)


@pytest.mark.parametrize("wrong", [{"length": 15}, {"size": (100, 200)}])
def test_no_room_for_a_story_is_an_error(wrong):
    with pytest.raises(DecafError, match="cannot be made"):
        make_hard_scene(1, **wrong)


def test_the_evaluation_asks_one_query_of_each_kind():
    found = evaluate(load_mllm(MLLM_FOLDER), None, 1, 11, settings=("expression",), length=16, hard=True)
    kinds = [row["kind"] for row in found["queries"]]
    assert len(set(kinds)) == len(kinds) >= 3 and set(kinds) <= set(HARD_KINDS) and "absent" in kinds
    assert set(kinds) | {"all present"} == set(found["settings"]["expression"])


def test_hard_scenes_without_an_evaluation_are_refused(capsys):
    assert cli.main(["demo", "--scenes", "hard"]) == 2
    assert "--scenes hard" in capsys.readouterr().err
