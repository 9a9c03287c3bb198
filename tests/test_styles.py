"""How objects are shown: what each style leaves alone, and that lines and numbers can be seen on any content, also by the colour-blind."""

import numpy as np
import pytest
import torch

from decaf.pictures.drawing import OBJECT_COLOURS
from decaf.pictures.styles import show_objects
from decaf.settings import STYLES

GREY = torch.full((60, 80, 3), 100, dtype=torch.uint8)
CASING = 14, 14, 18


def square(rows=(20, 40), cols=(30, 60)):
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[slice(*rows), slice(*cols)] = True
    return mask


def colour(index):
    return torch.tensor(OBJECT_COLOURS[index % len(OBJECT_COLOURS)], dtype=torch.uint8)


def noise(seed=0, size=(60, 80)):
    return torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("style", STYLES)
def test_the_frame_given_is_left_alone(style):
    frame = noise()
    before = frame.clone()
    shown = show_objects(frame, [square(), square((0, 10), (0, 10))], style, numbers=True)
    assert shown.shape == frame.shape and shown.dtype == torch.uint8 and torch.equal(frame, before)
    assert not torch.equal(shown, frame)
    assert shown.data_ptr() != frame.data_ptr()


def test_spotlight_leaves_the_object_and_darkens_the_rest():
    frame = noise()
    shown = show_objects(frame, [square()])
    assert torch.equal(shown[23:37, 33:57], frame[23:37, 33:57])
    rest = shown[:15].float()
    assert rest.mean() < frame[:15].float().mean() * 0.4
    saturation = [(one.amax(-1) - one.amin(-1)).float().mean() for one in (shown[:15], frame[:15])]
    assert saturation[0] < 0.25 * saturation[1]
    assert torch.equal(show_objects(frame, [square()], opacity=0)[:15], frame[:15])
    half = show_objects(frame, [square()], opacity=0.5)[:15].float()
    assert (half - (rest + frame[:15]) / 2).abs().max() <= 1


def test_tint_is_half_the_objects_colour():
    shown = show_objects(GREY, [square((10, 50), (5, 35)), square((10, 50), (45, 75))], "tint")
    for index, (y, x) in enumerate(((30, 20), (30, 60))):
        assert (shown[y, x].float() - (colour(index).float() + 100) / 2).abs().max() <= 1
    assert torch.equal(shown[30, 40], GREY[30, 40])
    white = show_objects(torch.full_like(GREY, 255), [square()], "tint")[30, 45].tolist()
    assert all(value >= part - 1 for value, part in zip(white, OBJECT_COLOURS[0], strict=True)), "bytes do not overflow"


def test_outline_changes_nothing_but_the_edge():
    frame = noise()
    shown = show_objects(frame, [square()], "outline")
    changed = (shown != frame).any(-1)
    assert changed[18:20, 32:58].all(), "the line lies outside the object"
    assert not changed[22:38, 32:58].any() and not changed[:15].any()


def test_checkerboard_and_matte():
    frame = noise()
    board = show_objects(frame, [square()], "checkerboard")
    assert torch.equal(board[square()], frame[square()]) and set(board[~square()].unique().tolist()) == {96, 144}
    matte = show_objects(frame, [square()], "matte", ids=[3], numbers=True)
    assert torch.equal(matte, square()[..., None].expand(-1, -1, 3).to(torch.uint8) * 255)


def test_each_object_has_a_colour_of_its_own():
    nothing = torch.zeros(60, 80, dtype=torch.bool)
    for index in range(len(OBJECT_COLOURS) + 2):
        drawn = show_objects(GREY, [nothing] * index + [square()], "outline")
        found = {tuple(pixel) for pixel in drawn.flatten(0, 1).unique(dim=0).tolist()}
        assert found == {(100, 100, 100), CASING, OBJECT_COLOURS[index % len(OBJECT_COLOURS)]}


def test_soft_edges_are_blended():
    frame, soft = noise(), torch.linspace(0, 1, 80).expand(60, 80)
    shown = show_objects(frame, [soft], "checkerboard")
    behind = show_objects(frame, [], "checkerboard").float()
    exact = behind + (frame.float() - behind) * soft[..., None]
    assert (shown.float() - exact).abs().max() <= 1
    assert torch.equal(show_objects(frame, [square().float()], "spotlight"), show_objects(frame, [square()], "spotlight"))


def test_alpha_of_tracks_is_taken_as_it_is():
    frame, soft = noise(), torch.linspace(0, 1, 80).expand(60, 80)
    for style in STYLES:
        levels = (soft * 255).round().to(torch.uint8)
        assert torch.equal(show_objects(frame, [levels], style), show_objects(frame, [soft], style))


def test_masks_of_another_size():
    """Larger ones get a soft edge when they are made smaller: a pixel is as white as it is covered."""
    large = torch.zeros(120, 160, dtype=torch.bool)
    large[41:81, 60:120] = True
    for mask in (large, large.float(), large.byte() * 255):
        matte = show_objects(GREY, [mask], "matte")[..., 0]
        assert matte[25:39, 32:58].min() == 255 and matte[:18].max() == 0 and 100 < matte[20, 45] < 155
    small = torch.zeros(6, 8, dtype=torch.bool)
    small[2:4, 3:6] = True
    assert torch.equal(show_objects(GREY, [small], "matte")[..., 0] == 255, square((20, 40), (30, 60)))


def test_a_border_that_two_objects_share_does_not_show():
    """Where either covers half of a pixel, both together cover it."""
    left, right = torch.zeros(2, 60, 80, dtype=torch.uint8).unbind()
    left[:, :40], left[:, 40], right[:, 40], right[:, 41:] = 255, 128, 127, 255
    frame = noise()
    assert torch.equal(show_objects(frame, [left, right], "checkerboard"), frame)
    assert (show_objects(frame, [left, right], "matte")[:, 38:43] == 255).all()


@pytest.mark.parametrize("width", [1.5, 6, 20])
def test_lines_are_as_smooth_as_edges_and_as_strong(width):
    """On a slanted edge, a soft mask's line changes little from column to column; and however wide the edge, there is the line's own colour."""
    frame = torch.full((200, 240, 3), 100, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(240.0), indexing="ij")
    soft = ((y - 100 + 0.15 * x) / width + 0.5).clamp(0, 1)
    shown = show_objects(frame, [soft], "outline").float()
    hard = show_objects(frame, [soft >= 0.5], "outline").float()
    steps = [one[80:95, 20:-20].diff(dim=1).abs().max() for one in (shown, hard)]
    assert steps[0] < 0.75 * steps[1]
    for column in range(20, 220):
        best = (shown[:, column] - colour(0).float()).abs().amax(-1).min()
        dark = (shown[:, column] - torch.tensor(CASING).float()).abs().amax(-1).min()
        assert best < 60 and dark < 60, (column, best, dark)


def test_nothing_to_show():
    for masks in ([], [torch.zeros(60, 80, dtype=torch.bool)]):
        assert torch.equal(show_objects(GREY, masks, "tint", ids=[1] * len(masks), numbers=True), GREY)
        assert not show_objects(GREY, masks, "matte").any()


def test_the_frames_border_is_no_edge():
    shown = show_objects(GREY, [square((0, 20), (30, 50))], "outline")
    assert torch.equal(shown[:16, 34:46], GREY[:16, 34:46])


def luminance(pixels):
    """Relative luminance of sRGB colours (..., 3) in 0..255, as the web's accessibility guidelines define it."""
    part = np.asarray(pixels, dtype=float) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def contrast(one, other):
    """1 (alike) to 21 (black on white); 3 is what the guidelines ask of graphics."""
    low, high = np.sort([luminance(one), luminance(other)], axis=0)
    return (high + 0.05) / (low + 0.05)


def seen_by(pixels, kind):
    """Colours as people without one kind of cone see them: linear matrices of Viénot, Brettel and Mollon (1999)."""
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    lost = {
        "protanopia": [[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]],
        "deuteranopia": [[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]],
    }[kind]
    linear = (np.asarray(pixels, dtype=float) / 255) ** 2.2
    seen = linear @ (np.linalg.inv(to_lms) @ np.array(lost) @ to_lms).T
    return 255 * np.clip(seen, 0, 1) ** (1 / 2.2)


@pytest.mark.parametrize("kind", ["all cones", "protanopia", "deuteranopia"])
@pytest.mark.parametrize("style", ["spotlight", "tint", "outline"])
def test_the_line_stands_out_on_both_sides_on_any_content(style, kind):
    """Walking over the edge on a row, the line's colour meets a contrast of 3 within a line's width on each side, whatever is in the picture."""
    for index in range(len(OBJECT_COLOURS)):
        masks = [torch.zeros(60, 80, dtype=torch.bool)] * index + [square()]
        for content in (noise(index), torch.full_like(GREY, 255), torch.zeros_like(GREY), colour(index).expand(60, 80, 3)):
            shown = show_objects(content, masks, style).numpy()
            row = shown[30]
            edge = [place for place in range(20, 32) if tuple(row[place]) == OBJECT_COLOURS[index]]
            # Content that has the line's own colour goes on beside the casing: the line is what lies between two casings.
            dark = [place for place in range(20, 34) if tuple(row[place]) == CASING]
            assert len(dark) >= 2 and any(dark[0] < place < dark[-1] for place in edge)
            pixels = [row[dark[0]], row[dark[0] + 1], row[dark[-1] - 1], row[dark[-1]]]
            seen = pixels if kind == "all cones" else [seen_by(one, kind) for one in pixels]
            assert contrast(seen[0], seen[1]) >= 3 and contrast(seen[2], seen[3]) >= 3, (index, kind)


def test_numbers_are_written_at_their_objects_and_can_be_read():
    frame = torch.full((240, 320, 3), 100, dtype=torch.uint8)
    left, right = torch.zeros(2, 240, 320, dtype=torch.bool).unbind()
    left[80:200, 20:120], right[0:100, 220:320] = True, True
    plain = show_objects(frame, [left, right], "tint", ids=[0, 12])
    numbered = show_objects(frame, [left, right], "tint", ids=[0, 12], numbers=True)
    changed = (plain != numbered).any(-1)
    assert changed[60:100, 40:100].any() and changed[:30, 240:300].any(), "also at the frame's border"
    assert not changed[120:, :].any() and not changed[40:, 200:].any()
    other = show_objects(frame, [left, right], "tint", ids=[7, 12], numbers=True)
    assert (other != numbered).any(-1)[60:100, 40:100].any()
    for plate in (numbered[:, :200][changed[:, :200]], numbered[:, 200:][changed[:, 200:]]):
        assert contrast(max(plate.tolist(), key=luminance), CASING) >= 3


@pytest.mark.parametrize("style", ["spotlight", "tint", "outline"])
def test_an_object_keeps_its_colour_when_others_are_dropped(style):
    first, second = square((0, 20), (0, 20)), square((30, 50), (40, 60))
    both, alone = show_objects(GREY, [first, second], style), show_objects(GREY, [second], style, ids=[1])
    around = (slice(25, 55), slice(35, 65))
    assert torch.equal(both[around], alone[around])
    assert not torch.equal(alone[around], show_objects(GREY, [second], style)[around])
