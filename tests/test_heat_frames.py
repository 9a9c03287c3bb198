"""The picture with a few key frames that a node shows, and what a step offers to whoever looks."""

import numpy as np
import pytest
import torch
from random_clips import clip_of
from scipy.ndimage import label

import decaf
from decaf.attention.frames import key_frames
from decaf.clips import clip_from_images, clip_info
from decaf.data import FusedAttention, SAM2Prompts
from decaf.pictures.heat_frames import MOST, heat_frames, shown_keys
from decaf.report import Preview, Report


def fused_of(clip, maps):
    keys = key_frames(len(clip), len(maps))
    return FusedAttention(maps, clip_info(clip, keys), "the dog", 0.9)


def grey_clip(length, height=72, width=128):
    return clip_from_images(torch.full((length, height, width, 3), 90, dtype=torch.uint8))


def test_of_each_part_of_the_clip_the_frame_with_the_strongest_attention():
    maps = torch.zeros(16, 4, 6)
    for key in (1, 4, 9, 13, 15):
        maps[key, 2, 3] = 0.5
    maps[9, 0, 0] = 0.9
    keys = shown_keys(fused_of(grey_clip(40), maps))
    parts = np.array_split(np.arange(16), MOST)
    assert len(keys) == MOST and all(key in part for key, part in zip(keys, parts, strict=True))
    assert keys == [1, 4, 6, 9, 13, 15]
    assert shown_keys(fused_of(grey_clip(3), maps[:3])) == [0, 1, 2]


@pytest.mark.parametrize("size", [(720, 1280), (1280, 720), (512, 512), (4, 900), (900, 4)])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_it_fits_a_node_and_every_frame_is_in_it(size, count):
    clip = grey_clip(16, *(size if min(size) < 9 else (size[0] // 8, size[1] // 8)))
    maps = torch.zeros(count, 4, 6)
    bare = np.array(heat_frames(clip, fused_of(clip, maps), note="presence 0.90"))
    assert bare.shape[1] == 720 and 100 < bare.shape[0] <= 1700
    maps[:, 1, 2] = 1.0
    hot = np.array(heat_frames(clip, fused_of(clip, maps), note="presence 0.90"))
    # The brightest heat is in each of the frames: as many separate warm spots as there are frames.
    warm = (hot[..., 0].astype(int) - hot[..., 2] > 90) & (np.abs(hot.astype(int) - bare).sum(-1) > 60)
    spots, number = label(warm)
    sizes = np.bincount(spots.ravel())[1:]
    assert (sizes > sizes.max() / 4).sum() == min(count, MOST), f"{number} spots"


def test_times_and_points_are_drawn():
    clip = grey_clip(8)
    fused = fused_of(clip, torch.zeros(8, 4, 6))
    bare = np.array(heat_frames(clip, fused))
    assert (np.array(heat_frames(clip, fused, fps=24)) != bare).any(), "times"
    points = SAM2Prompts(torch.tensor([0]), torch.tensor([[0.5, 0.5]]), torch.tensor([1.0]), fused)
    assert (np.array(heat_frames(clip, fused, points)) != bare).any(), "points"


def test_a_preview_is_made_only_for_somebody_who_looks():
    made, seen = [], []

    def make():
        made.append(1)
        return Preview(3, torch.zeros(2, 2, 3, dtype=torch.uint8))

    Report().preview(make)
    assert not made
    Report(watch=lambda ask: None).preview(make)
    assert not made
    Report(watch=lambda ask: seen.append(ask())).preview(make)
    assert made == [1] and seen[0].index == 3


def test_who_looks_may_cancel():
    stop = KeyboardInterrupt()

    def watch(make):
        raise stop

    report = Report(watch=watch)
    with pytest.raises(KeyboardInterrupt):
        report.preview(lambda: None)
    assert report.cancelled_by(stop)


def test_steps_offer_what_they_see(mllm_folder, sam2_file):
    """The method on a clip of seven frames: heat maps of key frames first, then masks of every frame; each of its own frame."""
    clip, seen = clip_of(7), []
    report = decaf.Report(watch=lambda make: seen.append(make()))
    mllm = decaf.load_mllm(mllm_folder("qwen2_vl"))
    decaf.segment_clip(mllm, decaf.load_sam2(sam2_file), clip, "the dog", tokens_per_frame=16, presence_threshold=0, progress=report)
    assert all(torch.equal(one.frame, clip[one.index]) for one in seen)
    heat, masks = [one for one in seen if one.heat is not None], [one for one in seen if one.masks]
    assert seen == heat + masks and len(heat) >= 2 and {one.index for one in masks} == set(range(7))
    assert all(one.heat.ndim == 2 and one.heat.isfinite().all() for one in heat)
    assert all(mask.ndim == 2 and mask.dtype == torch.bool for one in masks for mask in one.masks)
