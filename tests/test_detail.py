"""The detail "fast": fewer tokens, and the same way from them to maps."""

import pytest
from random_clips import clip_of
from slow import EACH_FAMILY

import decaf
from decaf.errors import DecafError
from decaf.mllm import load_mllm
from decaf.report import Report
from decaf.settings import FAST_KEY_FRAMES, AttentionSettings

QUERY = "the dog that gets the ball first"


@pytest.mark.parametrize("family", EACH_FAMILY)
@pytest.mark.parametrize("size", [(60, 90), (120, 70)])
def test_single_frames_are_as_coarse_as_the_video(mllm_folder, family, size):
    """The same number of tokens in each frame, or where a family's rule cannot give that, hardly more; and never more than as published."""
    mllm = load_mllm(mllm_folder(family))
    video = mllm.family.video_layout(mllm.vision, size, [0.0, 1.0], 40)
    fine, coarse = (layout(mllm.vision, size, 1, 40) for layout in (mllm.family.image_layout, mllm.family.coarse_image_layout))
    _, rows, cols = video.grid
    if family.startswith(("qwen", "internvl")):
        assert coarse.grid == (1, rows, cols)
    assert coarse.tokens <= max(fine.tokens, rows * cols)
    (attention, _), _ = decaf.extract_attentions(mllm, clip_of(3, *size), [QUERY, "the cup"], tokens_per_frame=40, detail="fast")
    assert attention.frame.shape == (3, *coarse.grid[1:])
    assert attention.frame.isfinite().all() and attention.frame.max() > 0


def test_fewer_key_frames_and_fewer_tokens(mllm_folder):
    mllm, clip = load_mllm(mllm_folder("qwen2_5_vl")), clip_of(16)
    counts = {}
    for detail in ("paper", "fast"):
        report = Report()
        decaf.extract_attention(mllm, clip, QUERY, AttentionSettings(tokens_per_frame=40, detail=detail), progress=report)
        counts[detail] = report.counts
    assert (counts["paper"]["key_frames"], counts["fast"]["key_frames"]) == (16, FAST_KEY_FRAMES)
    # 16 frames of four times the tokens, against 8 of the same.
    assert counts["paper"]["visual_tokens_prefilled"] > 5 * counts["fast"]["visual_tokens_prefilled"]


def test_fewer_frames_than_that_stay_as_they_are(mllm_folder):
    assert AttentionSettings(max_key_frames=3, detail="fast").shown_key_frames == 3
    assert AttentionSettings(max_key_frames=100).shown_key_frames == 100


def test_a_detail_that_is_none(mllm_folder):
    with pytest.raises(DecafError, match='no detail "faster"; choose one of paper, fast'):
        decaf.extract_attention(load_mllm(mllm_folder("qwen2_5_vl")), clip_of(2), QUERY, detail="faster")
