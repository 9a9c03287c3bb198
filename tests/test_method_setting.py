"""The setting *method* and *targets* through the whole second half: what is tracked, kept and said."""

from dataclasses import replace

import pytest
import tiny_sam2
import torch
from moving_shapes import make_prompts, moving_shapes

from decaf.errors import DecafError
from decaf.sam2 import load_sam2
from decaf.settings import TrackingSettings, settings_of
from decaf.tracking import TrackMemo, segment
from decaf.tracking.agreement import select_by_agreement, visible_consistency
from decaf.tracking.peaks import with_peaks
from decaf.tracking.wanted import Wanted


@pytest.fixture(scope="module")
def sam2(tmp_path_factory):
    return load_sam2(tiny_sam2.make_sam2(tmp_path_factory.mktemp("sam2") / "tiny.safetensors", 3, 64, "2.1"))


@pytest.fixture(scope="module")
def clip():
    return moving_shapes(5, 48, 64, 3)


def asked(clip, query):
    prompts = make_prompts(clip, 8, 3)
    return replace(prompts, fused=replace(prompts.fused, query=query))


def test_all_that_match_are_those_of_the_rule(sam2, clip):
    """Against every tracklet there is, which the published rule keeps below any threshold, from the same points."""
    prompts, memo = asked(clip, "the dog."), TrackMemo()
    found = segment(sam2, clip, with_peaks(prompts, several=True), method="as published", score_threshold=-10.0, memo=memo)
    coverage = torch.stack([each.coverage for each in memo._kept[0].tracklets])
    consistency = visible_consistency(coverage, prompts.fused.map)
    worth = consistency * torch.tensor([track.predicted_iou for track in found.tracks])
    for targets, wanted, threshold in (("all", Wanted(None), 0.9), ("all", Wanted(None), 0.5)):
        expected, _ = select_by_agreement(coverage, worth, wanted, threshold)
        tracks = segment(sam2, clip, prompts, targets=targets, score_threshold=threshold)
        assert [(track.frame, track.xy) for track in tracks.tracks] == [(found.tracks[i].frame, found.tracks[i].xy) for i in expected]
        assert [track.consistency for track in tracks.tracks] == pytest.approx([float(consistency[i]) for i in expected])
        for place, i in enumerate(expected):
            assert torch.equal(tracks.masks(place), found.masks(i))
    assert 1 <= len(segment(sam2, clip, prompts, targets="all", score_threshold=0.9).tracks) < len(found.tracks)


def test_the_query_says_how_many(sam2, clip):
    one, two, every = (segment(sam2, clip, asked(clip, query), score_threshold=0.1) for query in ("the dog.", "the two dogs.", "all dogs."))
    assert len(one.tracks) < len(two.tracks) < len(every.tracks)
    chosen = segment(sam2, clip, asked(clip, "the two dogs."), targets="one")
    assert len(chosen.tracks) == len(one.tracks)
    assert len(segment(sam2, clip, asked(clip, "all dogs."), score_threshold=0.1, max_tracks=1).tracks) == 1


def test_the_published_rule_does_not_ask_how_many(sam2, clip):
    given = [segment(sam2, clip, asked(clip, "the dog."), method="as published", targets=targets) for targets in ("auto", "one", "all")]
    assert given[0].tracks == given[1].tracks == given[2].tracks


def test_settings_that_are_not_there(sam2, clip):
    for change in ({"method": "paper"}, {"targets": "two"}):
        with pytest.raises(DecafError, match="choose one of"):
            segment(sam2, clip, asked(clip, "the dog."), **change)
    with pytest.raises(TypeError):
        segment(sam2, clip, asked(clip, "the dog."), metod="agreement")


def test_settings_by_name():
    assert settings_of({"method": "as published", "targets": "all"})[2] == TrackingSettings(method="as published", targets="all")
    assert TrackingSettings(method="as published").as_published and not TrackingSettings().as_published
