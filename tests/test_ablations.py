"""The parts of the method that can be left out, as the paper's ablations do: what is left is what the formulas without them say."""

import pytest
import torch
from dense_rollout import dense_rows, random_rows, relative

from decaf import FusionSettings, TrackingSettings
from decaf.attention.extract import extract_attention
from decaf.attention.fusion import frame_fusion, object_background_fusion, resize, slots_to_frames
from decaf.attention.rollout import last_row_rollout
from decaf.clips import clip_from_images
from decaf.demo import MLLM_FOLDER, SAM2_FILE
from decaf.demo.scenes import make_scene
from decaf.errors import DecafError
from decaf.mllm import load_mllm
from decaf.pipeline import fused_attention, segment_attention, segment_clip
from decaf.sam2 import load_sam2
from decaf.settings import METHODS


def test_without_v_max_all_heads_count_alike():
    prefix, suffixes = random_rows(2, 6, 2, (37, 9, 4))
    visual = torch.arange(37) % 5 > 1
    plain = last_row_rollout(prefix, suffixes, visual, v_max=False)
    weighed = last_row_rollout(prefix, suffixes, visual)
    for row, other, suffix in zip(plain, weighed, suffixes, strict=True):
        assert relative(row, dense_rows(prefix, suffix, visual, v_max=False)) < 1e-5
        assert relative(row, other) > 1e-2


@pytest.fixture(scope="module")
def models():
    return load_mllm(MLLM_FOLDER), load_sam2(SAM2_FILE)


@pytest.fixture(scope="module")
def asked(models):
    """(clip, (object, background) attention) of a made-up scene with three objects."""
    scene = make_scene(102, length=4, count=(3, 3), lively=False)
    clip = clip_from_images(torch.from_numpy(scene.frames))
    return clip, extract_attention(models[0], clip, f"the {scene.things[0].colour} {scene.things[0].shape}")


def test_the_setting_reaches_the_rollout(models, asked):
    clip, (attention, _) = asked
    plain = extract_attention(models[0], clip, attention.query, v_max=False)[0]
    assert relative(plain.video, attention.video) > 1e-3 and relative(plain.frame, attention.frame) > 1e-3


def scaled(maps):
    return (maps - maps.min()) / (maps.max() - maps.min())


@pytest.mark.parametrize("method", METHODS)
def test_maps_of_the_video_or_of_single_frames(asked, method):
    attention = asked[1]
    contrast = object_background_fusion(*attention)
    video = scaled(resize(slots_to_frames(contrast.video, len(contrast.frame)), contrast.frame.shape[-2:]))
    assert torch.allclose(fused_attention(attention, FusionSettings(maps="video"), method=method)[1].map, video, atol=1e-6)
    assert torch.allclose(
        fused_attention(attention, FusionSettings(maps="frames"), method=method)[1].map, scaled(contrast.frame), atol=1e-6
    )
    assert torch.equal(fused_attention(attention, method=method)[1].map, frame_fusion(contrast, method=method).map)


def test_without_contrast_the_background_says_nothing(asked):
    attention, background = asked[1]
    kept, fused = fused_attention((attention, background), FusionSettings(contrast=False))
    assert kept is attention and torch.equal(fused.map, frame_fusion(attention).map)
    with pytest.raises(DecafError, match="no choice of maps"):
        fused_attention((attention, background), FusionSettings(maps="none"))


@pytest.mark.parametrize("method", METHODS)
def test_without_consistency_only_the_point_counts(models, asked, method):
    clip, attention = asked
    settings = TrackingSettings(method=method, score_threshold=0.5, targets="all")
    for track in segment_attention(models[1], clip, attention, tracking=settings).tracks.tracks:
        assert track.score == pytest.approx((track.predicted_iou + track.attention + track.consistency) / 3)
    kept = segment_attention(
        models[1], clip, attention, tracking=TrackingSettings(**{**vars(settings), "consistency": False})
    ).tracks.tracks
    if method == METHODS[1]:
        assert all((track.predicted_iou + track.attention) / 2 > 0.5 for track in kept)
    assert kept


@pytest.mark.slow
def test_all_of_them_by_name(models, asked):
    clip, (attention, _) = asked
    left_out = {"contrast": False, "maps": "video", "v_max": False, "consistency": False}
    result = segment_clip(*models, clip, attention.query, **left_out)
    assert result.contrast.kind == "object" and not torch.equal(result.fused.map, segment_clip(*models, clip, attention.query).fused.map)
