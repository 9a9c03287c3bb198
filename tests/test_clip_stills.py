"""Frames of a clip as pictures, and the order in which a tracker is to see them."""

import pytest
import torch

from decaf.clips.still import FRAME_ORDERS, frame_order, scaled
from decaf.errors import DecafError

ONE, WHOLE, BACK = FRAME_ORDERS


def test_orders():
    assert frame_order(5, ONE, 3) == ([3], 0)
    assert frame_order(5, WHOLE, 99) == ([0, 1, 2, 3, 4], 0)
    assert frame_order(5, BACK, 3) == ([3, 2, 1, 0, 1, 2, 3, 4], 3)
    assert frame_order(5, BACK, 0) == frame_order(5, WHOLE)
    for frame in range(5):
        order, lead = frame_order(5, BACK, frame)
        assert order[0] == frame and order[lead:] == [0, 1, 2, 3, 4] and all(abs(a - b) == 1 for a, b in zip(order, order[1:], strict=False))


def test_a_frame_or_order_that_is_not_there():
    for which in (ONE, BACK):
        for frame in (-1, 5):
            with pytest.raises(DecafError, match=f"no frame {frame}: the clip has frames 0 to 4"):
                frame_order(5, which, frame)
    with pytest.raises(DecafError, match="no order"):
        frame_order(5, "backwards")


def test_pictures_are_only_made_smaller():
    ramp = torch.arange(200, dtype=torch.uint8)[None, :, None].repeat(100, 1, 3)
    assert scaled(ramp) is ramp and scaled(ramp, 200) is ramp and scaled(ramp, 999) is ramp
    small = scaled(ramp, 50)
    assert small.shape == (25, 50, 3) and small.dtype == torch.uint8
    means = ramp.float().reshape(25, 4, 50, 4, 3).mean((1, 3))
    assert (small.float() - means)[:, 2:-2].abs().max() <= 1, "averaged, not skipped over"
    assert scaled(ramp.permute(1, 0, 2), 3).shape == (3, 2, 3) and scaled(ramp[:1], 5).shape == (1, 5, 3)
