"""Fusion, coarse masks and points against the reference's numbers, step by step."""

import pytest
import torch

from decaf.attention.fusion import coarse_masks, frame_fusion, object_background_fusion, smooth
from decaf.attention.points import attention_points
from decaf.data import Attention, ClipInfo, FusedAttention

GOLDEN = "fusion"


def attentions(case):
    height, width = case["input.image_size_hw"].tolist()
    frames = len(case["input.object_frame"])
    clip = ClipInfo(frames, (height, width), tuple(range(frames)), torch.zeros(frames, 16, 16, 3, dtype=torch.uint8))
    return (Attention(kind, case[f"input.{kind}_video"], case[f"input.{kind}_frame"], clip, "q.", "?") for kind in ("object", "background"))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["object_video", "object_frame", "background_video", "background_frame"])
def test_smoothed(case, name):
    close(smooth(case[f"input.{name}"], 3 if name.endswith("video") else 7, 1.0), case[f"expected.smoothed_{name}"])


def test_contrast(case):
    contrast = object_background_fusion(*attentions(case))
    close(contrast.video, case["expected.contrast_video"])
    close(contrast.frame, case["expected.contrast_frame"])


def test_fused_map_masks_and_points(case):
    fused = frame_fusion(object_background_fusion(*attentions(case)), method="as published")
    close(fused.map, case["expected.fused"])
    masks, expected = coarse_masks(fused), case["expected.coarse_mask"].bool()
    assert masks.shape == expected.shape
    assert (masks != expected).flatten(1).float().mean(1).max() <= 1e-3
    close(as_rows(attention_points(fused)), case["expected.points_txyv"])


def test_masks_and_points_of_the_reference_map(case):
    """From the expected map itself, so that rounding before it cannot hide a difference after it."""
    clip = next(attentions(case)).clip
    fused = FusedAttention(case["expected.fused"], clip)
    assert torch.equal(coarse_masks(fused), case["expected.coarse_mask"].bool())
    torch.testing.assert_close(as_rows(attention_points(fused)), case["expected.points_txyv"], rtol=0, atol=1e-7)


def as_rows(prompts):
    return torch.cat([prompts.key[:, None].float(), prompts.xy, prompts.value[:, None]], dim=1)
