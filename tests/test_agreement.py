"""The method "agreement": its fusion, candidates and choice against small computations of their own, and where it must equal the published rule."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_attention import fused, three_frames

from decaf.attention.fusion import agreement, frame_fusion
from decaf.attention.points import attention_points
from decaf.data import Attention
from decaf.errors import DecafError
from decaf.tracking.agreement import decisive_frames, objects, rival_message, select_by_agreement, visible_consistency
from decaf.tracking.peaks import peaks, with_peaks
from decaf.tracking.wanted import Wanted

ONE, ALL = Wanted(1), Wanted(None)


def contrast_of(video, frame):
    """A contrast whose maps are these on the same grid."""
    return Attention("contrast", video, frame, fused(frame).clip, "the dog.", "?")


def random_maps(seed, frames=4, grid=(6, 7)):
    make = torch.Generator().manual_seed(seed)
    return torch.rand(frames, *grid, generator=make)


# fusion


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_maps_that_agree_are_fused_as_published(weight):
    video = random_maps(1)
    contrast = contrast_of(video, 0.4 * video + 0.2)  # another scale: agreement is about where, not how much
    assert agreement(video, contrast.frame) == pytest.approx(1, abs=1e-12)
    published = frame_fusion(contrast, video_weight=weight, method="as published").map
    torch.testing.assert_close(frame_fusion(contrast, video_weight=weight).map, published, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_frames_count_as_far_as_they_agree(seed):
    video, other = random_maps(seed), random_maps(seed + 50)
    frame = (1 - 0.2 * seed) * video + 0.2 * seed * other
    share = max(0.0, np.corrcoef(video.numpy().ravel(), frame.numpy().ravel())[0, 1]) / 2
    mixed = (1 - share) * video.numpy() + share * frame.numpy()
    expected = (mixed - mixed.min()) / (mixed.max() - mixed.min())
    np.testing.assert_allclose(frame_fusion(contrast_of(video, frame)).map.numpy(), expected, atol=1e-5)


def test_frames_that_contradict_the_video_do_not_count():
    video = random_maps(3)
    against = contrast_of(video, 1 - video)
    expected = frame_fusion(against, video_weight=1, method="as published").map
    assert torch.equal(frame_fusion(against).map, expected)
    assert not torch.equal(frame_fusion(against, method="as published").map, expected)


@pytest.mark.parametrize("empty", ["video", "frame"])
def test_a_map_that_says_nothing_is_not_contradicted(empty):
    contrast = replace(contrast_of(random_maps(1), random_maps(2)), **{empty: torch.zeros(4, 6, 7)})
    assert torch.equal(frame_fusion(contrast).map, frame_fusion(contrast, method="as published").map)


def test_a_method_that_is_not_there():
    with pytest.raises(DecafError, match="agreement, as published"):
        frame_fusion(contrast_of(random_maps(1), random_maps(2)), method="as-published")


# candidates


def test_peaks_against_a_loop():
    maps = random_maps(5, 3, (7, 8))
    maps[1] *= 0.2  # a frame that does not show the object
    for share in (0.3, 0.8):
        expected = torch.zeros_like(maps, dtype=torch.bool)
        for k, row, col in np.ndindex(*maps.shape):
            around = maps[k, max(0, row - 1) : row + 2, max(0, col - 1) : col + 2]
            value, largest = maps[k, row, col], maps[k].max()
            expected[k, row, col] = value == around.max() and value >= share * largest and largest >= 0.3
        assert torch.equal(peaks(maps, share), expected) and expected[0].any() and not expected[1].any()


def test_peaks_join_the_points_in_their_order():
    given = attention_points(three_frames())
    for several in (False, True):
        found = with_peaks(given, several=several)
        rows = torch.stack([found.key, found.xy[:, 1] * 6 - 0.5, found.xy[:, 0] * 8 - 0.5, found.value], 1)
        old = torch.stack([given.key, given.xy[:, 1] * 6 - 0.5, given.xy[:, 0] * 8 - 0.5, given.value], 1)
        # A plateau's cells are points already; the weak blob of the last frame is 0.82 of its maximum, so it is a peak in both cases.
        expected = sorted(old.tolist() + [[2.0, 1.0, 1.0, float(torch.tensor(0.7))]])
        torch.testing.assert_close(rows, torch.tensor(expected), rtol=0, atol=1e-5)
        assert found.fused is given.fused


def test_weaker_peaks_count_only_where_several_objects_may_be_meant():
    maps = torch.zeros(1, 5, 9)
    maps[0, 2, 1], maps[0, 2, 7], maps[0, 0, 4] = 1.0, 0.4, 0.2
    given = attention_points(fused(maps))
    assert len(given.key) == len(with_peaks(given, several=False).key) == 1
    assert with_peaks(given, several=True).value.tolist() == [1.0, pytest.approx(0.4)]


def test_nothing_is_looked_for_where_there_are_no_points():
    given = attention_points(replace(three_frames(), presence=0.0))
    assert len(given.key) == 0 and with_peaks(given, several=True) is given


def test_points_at_the_border_of_the_frame():
    given = attention_points(three_frames())
    moved = replace(given, xy=given.xy.clone())
    moved.xy[-1] = 1.0
    assert len(with_peaks(moved, several=True).key) >= len(given.key)


# choice


def coverage_of(*boxes, frames=4, grid=(8, 10)):
    """One tracklet per box: (first frame, last frame, top, bottom, left, right), cells wholly covered."""
    made = torch.zeros(len(boxes), frames, *grid)
    for each, (first, last, top, bottom, left, right) in zip(made, boxes, strict=True):
        each[first : last + 1, top:bottom, left:right] = 1
    return made


def test_visible_consistency_against_a_loop():
    coverage = torch.rand(5, 4, 6, 7, generator=torch.Generator().manual_seed(1)) ** 4
    coverage[1, 1:] = 0
    coverage[2] *= 1e-3  # smaller than a cell everywhere
    coverage[3] = 0
    attention = random_maps(2)
    expected = []
    for tracklet in coverage.numpy():
        areas = [frame.sum() for frame in tracklet]
        least = min(0.5, max(areas) / 2)
        shown = [k for k, area in enumerate(areas) if area > 0 and area >= least]
        expected.append(sum((tracklet[k] * attention[k].numpy()).sum() / (areas[k] + 1) for k in shown) / (len(shown) + 0.25))
    np.testing.assert_allclose(visible_consistency(coverage, attention).numpy(), np.array(expected) / max(expected), rtol=1e-5)
    assert expected[3] == 0 < expected[2]


def test_what_is_seen_briefly_can_win():
    """The published sum over the clip cannot find it; here it is compared on the frames that show it."""
    from decaf.tracking.selection import attention_consistency

    coverage = coverage_of((3, 3, 0, 3, 0, 3), (0, 3, 5, 8, 5, 8))
    attention = torch.where(coverage[1] > 0, 0.5, 0.0) + torch.where(coverage[0] > 0, 0.9, 0.0)
    assert attention_consistency(coverage, attention).argmax() == 1
    assert visible_consistency(coverage, attention).argmax() == 0


def test_a_sliver_on_the_strongest_cell_does_not_win():
    coverage = coverage_of((0, 3, 2, 6, 2, 6), (0, 3, 2, 6, 2, 6))
    coverage[1, :] = 0
    coverage[1, :, 3, 3] = 0.6
    attention = torch.where(coverage[0] > 0, 0.7, 0.0)
    attention[:, 3, 3] = 1.0
    assert visible_consistency(coverage, attention).argmax() == 0


def test_a_map_that_is_zero_chooses_without_dividing_by_it():
    coverage = coverage_of((0, 3, 0, 3, 0, 3), (0, 3, 5, 8, 5, 8))
    worth = visible_consistency(coverage, torch.zeros(4, 8, 10))
    assert worth.tolist() == [0, 0] and select_by_agreement(coverage, worth, ONE, 0.8)[0] == [0]


def test_tracklets_that_lie_in_one_another_are_one_object():
    # The whole, a part of it, something else, and half of each of two.
    coverage = coverage_of((0, 3, 0, 4, 0, 4), (1, 2, 1, 3, 1, 3), (0, 3, 5, 8, 5, 9), (0, 3, 3, 7, 3, 6))
    assert objects(coverage, torch.tensor([0.8, 1.0, 0.5, 0.1])) == [[1, 0], [2], [3]]
    assert objects(coverage, torch.tensor([0.1, 0.2, 0.5, 1.0])) == [[3], [2], [1, 0]]


def test_how_many_are_kept():
    coverage = coverage_of((0, 3, 0, 2, 0, 2), (0, 3, 0, 2, 4, 6), (0, 3, 5, 7, 0, 2), (0, 3, 5, 7, 5, 7))
    worth = torch.tensor([0.4, 1.0, 0.31, 0.9])

    def chosen(wanted, threshold=0.8):
        return select_by_agreement(coverage, worth, wanted, threshold)

    assert chosen(ONE) == ([1], pytest.approx(0.9))
    assert chosen(Wanted(2)) == ([1, 3], pytest.approx(0.4))
    assert chosen(ALL) == ([0, 1, 3], pytest.approx(0.31))  # 0.8 to the fifth power is 0.33
    assert chosen(ALL, 0.7) == ([0, 1, 2, 3], 0)
    assert chosen(ALL, 1.0)[0] == [1] and chosen(ALL, 0.0)[0] == chosen(ALL, -1.0)[0] == [0, 1, 2, 3] and chosen(ALL, 2.0)[0] == [1]
    assert chosen(Wanted(3), 1.0)[0] == [1] and chosen(Wanted(3, exact=True), 1.0)[0] == [0, 1, 3]
    assert chosen(Wanted(9, exact=True))[0] == [0, 1, 2, 3]


def test_other_masks_of_a_kept_object_are_kept_if_they_are_as_good():
    coverage = coverage_of((0, 3, 0, 4, 0, 4), (0, 3, 0, 4, 0, 3))
    assert select_by_agreement(coverage, torch.tensor([1.0, 0.95]), ONE, 0.8)[0] == [0, 1]
    assert select_by_agreement(coverage, torch.tensor([1.0, 0.8]), ONE, 0.8)[0] == [0]


def test_a_rival_is_named():
    assert "85% of the attention" in rival_message(0.85, ONE) and '"all"' in rival_message(0.85, ONE)
    assert "the best 2 are kept" in rival_message(0.85, Wanted(2, exact=True))
    assert rival_message(0.5, ONE) == rival_message(0.95, ALL) == ""


@pytest.mark.parametrize(
    ("per_frame", "expected"),
    [([1, 1, 1, 1], [0, 1]), ([0, 9, 1, 1], [1]), ([0, 0, 0, 0], []), ([2, 0, 3, 1], [2]), ([3, 0, 3, 1], [0, 2]), ([0, 0, 0, 5], [3])],
)
def test_decisive_frames_hold_half_of_the_attention(per_frame, expected):
    attention = torch.full((4, 3, 3), 0.5)
    coverage = torch.zeros(4, 3, 3)
    coverage[:, 1, 1] = torch.tensor(per_frame) / 10
    assert decisive_frames(coverage, attention) == expected
