"""Pictures: what is drawn is where it should be, at any size of frame and for any query."""

import numpy as np
import pytest
import torch
from PIL import Image

from decaf.attention.frames import key_frames
from decaf.attention.points import attention_points
from decaf.clips import clip_from_images, clip_info
from decaf.data import FusedAttention, Track, Tracks
from decaf.masks import MaskStore
from decaf.pictures.contact_sheet import contact_sheet
from decaf.pictures.drawing import cut_out, heat_colours, heat_overlay, point_overlay
from decaf.pictures.lettering import font_for, plain, wrapped
from decaf.pictures.styles import show_objects
from decaf.results.files import write_masks


def made(size=(90, 160), frames=8, query="the red box.", objects=2):
    """A clip with a red box, attention on it, its points, and a mask on it per object."""
    height, width = size
    images = torch.full((frames, height, width, 3), 0.4)
    box = slice(height // 4, height // 2 + 1), slice(width // 4, width // 2 + 1)
    images[:, box[0], box[1]] = torch.tensor([0.9, 0.1, 0.1])
    clip = clip_from_images(images)
    keys = key_frames(frames)
    maps = torch.zeros(len(keys), 9, 16)
    maps[:, 2:5, 4:9] = 1
    fused = FusedAttention(maps, clip_info(clip, keys), query)
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[box] = True
    store = MaskStore(objects, frames, size)
    for index in range(objects):
        for frame in range(frames):
            store.put(index, frame, mask)
    records = tuple(Track(index + 1, 0, (0.4, 0.4), 0.9, 0.9, 0.9) for index in range(objects))
    return clip, fused, attention_points(fused), Tracks(store, records, "" if objects else "Nothing was found.")


FRAME = torch.full((60, 80, 3), 100, dtype=torch.uint8)


def square(size=(60, 80)):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[20:40, 30:60] = True
    return mask


def test_more_attention_is_brighter():
    colours = heat_colours(torch.linspace(0, 1, 101))
    brightness = colours @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert brightness.diff().min() > 0
    assert colours.min() >= 0 and colours.max() <= 1
    attention = torch.zeros(6, 8)
    attention[2:4, 3:6] = 1
    shown = heat_overlay(FRAME, attention)
    assert shown.shape == FRAME.shape and shown.dtype == torch.uint8
    assert shown[30, 45].sum() > shown[5, 5].sum() + 150
    assert torch.equal(shown[5, 5], shown[55, 75])


def test_outline_and_points_of_the_heat_map():
    attention = torch.zeros(6, 8)
    mask = square()
    plainly = heat_overlay(FRAME, attention)
    outlined = heat_overlay(FRAME, attention, mask)
    changed = (plainly != outlined).any(-1)
    assert changed[20, 30:60].all() and changed[20:40, 59].all() and not changed[22:38, 32:58].any() and not (changed & ~mask).any()
    dotted = heat_overlay(FRAME, attention, None, torch.tensor([[0.25, 0.5], [0.0, 1.0]]))
    near = (plainly != dotted).any(-1).nonzero().tolist()
    assert [30, 20] in near and [59, 0] in near
    assert all(min((y - 30) ** 2 + (x - 20) ** 2, (y - 60) ** 2 + x**2) < 60 for y, x in near)
    assert torch.equal(heat_overlay(FRAME, attention, mask & False, torch.zeros(0, 2)), plainly)


def test_cut_out_keeps_the_inside_and_darkens_the_rest():
    shown = cut_out(FRAME, square())
    assert shown[22:38, 32:58].eq(100).all()
    assert shown[~square()].max() < 40
    assert torch.equal(cut_out(FRAME, square()[::2, ::2])[25:35, 35:55], FRAME[25:35, 35:55]), "a mask of another size is fitted"


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (16, 4000), (4000, 16), (3, 5)])
def test_any_size_of_frame(size):
    frame = torch.full((*size, 3), 100, dtype=torch.uint8)
    mask = torch.ones(size, dtype=torch.bool)
    points = torch.tensor([[0.0, 0.0], [0.999, 0.999]])
    for shown in (
        heat_overlay(frame, torch.ones(4, 4), mask, points),
        cut_out(frame, mask),
        point_overlay(frame, points, (4, 4)),
        show_objects(frame, [mask], ids=[7], numbers=True),
    ):
        assert shown.shape == frame.shape and shown.dtype == torch.uint8
    sheet = contact_sheet(*made(size, frames=3))
    assert 200 < sheet.width < 2000 and 150 < sheet.height < 2000


def test_sheet_shows_every_step_in_a_column_of_its_own():
    clip, fused, prompts, tracks = made(frames=20)
    full = contact_sheet(clip, fused, prompts, tracks)
    fewer = contact_sheet(clip, fused)
    assert full.width > fewer.width
    assert contact_sheet(clip, fused, prompts, tracks, rows=3).height < full.height
    # Centres of the red box in the five pictures of the first row: 336x189 px from (100, ...), 8 px apart.
    top = full.height - 24 - 6 * (189 + 8) + 8
    inside = [full.getpixel((100 + column * 344 + int(0.3 * 336), top + int(0.3 * 189))) for column in range(5)]
    outside = [full.getpixel((100 + column * 344 + int(0.8 * 336), top + int(0.8 * 189))) for column in range(5)]
    red, grey = (230, 26, 26), (102, 102, 102)
    assert near(inside[0], red) and near(outside[0], grey)
    assert sum(inside[1]) > sum(outside[1]) + 200, "the heat map glows on the box"
    assert near(inside[2], red) and max(outside[2]) < 40, "the coarse mask keeps the box"
    assert max(outside[3]) < 80, "points on a dimmed frame"
    assert near(inside[4], red) and max(outside[4]) < 40, "the box is in the spotlight"


def near(colour, other):
    return max(abs(a - b) for a, b in zip(colour, other, strict=True)) <= 8


def test_sheet_of_nothing_found_says_so():
    clip, fused, _, tracks = made(objects=0)
    fused = FusedAttention(fused.map * 0, fused.clip, fused.query)
    without = contact_sheet(clip, fused, attention_points(fused), Tracks(tracks.store, ()))
    with_prompts = contact_sheet(clip, fused, attention_points(fused), tracks)
    assert without.size == with_prompts.size and without.tobytes() != with_prompts.tobytes()


def test_sheet_of_a_clip_scaled_since():
    clip, fused, prompts, tracks = made()
    half = clip_from_images(torch.stack([frame[::2, ::2] for frame in clip]))
    assert contact_sheet(half, fused, prompts, tracks).size == contact_sheet(clip, fused, prompts, tracks).size


QUERIES = [
    "", "  \n\t", "最初にボールを取る犬", "الكلب الأول", "собака 🐕 dog", "a\x00b\x1bc\u200e\ud800",
    "dog " * 2500, "犬" * 10000, "x" * 10000,
]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_any_query(query):
    sheet = contact_sheet(*made(frames=1, query=query))
    assert isinstance(sheet, Image.Image) and sheet.height < 600


def test_text_is_wrapped_to_the_width():
    font = font_for("abc", 20)
    lines = wrapped("the quick brown fox jumps over the lazy dog", font, 150, 10)
    assert " ".join(lines) == "the quick brown fox jumps over the lazy dog" and len(lines) > 2
    assert all(font.getlength(line) <= 150 for line in lines)
    cut = wrapped("word " * 100, font, 150, 2)
    assert len(cut) == 2 and cut[1].endswith("...") and all(font.getlength(line) <= 150 for line in cut)
    assert "".join(wrapped("x" * 40, font, 150, 10)) == "x" * 40
    assert wrapped("", font, 150, 2) == []
    assert plain("a \n\x00\u2003b ") == "a b"


def test_the_same_sheet_every_time():
    assert contact_sheet(*made()).tobytes() == contact_sheet(*made()).tobytes()


def test_sheet_shows_the_frames_that_have_points():
    from decaf.pictures.contact_sheet import _chosen_keys

    assert _chosen_keys(16, 6, []) == [0, 3, 6, 9, 12, 15]
    assert {1, 2} <= set(_chosen_keys(16, 6, [1, 2])) and len(_chosen_keys(16, 6, [1, 2])) == 6
    assert set(_chosen_keys(16, 6, list(range(10)))) <= set(range(10))
    assert _chosen_keys(3, 6, [1]) == [0, 1, 2]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (60, 80)])
def test_mask_files(size, tmp_path):
    """Grey, eight bits, white inside."""
    mask = torch.rand(size, generator=torch.Generator().manual_seed(0)) < 0.5
    masks = [mask, ~mask, mask & ~mask, mask | ~mask]
    assert write_masks(tmp_path, iter(masks), 4) == sum(bool(one.any()) for one in masks)
    for index, one in enumerate(masks):
        with Image.open(tmp_path / f"{index:05d}.png") as picture:
            assert picture.mode == "L" and torch.equal(torch.from_numpy(np.array(picture)), one.to(torch.uint8) * 255)
