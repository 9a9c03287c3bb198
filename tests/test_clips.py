"""Clips of image files and of tensors, and whether a clip is the one that attention was taken from."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import numbered

from decaf.attention.frames import key_frames
from decaf.clips import check_same_clip, clip_from_images, clip_info, open_clip, thumbnails, write_video
from decaf.errors import DecafError


def save(folder, count=12, size=(20, 30), name="frame{}.png"):
    folder.mkdir(exist_ok=True)
    pictures = [numbered(index, size) for index in range(count)]
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / name.format(index))
    return pictures


@pytest.mark.parametrize("held", [1, 5, 100])
def test_folder_in_natural_order_and_any_access(tmp_path, held):
    pictures = save(tmp_path / "frames")  # frame10 comes after frame9
    clip = open_clip(tmp_path / "frames", budget=held * 20 * 30 * 3)
    assert len(clip) == 12 and clip.frame_size == (20, 30) and clip.fps is None and clip.name == "frames"
    for index in [*range(12), *reversed(range(12)), 3, 9, 3]:
        assert np.array_equal(clip[index].numpy(), pictures[index])
    assert [torch.equal(frame, torch.from_numpy(picture)) for frame, picture in zip(clip, pictures, strict=True)] == [True] * 12


def test_other_files_in_a_folder_are_left_out_with_a_word(tmp_path, caplog):
    pictures = save(tmp_path, 3, name="{}.PNG")
    (tmp_path / "1.txt").write_text("notes")
    (tmp_path / ".hidden.png").write_text("a leftover of a file manager")
    (tmp_path / "sub.png").mkdir()
    with caplog.at_level(logging.INFO):
        clip = open_clip(tmp_path)
    assert len(clip) == 3 and np.array_equal(clip[1].numpy(), pictures[1])
    assert "1.txt" in caplog.text


def test_folders_that_are_not_a_clip(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DecafError, match="holds no image .1 other files"):
        open_clip(tmp_path)
    save(tmp_path, 3)
    Image.fromarray(numbered(0, (20, 31))).save(tmp_path / "frame2.png")
    with pytest.raises(DecafError, match=r"different sizes: frame0\.png is 30x20, frame2\.png is 31x20"):
        open_clip(tmp_path)
    (tmp_path / "frame2.png").write_bytes((tmp_path / "frame1.png").read_bytes()[:-400])
    with pytest.raises(DecafError, match=r"frame2\.png could not be read as an image"):
        open_clip(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = numbered(5, (20, 30))
    Image.fromarray(stored).save(tmp_path / "photo.png", exif=exif)
    upright = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.swapaxes(0, 1), 6: np.rot90(stored, -1), 7: stored[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(stored),
    }[orientation]  # fmt: skip
    assert np.array_equal(open_clip(tmp_path / "photo.png")[0].numpy(), upright)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = RAMP[..., None].repeat(3, 2)


@pytest.mark.parametrize(
    "name, image, expected",
    [
        ("grey.png", Image.fromarray(RAMP), GREY),
        ("grey_alpha.png", Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]), GREY),
        ("alpha.png", Image.fromarray(np.dstack([GREY, 255 - RAMP])), GREY),
        ("palette.png", Image.fromarray(RAMP).convert("P"), GREY),
        ("sixteen.png", Image.fromarray(RAMP.astype(np.uint16) * 257), GREY),
        ("sixteen.tif", Image.fromarray(RAMP.astype(np.uint16) * 257), GREY),
        ("bits.png", Image.fromarray(RAMP > 127), (GREY > 127) * np.uint8(255)),
        ("one.bmp", Image.new("RGB", (1, 1), (1, 2, 3)), np.array([[[1, 2, 3]]], dtype=np.uint8)),
        ("wide.png", Image.new("RGB", (4000, 16), (1, 2, 3)), np.full((16, 4000, 3), (1, 2, 3), dtype=np.uint8)),
    ],
)
def test_kinds_of_pixels(tmp_path, name, image, expected):
    image.save(tmp_path / name)
    clip = open_clip(tmp_path / name)
    assert len(clip) == 1 and clip[0].dtype == torch.uint8
    assert np.array_equal(clip[0].numpy(), expected)


def test_images_that_cannot_be_one_frame(tmp_path, caplog):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DecafError, match=r"float\.tif has floating-point pixels"):
        open_clip(tmp_path / "float.tif")
    first, second = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    first.save(tmp_path / "moving.png", save_all=True, append_images=[second])
    assert np.array_equal(open_clip(tmp_path / "moving.png")[0].numpy(), GREY)
    assert "only the first is used" in caplog.text


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tensors_give_back_their_bytes(dtype, channels):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, channels)
    levels[1] = levels[1].flip(0)
    if channels == 4:
        levels[..., 3] = 7
    clip = clip_from_images(levels if dtype == torch.uint8 else (levels.double() / 255).to(dtype))
    assert len(clip) == 2 and clip.frame_size == (16, 16) and clip.fps is None
    for index in (1, 0):
        assert clip[index].shape == (16, 16, 3) and clip[index].dtype == torch.uint8
        assert torch.equal(clip[index], levels[index, ..., :1].expand(-1, -1, 3))


def test_tensor_is_not_copied():
    images = torch.zeros(3, 4, 4, 3)
    clip = clip_from_images(images)
    images[1] = 1
    assert clip[1].eq(255).all()


def test_values_outside_are_clipped_with_a_word(caplog):
    images = torch.zeros(2, 4, 4, 3, dtype=torch.bfloat16)
    images[1, 0, 0] = torch.tensor([-3.0, 0.5, 255.0])
    clip = clip_from_images(images)
    assert clip[1][0, 0].tolist() == [0, 128, 255]
    assert "range from -3 to 255" in caplog.text
    caplog.clear()
    clip_from_images(torch.full((1, 4, 4, 3), 1.02))  # resampling overshoots that much
    assert not caplog.text


@pytest.mark.parametrize(
    "images, says",
    [
        (torch.zeros(4, 4, 3), "leading dimension"),
        (torch.zeros(1, 3, 8, 8), r"\(1, 3, 8, 8\).*\(frames, height, width, channels\)"),
        (torch.zeros(1, 8, 8, 2), "with 1, 3 or 4 channels"),
        (torch.zeros(0, 8, 8, 3), "at least one frame"),
        (torch.zeros(1, 0, 8, 3), "holds no pixels"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.int64), "int64"),
        (torch.zeros(3, 8, 8, 3).index_fill_(0, torch.tensor(2), float("nan")), "Frame 2 .* not finite"),
        (torch.zeros(3, 8, 8, 3).index_fill_(0, torch.tensor(1), float("inf")), "Frame 1 .* not finite"),
    ],
)
def test_tensors_that_are_not_a_clip(images, says):
    with pytest.raises(DecafError, match=says):
        clip_from_images(images)


def scene(seed, frames=20, size=(90, 160)):
    """A soft random landscape with a box moving through it."""
    make = torch.Generator().manual_seed(seed)
    ground = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 6, generator=make), size=size, mode="bicubic")[0].clamp(0, 1)
    images = ground.permute(1, 2, 0).repeat(frames, 1, 1, 1)
    for index in range(frames):
        left = index * (size[1] - 20) // frames
        images[index, 30:60, left : left + 20] = torch.tensor([0.9, 0.1, 0.1])
    return images


def resized(images, size):
    return torch.nn.functional.interpolate(images.permute(0, 3, 1, 2), size=size, mode="area").permute(0, 2, 3, 1)


def info_of(images):
    return clip_info(clip_from_images(images), key_frames(len(images)))


def test_record_of_a_clip():
    images = scene(1)
    info = info_of(images)
    assert (info.length, info.frame_size, info.key_frames) == (20, (90, 160), key_frames(20))
    assert info.thumbnails.shape == (16, 16, 16, 3) and info.thumbnails.dtype == torch.uint8
    checker = torch.zeros(1, 32, 64, 3, dtype=torch.uint8)
    checker[:, ::2] = 200
    checker[:, :16, :32] = 50
    small = thumbnails(clip_from_images(checker), [0])[0]
    assert small[:8, :8].eq(50).all() and small[8:].eq(100).all() and small[:, 8:].eq(100).all()


SAME = {
    "itself": lambda x: x,
    "alpha": lambda x: torch.cat([x, x[..., :1]], dim=-1),
    "half the size": lambda x: resized(x, (45, 80)),
    "sides rounded to 8": lambda x: resized(x, (88, 160)),
    "darker": lambda x: x * 0.3,
    "gamma": lambda x: x**2.2,
    "hard contrast": lambda x: ((x - 0.5) * 2 + 0.5).clamp(0, 1),
    "grey": lambda x: x.mean(-1, keepdim=True),
    "sepia": lambda x: x.mean(-1, keepdim=True) * torch.tensor([1.0, 0.7, 0.4]),
    "noisy": lambda x: (x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 0.2).clamp(0, 1),
}


@pytest.mark.parametrize("change", SAME)
def test_the_same_clip_passes(change):
    images = scene(1)
    check_same_clip(clip_from_images(SAME[change](images)), info_of(images))


def test_the_same_clip_recompressed_passes(tmp_path):
    images = scene(1)
    write_video(tmp_path / "x.mp4", clip_from_images(images), 25, (90, 160))
    check_same_clip(open_clip(tmp_path / "x.mp4"), info_of(images))


OTHER = {
    "shorter": (lambda x: x[:-1], "a clip of 20 frames, but images has 19"),
    "one frame": (lambda x: x[:1], "20 frames, but images has 1"),
    "cropped": (lambda x: x[:, :, 20:140], "160x90, but those of images are 120x90"),
    "upright": (lambda x: x.transpose(1, 2), "160x90, but those of images are 90x160"),
    "another scene": (lambda x: scene(2), "16 of its 16 key frames show something else"),
    "upside down": (lambda x: x.flip(1), "key frames show something else"),
    "negative": (lambda x: 1 - x, "key frames show something else"),
    "black": (lambda x: x * 0, "16 of its 16 key frames show something else"),
}


@pytest.mark.parametrize("change", OTHER)
def test_another_clip_is_refused(change):
    make, says = OTHER[change]
    images = scene(1)
    with pytest.raises(DecafError, match=says):
        check_same_clip(clip_from_images(make(images)), info_of(images))


def test_even_pictures_are_told_apart_by_colour_only():
    black = torch.zeros(3, 8, 8, 3)
    check_same_clip(clip_from_images(black + 0.1), info_of(black))
    with pytest.raises(DecafError, match="3 of its 3"):
        check_same_clip(clip_from_images(black + 1), info_of(black))


@pytest.mark.parametrize("size, other", [((1, 1), (2, 2)), ((16, 4000), (2, 512)), ((4, 1000), (16, 4000))])
def test_extreme_shapes_scaled_pass(size, other):
    images = torch.linspace(0, 1, size[1])[None, None, :, None].expand(2, *size, 3)
    check_same_clip(clip_from_images(resized(images, other)), info_of(images))
