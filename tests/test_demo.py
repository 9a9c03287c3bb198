"""The whole method with the bundled models: it masks what was asked for, and not because it masks something."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from slow import slow_but

from decaf.attention.extract import extract_attentions
from decaf.attention.fusion import coarse_masks, frame_fusion, object_background_fusion
from decaf.clips import clip_from_images
from decaf.command import main as cli
from decaf.demo import MLLM_FOLDER, SAM2_FILE
from decaf.demo.asking import KINDS, answer_to, says
from decaf.demo.scenes import make_scene
from decaf.evaluation.evaluate import evaluate
from decaf.evaluation.maps import pointing
from decaf.evaluation.metrics import region_similarity
from decaf.mllm import load_mllm
from decaf.pipeline import segment_attention, segment_clip
from decaf.sam2 import load_sam2
from decaf.settings import METHODS, PointSettings, TrackingSettings

LENGTH = 6
SCENES = 12


@pytest.fixture(scope="module")
def models():
    return load_mllm(MLLM_FOLDER), load_sam2(SAM2_FILE)


@pytest.fixture(scope="module")
def asked(models):
    """Scenes with several objects, each asked for two of them by colour and shape: (scene, query, result)."""
    results = []
    for seed in (101, 102, 103):
        scene = make_scene(seed, length=LENGTH, count=(3, 3), lively=False)
        clip = clip_from_images(torch.from_numpy(scene.frames))
        for target in (0, 1):
            one = scene.things[target]
            query = next(q for q in scene.queries if q.text == f"the {one.colour} {one.shape}")
            results.append((scene, query, segment_clip(*models, clip, query.text)))
    return results


def overlaps(scene, result) -> list[float]:
    """J of the result with each object of the scene."""
    mask = result.tracks.union()
    return [float(region_similarity(mask, torch.from_numpy(one)).mean()) for one in scene.masks]


def test_the_object_that_was_asked_for_is_masked(asked):
    right = 0
    for scene, query, result in asked:
        scores = overlaps(scene, result)
        right += int(np.argmax(scores)) == query.targets[0] and max(scores) > 0.4
    assert right >= len(asked) - 1


def test_another_query_gives_another_mask(asked):
    different = 0
    for (_, _, one), (_, _, other) in zip(asked[::2], asked[1::2], strict=True):
        different += float(region_similarity(one.tracks.union(), other.tracks.union()).mean()) < 0.3
    assert different >= 2


def test_attention_points_at_the_object(asked):
    hits = []
    for scene, query, result in asked:
        keys = list(result.fused.clip.key_frames)
        hits.append(pointing(result.fused.map, torch.from_numpy(scene.truth(query))[keys]))
    assert np.mean(hits) > 0.75


@pytest.fixture(scope="module")
def by_kind(models):
    """Attention to every query of some scenes: kind -> (scene, clip, query, (object, background)), and nothing of SAM 2 yet."""
    by_kind = defaultdict(list)
    for seed in range(301, 301 + SCENES):
        scene = make_scene(seed, length=LENGTH + 2)
        clip = clip_from_images(torch.from_numpy(scene.frames))
        attentions = extract_attentions(models[0], clip, [query.text for query in scene.queries])
        for query, attention in zip(scene.queries, attentions, strict=True):
            by_kind[query.kind].append((scene, clip, query, attention))
    return by_kind


LOOSE = {METHODS[0]: "counting", METHODS[1]: "time"}
"""What each method often gets wrong where attention is right: ours may keep another object beside the ones asked for; the published choice sums
over the clip, in which what is seen briefly loses."""


@pytest.mark.parametrize("method", slow_but(METHODS, [METHODS[0]]))
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "absent"])
def test_right_object_by_kind(by_kind, models, kind, method):
    """Where attention points at the target in every frame, SAM 2 masks the target and nothing else; and it points there far more often than
    chance would; not so for several targets, which are most of what there is."""
    hits, chance, masked = [], [], None
    for scene, clip, query, attention in by_kind[kind]:
        fused = frame_fusion(object_background_fusion(*attention), method=method)
        truth = torch.from_numpy(scene.truth(query))
        hits.append(pointing(fused.map, truth))
        chance.append(len(query.targets) / len(scene.things))
        if masked is None and hits[-1] == 1:
            masked = segment_attention(models[1], clip, attention, tracking=TrackingSettings(method=method)).tracks.union()
            if kind == LOOSE[method]:
                assert (masked & truth).any(), query.text
            else:
                assert (masked & truth).sum() > 0.7 * masked.sum() and (masked & truth).sum() > 0.3 * truth.sum(), query.text
    assert masked is not None
    assert kind == "counting" or np.mean(hits) > np.mean(chance) + 0.15, (
        f"{np.mean(hits):.2f} of {len(hits)}, by chance {np.mean(chance):.2f}"
    )


def test_what_is_not_there_gets_no_mask(by_kind, models):
    absent = [(clip, query, attention) for _, clip, query, attention in by_kind["absent"]]
    present = [attention[0].presence for kind, rows in by_kind.items() if kind != "absent" for *_, attention in rows]
    assert np.mean([attention[0].presence < PointSettings.presence_threshold for *_, attention in absent]) >= 0.8
    assert np.mean([presence >= PointSettings.presence_threshold for presence in present]) >= 0.9
    clip, query, attention = min(absent, key=lambda one: one[2][0].presence)
    refused = segment_attention(models[1], clip, attention).tracks
    assert not refused.union().any() and refused.length == len(clip) and query.text in refused.message
    forced = segment_attention(models[1], clip, attention, points=PointSettings(presence_threshold=0))
    assert forced.tracks.union().any()


@pytest.mark.slow
def test_ablation_order(by_kind):
    """Coarse masks as in the paper: raw object attention, then less the background's, then with the single frames'."""
    j = defaultdict(list)
    for scene, _, query, attention in (row for kind, rows in by_kind.items() if kind != "absent" for row in rows):
        truth = torch.from_numpy(scene.truth(query))
        contrast = object_background_fusion(*attention)
        for name, one in (("raw", frame_fusion(attention[0], video_weight=1)), ("contrast", frame_fusion(contrast, video_weight=1))):
            j[name].append(float(region_similarity(coarse_masks(one), truth).mean()))
        j["fused"].append(float(region_similarity(coarse_masks(frame_fusion(contrast)), truth).mean()))
    assert np.mean(j["raw"]) < np.mean(j["contrast"]) < np.mean(j["fused"]), {name: np.mean(values) for name, values in j.items()}


def test_the_same_twice(models, asked):
    scene, query, result = asked[0]
    again = segment_clip(*models, clip_from_images(torch.from_numpy(scene.frames)), query.text)
    assert torch.equal(again.tracks.union(), result.tracks.union()) and torch.equal(again.fused.map, result.fused.map)


def test_evaluation_counts_what_it_says(models):
    figures = evaluate(*models, 2, 11, settings=("expression",), length=4)
    rows = figures["queries"]
    assert {row["seed"] for row in rows} == {11, 12} and sum(row["kind"] == "absent" for row in rows) == 2
    table = figures["settings"]["expression"]
    assert table["all present"]["queries"] == len(rows) - 2
    present = [row for row in rows if row["kind"] != "absent"]
    assert figures["summary"]["present_jf"] == pytest.approx(np.mean([(row["j"] + row["f"]) / 2 for row in present]), abs=1e-4)
    published = [(row["published"]["j"] + row["published"]["f"]) / 2 for row in present]
    gain = table["all present"]["jf_gain"]
    assert table["all present"]["jf_as_published"] == pytest.approx(np.mean(published), abs=1e-4)
    assert gain["gain"] == pytest.approx(figures["summary"]["present_jf"] - np.mean(published), abs=2e-4)
    assert gain["interval"][0] <= gain["gain"] <= gain["interval"][1]
    assert figures["summary"]["coarse_j_fused"] == pytest.approx(np.mean([row["coarse"]["fused"] for row in present]), abs=1e-4)


def test_pointing_counts_frames_that_show_the_target():
    maps = torch.zeros(3, 4, 4)
    maps[:, 0, 0] = 1
    truth = torch.zeros(3, 16, 16, dtype=torch.bool)
    truth[0, :4, :4] = True  # pointed at
    truth[1, 8:, 8:] = True  # missed; the third frame does not show it
    assert pointing(maps, truth) == 0.5
    assert pointing(torch.zeros(3, 4, 4), truth) == 0


def test_the_command_makes_a_clip_and_tells_how_well_it_went(tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "--seed", "101", "--frames", "4", "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert "J&F" in output and str(out / "overlay.mp4") in output
    for folder in ("clip", "truth", "masks"):
        assert len(list((out / folder).glob("?????.png"))) == 4
    assert (np.asarray(Image.open(out / "clip" / "00002.png")) == make_scene(101, length=4).frames[2]).all()
    assert json.loads((out / "result.json").read_text())["clip"]["frames"] == 4


def test_the_command_says_when_it_knows_no_truth(tmp_path, capsys):
    arguments = ["demo", "--seed", "101", "--frames", "2", "--query", "a horse on the beach", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "not known" in output and "J&F" not in output
    assert not list((tmp_path / "truth").iterdir())


@pytest.mark.slow
def test_the_command_writes_figures(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert cli.main(["demo", "--evaluate", "1", "--seed", "5", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert set(figures["settings"]) == {"expression", "class name"}
    assert {"noun_colour_pointing", "absent_empty", "present_lost", "coarse_j_fused"} <= set(figures["summary"])
    assert "noun_colour_pointing" in capsys.readouterr().out
    # Only one setting has the model answer; the figure stands in both, since the question is the same.
    present = [row["answered"] for row in figures["queries"] if row["kind"] != "absent"]
    for table in figures["settings"].values():
        assert table["all present"]["answers"] == pytest.approx(np.mean(present), abs=1e-4)


def test_answers_count_whatever_their_form():
    scene = make_scene(11, length=4)
    for query in scene.queries:
        truth = answer_to(query, scene.things)
        assert says(truth, truth) and says(f"The {truth.replace('-', ' ').title()}.", truth)
        assert not says("purple triangle, I guess", truth) or truth == "purple-triangle"
    assert not says("red", "red-star") and not says("none", "red-star") and not says("red-star", "none")


def test_bundled_models_are_named_in_the_other_command_too(tmp_path, capsys):
    clip = tmp_path / "clip"
    clip.mkdir()
    for index, frame in enumerate(make_scene(101, length=2).frames):
        Image.fromarray(frame).save(clip / f"{index}.png")
    arguments = ["segment", str(clip), "--query", "the circle", "--mllm", "bundled", "--sam2", "bundled", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert len(list((tmp_path / "out" / "masks").glob("*.png"))) == 2


def test_an_evaluation_of_nothing_is_refused(capsys):
    assert cli.main(["demo", "--evaluate", "0"]) == 2
    assert "--evaluate 0" in capsys.readouterr().err
