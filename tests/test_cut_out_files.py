"""Cut-outs as EXR pictures, read back number by number, and one for each object."""

import os
import stat
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import pytest
import torch
from short_runs import read
from sounding_clips import heard, soft_masks, times_of, write_clip
from video_files import encode

from decaf.clips import clip_from_images, open_clip
from decaf.command import main as cli
from decaf.data import Track, Tracks
from decaf.errors import DecafError
from decaf.finishing import SoundFile, apply_mask, apply_mask_each, read_with_alpha, write_pictures
from decaf.masks import MaskStore
from decaf.settings import EffectSettings

CUT_OUT = EffectSettings("cut out")


def linear(values):
    """sRGB 0..1 to light (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def exr(path):
    """(H, W, 3 or 4) float64 of a file of half floats."""
    with av.open(str(path)) as file:
        frame = next(file.decode(video=0))
    assert frame.format.name in ("gbrpf16le", "gbrapf16le")
    planes = [np.frombuffer(plane, np.float16).reshape(plane.height, -1)[:, : plane.width].astype(float) for plane in frame.planes]
    return np.stack([planes[2], planes[0], planes[1], *planes[3:]], -1)


def test_exr_is_light_times_alpha(tmp_path):
    """In half floats, which have 11 bits: every number is what the formula says, and all 256 values of whole pixels come back."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 4), dtype=np.uint8)
    pixels[0, :, 3] = 255
    pixels[0, :, 0], pixels[0, :, 1], pixels[0, :, 2] = np.arange(64), np.arange(64, 128), np.arange(192, 256)
    write_pictures(tmp_path / "out", [pixels, pixels[..., :3], pixels.astype(np.uint16) * 257], 3, kind="exr")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.exr", "00001.exr", "00002.exr"]
    alpha = pixels[..., 3:] / 255
    light = linear(pixels[..., :3] / 255)
    found = exr(tmp_path / "out" / "00000.exr")
    assert np.abs(found[..., 3:] - alpha).max() < 2**-11
    assert (np.abs(found[..., :3] - light * alpha) <= light * alpha * 2**-10 + 1e-6).all()
    value = found[0, :, :3]
    back = 255 * np.where(value <= 0.0031308, value * 12.92, 1.055 * np.maximum(value, 1e-9) ** (1 / 2.4) - 0.055)
    assert np.array_equal(np.rint(back), pixels[0, :, :3])
    assert np.abs(exr(tmp_path / "out" / "00001.exr") - light).max() < 2**-10, "without alpha as it is"
    assert np.array_equal(exr(tmp_path / "out" / "00002.exr"), found)


def test_a_cut_out_as_exr(tmp_path):
    source = encode(tmp_path / "in.mkv", 6, pixels="yuv444p10le", options={"crf": "1"})
    clip, masks = open_clip(source), soft_masks(6)
    assert "no sound" in apply_mask(tmp_path / "out", clip, masks, CUT_OUT, sound=SoundFile(source), pictures="exr")
    for index in range(6):
        found, alpha = exr(tmp_path / "out" / f"{index:05d}.exr"), masks.alpha(index, index + 1)[0].numpy() / 255
        assert np.abs(found[..., 3] - alpha).max() < 1e-3 and 0 < alpha.mean() < 1
        assert np.abs(found[..., :3] - linear(clip[index].numpy() / 255) * alpha[..., None]).max() < 2e-3
    with pytest.raises(DecafError, match="holds pictures already"):
        apply_mask(tmp_path / "out", clip, masks, CUT_OUT)


def test_a_file_of_more_than_8_bits_keeps_them(tmp_path):
    """A slow ramp in ProRes has more than 256 steps."""
    apply_mask(tmp_path / "cut.mov", clip_from_images(torch.rand(1, 48, 64, 3)), soft_masks(1), CUT_OUT)
    deep, shallow = (next(read_with_alpha(tmp_path / "cut.mov", deep=deep)) for deep in (True, False))
    assert deep.dtype == np.uint16 and deep.shape == shallow.shape == (48, 64, 4)
    assert np.abs(deep / 257 - shallow).max() <= 2.5 and (deep % 257 != 0).any()


def two_objects(length=10):
    masks = torch.zeros(2, 48, 64, dtype=torch.bool)
    masks[0, 5:20, 5:25], masks[1, 25:45, 30:60] = True, True
    store = MaskStore(2, length, (48, 64))
    for index in range(2):
        for frame in range(length):
            store.put(index, frame, masks[index])
    return Tracks(store, tuple(Track(number, 0, (0.5, 0.5), 1.0, 1.0, 1.0) for number in (3, 12))), masks.numpy()


def test_one_file_per_object(tmp_path):
    source = write_clip(tmp_path / "in.mp4", 10)
    tracks, masks = two_objects()
    told = apply_mask_each(tmp_path / "cut.mov", open_clip(source), tracks, CUT_OUT, sound=SoundFile(source))
    assert told == {tmp_path / "cut-3.mov": "", tmp_path / "cut-12.mov": ""}
    for path, mask in zip(told, masks, strict=True):
        pictures = list(read_with_alpha(path))
        assert len(pictures) == 10 and all(np.array_equal(picture[..., 3] > 127, mask) for picture in pictures)
        assert times_of(path)[0] == times_of(source)[0] and np.array_equal(heard(path)[1], heard(source)[1])
    apply_mask_each(tmp_path / "pictures", open_clip(source), tracks, CUT_OUT, objects=[1])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["pictures-12"]


@pytest.mark.slow
def test_the_command_writes_one_per_object(line, tmp_path):
    """And takes those away that are not of the last run."""
    out = tmp_path / "out"
    for kind in ("mov", "exr"):
        more = ("--cut-out", kind, "--objects", "--no-overlay", "--resume", "--method", "as-published")
        assert cli.main(line("--score-threshold", "0", "--max-tracks", "2", *more)) == 0
        numbers = [track["id"] for track in read(out)["tracks"]]
        ending = "" if kind == "exr" else ".mov"
        assert len(numbers) == 2
        assert {path.name for path in out.glob("cut-out*")} == {f"cut-out{ending}", *(f"cut-out-{number}{ending}" for number in numbers)}
    assert cli.main(line("--score-threshold", "0", "--no-overlay")) == 0
    assert not list(out.glob("cut-out*"))


@contextmanager
def somebody():
    """As a user who is not root, for whom a read-only folder is one."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["out.mov", "out.webm", "out.mp4", "png", "exr"])
@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="this system has no such permissions")
def test_a_folder_that_becomes_read_only_half_way(name):
    """A sentence; and no file that looks finished."""

    def lock(done, total, what):
        if done == 3:
            folder.chmod(stat.S_IRUSR | stat.S_IXUSR)

    with somebody(), TemporaryDirectory() as place:
        folder = Path(place) / "target"
        folder.mkdir()
        kind = "png" if "." in name else name
        try:
            with pytest.raises(DecafError, match=r"(00003|out)\.[a-z0-9]+ could not be written") as told:
                apply_mask(
                    folder / name if "." in name else folder, clip_from_images(torch.rand(6, 48, 64, 3)), soft_masks(6),
                    EffectSettings("matte"), pictures=kind, progress=lock,
                )  # fmt: skip
            assert "ermission" in str(told.value) and "choose another output folder" in str(told.value)
            left = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
            assert left == ([] if "." in name else [f"{index:05d}.{kind}" for index in range(3)])
        finally:
            folder.chmod(stat.S_IRWXU)


def test_a_folder_that_goes_half_way(tmp_path):
    def remove(done, total, what):
        if done == 3:
            (tmp_path / "target").rename(tmp_path / "elsewhere")

    with pytest.raises(DecafError, match="out.mov could not be written"):
        apply_mask(tmp_path / "target" / "out.mov", clip_from_images(torch.rand(6, 48, 64, 3)), soft_masks(6), CUT_OUT, progress=remove)
