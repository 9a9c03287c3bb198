"""Points of fused attention, and the key frame that has the most of them."""

import pytest
import torch
from made_attention import fused, three_frames

from decaf.attention.points import attention_points, best_key_frame
from decaf.errors import DecafError


@pytest.fixture
def scene():
    return three_frames()


def test_points_are_cell_centres_ordered_by_frame_row_column(scene):
    prompts = attention_points(scene)
    assert prompts.key.tolist() == [0, 0, 0, 0, 0, 2, 2]
    cells = [[1.5, 1.5], [2.5, 1.5], [1.5, 2.5], [2.5, 2.5], [6.5, 4.5], [5.5, 4.5], [6.5, 4.5]]
    assert (prompts.xy * torch.tensor([8, 6])).tolist() == cells
    torch.testing.assert_close(prompts.value, torch.tensor([0.9, 0.9, 0.9, 0.9, 1.0, 0.85, 0.85]))
    assert prompts.key.dtype == torch.int64 and prompts.xy.dtype == prompts.value.dtype == torch.float32
    assert prompts.fused is scene


def test_threshold_is_inclusive_and_bounded(scene):
    assert len(attention_points(scene, threshold=1.0).key) == 1
    assert len(attention_points(fused([[[0.5, 0.49]]]), threshold=0.5).key) == 1
    for threshold in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(DecafError, match="point threshold"):
            attention_points(scene, threshold=threshold)


def test_nan_is_refused():
    with pytest.raises(DecafError, match="not finite"):
        attention_points(fused([[[1.0, float("nan")]]]))


def test_nothing_attended_is_a_valid_answer():
    prompts = attention_points(fused(torch.zeros(3, 6, 8)))
    assert prompts.key.shape == (0,) and prompts.xy.shape == (0, 2) and prompts.value.shape == (0,)
    assert best_key_frame(prompts) == 0


def test_best_key_frame_has_the_largest_sum_of_points(scene):
    assert best_key_frame(attention_points(scene)) == 0
    assert best_key_frame(attention_points(fused([[[0.9, 0.0]], [[0.85, 0.8]], [[0.85, 0.8]]]))) == 1
    assert best_key_frame(attention_points(fused([[[0.1, 0.0]], [[0.2, 0.0]]]))) == 1, "without points, the frame that is attended most"
