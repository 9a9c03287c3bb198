"""Damaged videos and pictures: what can be decoded, or a sentence, whatever is wrong with them."""

import logging
import random
import re

import pytest
from PIL import Image
from video_files import encode, numbered

from decaf.clips import open_clip
from decaf.errors import DecafError


def test_a_video_in_a_format_that_nobody_knows(tmp_path):
    path = encode(tmp_path / "a.mkv", 3)
    data = path.read_bytes()
    assert b"V_MPEG4/ISO/AVC" in data
    path.write_bytes(data.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/AVC"))
    with pytest.raises(DecafError, match="a.mkv are in a format that is not known here.*convert"):
        open_clip(path)


def test_a_second_page_without_a_width(tmp_path):
    """PIL raises a TypeError when it counts the pages."""
    path = tmp_path / "a.tif"
    Image.fromarray(numbered(3)).save(path, save_all=True, append_images=[Image.fromarray(numbered(4))])
    first, width, second, width_again, third = re.split(rb"(\x00\x01[\x03\x04]\x00\x01\x00\x00\x00)", path.read_bytes())
    path.write_bytes(first + width + second + b"\xff" + width_again[1:] + third)
    with pytest.raises(DecafError, match="a.tif could not be read as an image"):
        open_clip(path)


def damaged(whole, draw, kind):
    """Cut off, with bytes put in, or with bytes changed: anywhere, or in its head."""
    data = bytearray(whole)
    if kind == 0:
        del data[draw.randrange(len(data)) :]
    elif kind == 1:
        offset = draw.randrange(len(data))
        data[offset : offset + draw.randrange(1, 64)] = draw.randbytes(draw.randrange(64))
    else:
        reach = min(len(data), 600) if kind == 2 else len(data)
        for _ in range(draw.randrange(1, 12)):
            data[draw.randrange(reach)] = draw.choice([0, 255, draw.randrange(256)])
    return data


MOVING = {
    "a.mp4": {},
    "a.mkv": {},
    "a.avi": {"codec": "mpeg4"},
    "b.avi": {"codec": "ffv1", "pixels": "bgr0"},
    "a.mov": {"codec": "prores_ks", "pixels": "yuv422p10le"},
    "a.ts": {},
    "a.gif": {"codec": "gif", "pixels": "rgb8"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MOVING, "p.png", "p.jpg", "p.webp", "p.bmp", "p.tif", "p.ppm", "p.tga"])
def test_any_damage_is_a_sentence_or_a_clip(tmp_path, name, caplog):
    caplog.set_level(logging.CRITICAL)
    path = tmp_path / name
    encode(path, 6, **MOVING[name]) if name in MOVING else Image.fromarray(numbered(3)).save(path)
    whole = path.read_bytes()
    for seed in range(60):
        path.write_bytes(damaged(whole, random.Random(f"{name} {seed}"), seed % 4))
        try:
            clip = open_clip(path, budget=3 * 48 * 64 * 3)
            for index in (len(clip) - 1, 0, len(clip) // 2):
                assert clip[index].shape == (*clip.frame_size, 3)
        except DecafError as error:
            assert name in str(error) and str(error).isprintable() and len(str(error)) < 700, seed
