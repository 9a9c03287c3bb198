"""Points as JSON and boxes, the forms in which other packs take them. Without ComfyUI: that file needs none of it."""

import json
import sys

import pytest
import torch
from made_attention import fused, three_frames
from pack_modules import pack_module

from decaf.attention.points import attention_points

interop = pack_module("interop")
attention_boxes, connected_to, points_json = interop.attention_boxes, interop.connected_to, interop.points_json


@pytest.fixture
def scene():
    return three_frames()


def test_nothing_of_comfyui_is_needed():
    assert not {name.partition(".")[0] for name in sys.modules} & {"comfy", "comfy_api", "folder_paths"}


def test_no_points_are_empty_lists():
    prompts = attention_points(fused(torch.zeros(3, 6, 8)))
    assert attention_boxes(prompts) == [[], [], []]
    assert points_json(prompts, 0) == "[]"


def test_points_as_json_in_pixels(scene):
    prompts = attention_points(scene)
    assert json.loads(points_json(prompts, 2)) == [{"x": 82, "y": 67}, {"x": 97, "y": 67}]
    assert points_json(prompts, 1) == "[]"
    tiny = attention_points(fused(torch.ones(1, 3, 3), size=(1, 1)))
    assert json.loads(points_json(tiny, 0)) == [{"x": 0, "y": 0}] * 9


def test_box_holds_the_parts_with_points_only(scene):
    boxes = attention_boxes(attention_points(scene))
    assert [len(one) for one in boxes] == [1, 0, 1]
    first, last = boxes[0][0], boxes[2][0]
    assert all(type(value) is int for value in first.values()) and list(first) == ["x", "y", "width", "height"]
    assert 5 <= first["x"] <= 15 and 5 <= first["y"] <= 15, first
    assert 105 <= first["x"] + first["width"] <= 115 and 75 <= first["y"] + first["height"] <= 85, first
    # The weak blob in the upper left of the last frame is in the coarse mask, but holds no point.
    assert last["x"] >= 65 and last["y"] >= 50, last


@pytest.mark.parametrize("size", [(1, 1), (16, 4000), (3, 2), (7, 1)])
def test_boxes_lie_in_frames_of_any_size(size):
    maps = torch.zeros(1, 4, 5)
    maps[0, 3, 4] = 1
    [[box]] = attention_boxes(attention_points(fused(maps, size)))
    assert 0 <= box["x"] and box["x"] + box["width"] <= size[1] and box["width"] >= 1
    assert 0 <= box["y"] and box["y"] + box["height"] <= size[0] and box["height"] >= 1


def flood(mask, seeds):
    kept = seeds & mask
    while True:
        grown = torch.nn.functional.max_pool2d(kept[None].float(), 3, 1, 1)[0].bool() & mask
        if torch.equal(grown, kept):
            return kept
        kept = grown


@pytest.mark.parametrize("density", [0.2, 0.4, 0.6, 0.9])
def test_connected_parts_equal_a_flood_fill(density):
    make = torch.Generator().manual_seed(5)
    for height, width in [(1, 1), (1, 30), (30, 1), (25, 37), (40, 40)]:
        mask = torch.rand(height, width, generator=make) < density
        seeds = torch.rand(height, width, generator=make) < 0.02
        assert torch.equal(connected_to(mask, seeds), flood(mask, seeds))
