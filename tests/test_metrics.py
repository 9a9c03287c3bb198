"""J and F on masks whose score is known, and against the definition written out."""

import math

import pytest
import torch

from decaf.errors import DecafError
from decaf.evaluation.metrics import contour, contour_accuracy, dilate, region_similarity


def box(top, left, bottom, right, size=(40, 50)):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def test_known_scores():
    one = box(10, 10, 20, 30)
    half = box(10, 10, 20, 20)
    none, full = one & ~one, one | ~one
    prediction = torch.stack([one, half, none, none, one, full])
    truth = torch.stack([one, one, none, one, none, full])
    assert region_similarity(prediction, truth).tolist() == [1, 0.5, 1, 0, 0, 1]
    contours = contour_accuracy(prediction, truth).tolist()
    assert [contours[i] for i in (0, 2, 3, 4, 5)] == [1, 1, 0, 0, 1]
    assert 0 < contours[1] < 1
    assert contour_accuracy(one[None], full[None]).tolist() == [0], "a full mask has no contour"


def test_contours_match_within_a_share_of_the_diagonal():
    truth = box(20, 20, 80, 80, (100, 120))  # 0.008 of the diagonal is 1.25 pixels, rounded up to 2
    for shift, matches in [(1, True), (2, True), (3, False)]:
        moved = truth.roll(shift, 1)
        assert (contour_accuracy(moved[None], truth[None]).item() == 1) == matches
    far = box(0, 90, 10, 110, (100, 120))
    assert contour_accuracy(far[None], truth[None]).item() == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (6, 40), (31, 23)])
@pytest.mark.parametrize("radius", [0, 1, 2, 5, 12])
def test_dilation_is_the_disk_by_definition(size, radius):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(radius)) < 0.05
    mask[0, 0] = True
    expected = torch.zeros(size, dtype=torch.bool)
    for y, x in mask.nonzero().tolist():
        ys, xs = torch.meshgrid(torch.arange(size[0]) - y, torch.arange(size[1]) - x, indexing="ij")
        expected |= ys**2 + xs**2 <= radius**2
    assert torch.equal(dilate(mask, radius), expected)


def test_contour_is_one_pixel_wide_and_open_at_the_border():
    drawn = contour(box(1, 1, 3, 4, (4, 6))).int().tolist()
    assert drawn == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert contour(box(0, 0, 4, 2, (4, 6))).sum(0).tolist() == [0, 4, 0, 0, 0, 0]


def test_integer_masks_count_like_booleans():
    one, other = box(3, 3, 20, 20)[None], box(5, 5, 25, 22)[None]
    assert torch.equal(region_similarity(one.to(torch.uint8), other.float()), region_similarity(one, other))
    assert torch.equal(contour_accuracy(one.to(torch.uint8), other.float()), contour_accuracy(one, other))


def test_scores_are_symmetric_for_the_contour():
    make = torch.Generator().manual_seed(0)
    a, b = (torch.rand(3, 30, 40, generator=make) < 0.3 for _ in range(2))
    torch.testing.assert_close(contour_accuracy(a, b), contour_accuracy(b, a))
    assert all(0 <= value <= 1 and not math.isnan(value) for value in contour_accuracy(a, b).tolist())


@pytest.mark.parametrize("shapes", [((2, 4, 5), (2, 5, 4)), ((2, 4, 5), (3, 4, 5)), ((4, 5), (4, 5))])
def test_masks_of_different_shapes(shapes):
    with pytest.raises(DecafError, match="the shapes"):
        region_similarity(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(DecafError, match="the shapes"):
        contour_accuracy(*(torch.zeros(shape) for shape in shapes))
