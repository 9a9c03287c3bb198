"""Fusion: what the golden data cannot show (bad input, degenerate maps, ablations) and the properties that hold for any map."""

import logging
from dataclasses import replace

import pytest
import torch

from decaf.attention.fusion import coarse_masks, frame_fusion, object_background_fusion, otsu_threshold
from decaf.data import Attention, ClipInfo, FusedAttention
from decaf.errors import DecafError


def clip_of(frames=4, size=(48, 64), length=None):
    return ClipInfo(length or frames, size, tuple(range(frames)), torch.zeros(frames, 16, 16, 3, dtype=torch.uint8))


def attention(kind, *, frames=4, slots=None, video_grid=(4, 5), frame_grid=(8, 10), seed=0, clip=None):
    make = torch.Generator().manual_seed(seed)
    slots = slots or (frames + 1) // 2
    video = torch.rand(slots, *video_grid, generator=make) * 1e-2
    frame = torch.rand(frames, *frame_grid, generator=make) * 1e-3
    return Attention(kind, video, frame, clip or clip_of(frames), "the dog.", f"{kind}?")


def pair(**kwargs):
    return attention("object", seed=1, **kwargs), attention("background", seed=2, **kwargs)


def fused_of(*maps, size=(48, 64)):
    return FusedAttention(torch.stack(maps), clip_of(len(maps), size))


@pytest.mark.parametrize("frames, slots", [(1, 1), (2, 1), (2, 2), (5, 3), (16, 8), (16, 16)])
def test_fused_map_spans_the_unit_interval_on_the_frame_grid(frames, slots):
    fused = frame_fusion(object_background_fusion(*pair(frames=frames, slots=slots)))
    assert fused.map.shape == (frames, 8, 10) and fused.map.dtype == torch.float32
    assert fused.map.min() == 0 and fused.map.max() == 1


def test_each_slot_counts_for_its_own_two_frames():
    object, background = pair(frames=5)
    contrast = object_background_fusion(object, background)
    only_last = replace(contrast, video=contrast.video * torch.tensor([0.0, 0, 1])[:, None, None])
    sums = frame_fusion(only_last, video_weight=1).map.sum((1, 2))
    assert sums[:4].eq(0).all() and sums[4] > 0


def test_video_weight_picks_one_of_the_two_maps():
    contrast = object_background_fusion(*pair())
    other_video = replace(contrast, video=contrast.video.flip(-1))
    other_frame = replace(contrast, frame=contrast.frame.flip(-1))
    for weight, without_effect, with_effect in [(0, other_video, other_frame), (1, other_frame, other_video)]:
        expected = frame_fusion(contrast, video_weight=weight, method="as published").map
        assert torch.equal(frame_fusion(without_effect, video_weight=weight, method="as published").map, expected)
        assert not torch.equal(frame_fusion(with_effect, video_weight=weight, method="as published").map, expected)


def test_raw_object_attention_equals_contrast_with_an_empty_background():
    object, background = pair()
    background = replace(background, video=background.video * 0, frame=background.frame * 0)
    expected = frame_fusion(object_background_fusion(object, background)).map
    torch.testing.assert_close(frame_fusion(object).map, expected)


@pytest.mark.parametrize("value", [0.0, 1e-3])
def test_constant_maps_give_nothing_and_do_not_crash(value):
    # Without smoothing: zero padding would darken the border of a constant map.
    object, background = pair()
    object = replace(object, video=torch.full_like(object.video, value), frame=torch.full_like(object.frame, value))
    background = replace(background, video=object.video * 0, frame=object.frame * 0)
    fused = frame_fusion(object_background_fusion(object, background, sigma=0))
    assert fused.map.eq(0).all()
    assert not coarse_masks(fused).any()


def test_one_constant_frame_map_leaves_the_others_alone():
    object, background = pair()
    frame = object.frame.clone()
    frame[2] = 0
    contrast = object_background_fusion(replace(object, frame=frame), background)
    assert contrast.frame[2].eq(0).all()
    assert contrast.frame[[0, 1, 3]].amax((1, 2)).eq(1).all()


def test_one_by_one_grid_and_frame():
    object, background = pair(frames=1, video_grid=(1, 1), frame_grid=(1, 1), clip=clip_of(1, (1, 1)))
    fused = frame_fusion(object_background_fusion(object, background))
    assert fused.map.tolist() == [[[0.0]]]
    assert coarse_masks(fused).tolist() == [[[False]]]


@pytest.mark.parametrize(
    "object, background, says",
    [
        (attention("background"), attention("object"), "swapped"),
        (attention("object"), attention("object"), 'given "object" and "object"'),
        (attention("background"), attention("background"), 'given "background" and "background"'),
        (attention("contrast"), attention("background"), 'given "contrast"'),
        (attention("object"), attention("background", frames=3), "different key frames"),
        (attention("object"), attention("background", clip=clip_of(4, (48, 65))), "different clips.*64x48.*65x48"),
        (attention("object"), attention("background", clip=clip_of(4, length=9)), "different clips.*4 frames.*9 frames"),
        (attention("object"), attention("background", clip=replace(clip_of(), thumbnails=clip_of().thumbnails + 1)), "different clips"),
        (attention("object"), attention("background", video_grid=(5, 4)), "video maps have different grids.*4x5.*5x4"),
        (attention("object"), attention("background", frame_grid=(8, 9)), "frame maps have different grids.*8x10.*8x9"),
        (attention("object"), attention("background", slots=4), "video maps have different grids"),
        (attention("object", slots=3), attention("background", slots=3), "3 video slots"),
    ],
)  # fmt: skip
def test_attentions_that_do_not_belong_together(object, background, says):
    with pytest.raises(DecafError, match=says):
        object_background_fusion(object, background)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["video", "frame"])
@pytest.mark.parametrize("kind", ["object", "background"])
def test_maps_that_are_not_finite(kind, name, bad):
    both = {one.kind: one for one in pair()}
    values = getattr(both[kind], name).clone()
    values[0, 1, 1] = bad
    both[kind] = replace(both[kind], **{name: values})
    with pytest.raises(DecafError, match=f"1 values of the {kind} attention's {name} maps are not finite"):
        object_background_fusion(both["object"], both["background"])


def test_frame_fusion_refuses_what_it_cannot_mean():
    object, background = pair()
    with pytest.raises(DecafError, match="background attention"):
        frame_fusion(background)
    with pytest.raises(DecafError, match="video_weight is 1.5"):
        frame_fusion(object, video_weight=1.5)
    with pytest.raises(DecafError, match="not finite"):
        frame_fusion(replace(object, frame=object.frame * float("nan")))
    for options in ({"frame_kernel": 4}, {"video_kernel": 0}, {"sigma": -1}):
        with pytest.raises(DecafError, match="smoothing"):
            object_background_fusion(object, background, **options)


def test_different_queries_are_said(caplog):
    object, background = pair()
    with caplog.at_level(logging.WARNING):
        object_background_fusion(object, replace(background, query="the cat."))
    assert "the dog." in caplog.text and "the cat." in caplog.text


def naive_otsu(levels):
    best, threshold = 0.0, 0
    values = levels.flatten().double()
    for level in range(256):
        low, high = values[values <= level], values[values > level]
        if len(low) and len(high):
            variance = len(low) * len(high) * float(low.mean() - high.mean()) ** 2
            if variance > best * (1 + 1e-12):
                best, threshold = variance, level
    return threshold


def test_otsu_is_the_best_of_all_splits():
    make = torch.Generator().manual_seed(3)
    for spread in (2, 20, 90):
        levels = torch.cat([torch.randn(300, generator=make) * spread + 60, torch.randn(100, generator=make) * spread + 170])
        levels = levels.clamp(0, 255).to(torch.uint8)
        assert otsu_threshold(levels) == naive_otsu(levels)
    assert otsu_threshold(torch.tensor([10, 10, 200, 200], dtype=torch.uint8)) == 10
    assert otsu_threshold(torch.zeros(5, dtype=torch.uint8)) == 0


def test_coarse_mask_is_the_bright_part_at_frame_size():
    bright = torch.zeros(8, 8)
    bright[2:4, 4:8] = 1
    masks = coarse_masks(fused_of(bright, bright * 0, size=(80, 40)))
    assert masks.shape == (2, 80, 40) and masks.dtype == torch.bool
    assert masks[0, 22:38, 22:].all() and not masks[0, :14].any() and not masks[0, 46:].any() and not masks[0, :, :14].any()
    assert not masks[1].any()
    assert coarse_masks(fused_of(bright), (10, 12)).shape == (1, 10, 12)
    assert coarse_masks(fused_of(bright, size=(1, 1))).shape == (1, 1, 1)
    assert coarse_masks(fused_of(bright, size=(16, 4000))).shape == (1, 16, 4000)
