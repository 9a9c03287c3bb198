"""Clips in and videos out: each frame once and upright, the same pixels in any order of access, and clear messages about bad files."""

import gc
import logging
import random
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from video_files import encode, linear, number_of, numbered, set_display_matrix, set_edit_start

from decaf.clips import open_clip, write_video
from decaf.clips import video_file as decoding
from decaf.errors import DecafError

FRAME = 48 * 64 * 3


def numbers(clip):
    return [number_of(frame) for frame in clip]


def check_any_order(clip, expected):
    """Key frames, a forward sweep, a backward sweep, and a random order all give the expected pixels."""
    total = len(expected)
    assert len(clip) == total
    anyhow = random.Random(1).sample(range(total), total)
    for order in (range(0, total, 5), range(total), reversed(range(total)), anyhow, reversed(range(0, total, 3))):
        for index in order:
            assert np.array_equal(clip[index].numpy(), expected[index]), index


FORMATS = {
    "b_frames.mp4": {"options": {"g": "12", "bf": "3"}},
    "open_gop.mp4": {"options": {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}},
    "one_key_frame.mkv": {"options": {"g": "250", "bf": "2"}},
    "intra_refresh.mkv": {"options": {"g": "12", "x264-params": "intra-refresh=1"}},
    "overshooting_seek.ts": {"options": {"g": "12", "bf": "3"}},
    "without_times.h264": {"options": {"g": "12"}},
    "wrong_times.avi": {"options": {"g": "12", "bf": "3"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2", "b": "2M"}},
    "lossless.avi": {"codec": "ffv1", "pixels": "bgr0"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("videos"), {}

    def get(name):
        if name not in made:
            made[name] = encode(folder / name, **FORMATS[name])
        return made[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("held", [1, 7, 1000])
@pytest.mark.parametrize("name", FORMATS)
def test_any_order_gives_the_pixels_of_a_linear_decode(files, name, held):
    path = files(name)
    expected = linear(path)
    clip = open_clip(path, budget=held * FRAME)
    check_any_order(clip, expected)
    assert [number_of(frame) for frame in expected] == list(range(len(expected)))
    assert len(expected) == 40, "every frame once"
    assert torch.equal(torch.stack([clip[index] for index in range(3, 9)]), torch.from_numpy(np.stack(expected[3:9])))


def test_memory_is_bounded_by_the_budget(files):
    clip = open_clip(files("b_frames.mp4"), budget=6 * FRAME)
    for index in [*range(40), *reversed(range(40))]:
        clip[index]
        assert len(clip._cache._frames) <= 6


def test_decoded_frames_do_not_pile_up(files):
    """Frames of the decoding library that wait for the garbage collector took as much memory as the clip."""
    path = files("b_frames.mp4")
    gc.collect()
    gc.disable()
    try:
        before = sum(type(one) is av.VideoFrame for one in gc.get_objects())
        clip = open_clip(path, budget=FRAME)
        for index in range(40):
            clip[index]
        assert sum(type(one) is av.VideoFrame for one in gc.get_objects()) - before <= 10
    finally:
        gc.enable()


def test_steps_in_either_direction_decode_little(files, monkeypatch):
    clip = open_clip(files("b_frames.mp4"), budget=16 * FRAME)
    decoded = 0
    original = decoding._Stream._decoded

    def counting(stream):
        nonlocal decoded
        for frame in original(stream):
            decoded += 1
            yield frame

    monkeypatch.setattr(decoding._Stream, "_decoded", counting)
    for index in range(40):
        clip[index]
    assert decoded <= 40
    decoded = 0
    for index in reversed(range(40)):
        clip[index]
    assert decoded <= 120  # runs of 8 frames, from key frames 12 apart


def test_clip_facts_and_bounds(files):
    clip = open_clip(files("b_frames.mp4"))
    assert (clip.frame_size, clip.fps, clip.name) == ((48, 64), Fraction(25), "b_frames.mp4")
    assert clip[0].dtype == torch.uint8 and clip[0].shape == (48, 64, 3)
    for index in (-1, 40):
        with pytest.raises(IndexError, match="frames 0 to 39"):
            clip[index]


def test_variable_frame_rate_gives_every_frame_once(tmp_path):
    gaps = [10, 200, 33, 33, 500, 5, 40, 41] * 4
    times = np.cumsum(gaps).tolist()
    path = encode(tmp_path / "vfr.mp4", len(times), times=times, options={"g": "8"})
    assert numbers(open_clip(path)) == list(range(len(times)))
    assert numbers(open_clip(path, budget=5 * FRAME)) == list(range(len(times)))


def test_edit_list_is_obeyed(tmp_path):
    path = encode(tmp_path / "edited.mp4", 40, options={"g": "12", "bf": "2"})
    set_edit_start(path, 5 * 512)  # the muxer's time base is 1/12800 s
    expected = [number_of(frame) for frame in linear(path)]
    assert expected == list(range(5, 40))
    for budget in (6 * FRAME, 100 * FRAME):
        clip = open_clip(path, budget=budget)
        assert numbers(clip) == expected
        check_any_order(clip, linear(path))


@pytest.mark.parametrize("a, b, c, d", [(a, b, c, d) for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1) for d in (-1, 0, 1)
                                        if abs(a * d - b * c) == 1 and abs(a) + abs(b) == 1 and abs(c) + abs(d) == 1])  # fmt: skip
def test_frames_are_upright(tmp_path, a, b, c, d):
    path = encode(tmp_path / "turned.mp4", 3)
    stored = linear(path)[1]
    set_display_matrix(path, a, b, c, d)
    height, width = stored.shape[:2]
    ys, xs = np.mgrid[:height, :width]
    to_x, to_y = a * xs + c * ys, b * xs + d * ys
    expected = np.empty((np.ptp(to_y) + 1, np.ptp(to_x) + 1, 3), dtype=np.uint8)
    expected[to_y - to_y.min(), to_x - to_x.min()] = stored
    clip = open_clip(path)
    assert clip.frame_size == expected.shape[:2]
    assert np.array_equal(clip[1].numpy(), expected)


@pytest.mark.parametrize(
    "name, pixels, codec, size",
    [
        ("odd.mkv", "yuv444p", "libx264", (47, 63)),
        ("odd_420.mkv", "yuv420p", "ffv1", (47, 63)),
        ("grey.mkv", "gray", "ffv1", (48, 64)),
        ("ten_bit.mkv", "yuv420p10le", "ffv1", (48, 64)),
        ("sixteen_bit.mkv", "gray16le", "ffv1", (48, 64)),
        ("alpha.mkv", "yuva420p", "ffv1", (48, 64)),
        ("one_pixel.mkv", "bgr0", "ffv1", (1, 1)),
        ("wide.mkv", "yuv420p", "ffv1", (16, 4000)),
        ("tall.mp4", "yuv420p", "libx264", (4000, 16)),
    ],
)
def test_pixel_formats_and_sizes(tmp_path, name, pixels, codec, size):
    options = {"crf": "4"} if codec == "libx264" else None
    clip = open_clip(encode(tmp_path / name, 4, size=size, pixels=pixels, codec=codec, options=options))
    assert len(clip) == 4 and clip.frame_size == size
    expected = torch.from_numpy(numbered(2, size)).float()
    if "gray" in pixels:
        expected = expected @ torch.tensor([0.299, 0.587, 0.114])[:, None]
    # Grey everywhere but in the texture: colour is stored at half the resolution.
    half = size[0] // 2
    assert (clip[2].float() - expected)[:half].abs().mean() < 6 if half else clip[2].shape == (1, 1, 3)


@pytest.mark.skipif(int(av.__version__.split(".")[0]) < 17, reason="PyAV 16 darkens BT.709 by up to a tenth when it decodes")
def test_colours_survive_writing_and_reading(tmp_path):
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]], dtype=torch.uint8)
    frames = [colour.expand(32, 48, 3) for colour in colours]
    write_video(tmp_path / "colours.mp4", frames, 24, (32, 48))
    clip = open_clip(tmp_path / "colours.mp4")
    assert len(clip) == 6 and clip.fps == 24
    for index, colour in enumerate(colours):
        assert (clip[index].int() - colour.int()).abs().max() <= 6


def test_a_cut_off_video_gives_what_it_has_and_says_so(tmp_path, caplog):
    path = encode(tmp_path / "whole.mp4", 40, options={"g": "10", "crf": "10"}, container={"movflags": "faststart"})
    whole = path.read_bytes()
    for part in (0.6, 0.97):
        cut = tmp_path / "cut.mp4"
        cut.write_bytes(whole[: int(len(whole) * part)])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            clip = open_clip(cut)
        assert 10 < len(clip) < 40
        assert numbers(clip)[:10] == list(range(10))
        assert f"{len(clip)} of 40 frames" in caplog.text and "cut.mp4" in caplog.text


def test_a_damaged_stretch_costs_only_its_own_frames(tmp_path, caplog):
    path = encode(tmp_path / "damaged.mkv", 40, options={"g": "10", "crf": "10"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    clip = open_clip(path, budget=8 * FRAME)
    assert numbers(clip)[:10] == list(range(10))
    assert len(clip) >= 20


def test_a_sound_video_warns_of_nothing(files, caplog):
    with caplog.at_level(logging.WARNING):
        for name in FORMATS:
            open_clip(files(name))
    assert not caplog.text


def sound(path, cover=None):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 48000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def sizes_change(path):
    data = b"".join(encode(path.with_name(f"{side}.h264"), 5, size=(side, 64)).read_bytes() for side in (48, 32))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "name, make, says",
    [
        ("nothing.mp4", lambda path: path, "There is no file or folder"),
        ("empty.mp4", lambda path: path.write_bytes(b""), "could not be opened as a video"),
        ("text.mp4", lambda path: path.write_text("not a video\n" * 100), "could not be opened as a video"),
        ("cut.mp4", lambda path: path.write_bytes(encode(path.with_name("w.mp4")).read_bytes()[:2000]), "could not be opened as a video"),
        ("sound.m4a", sound, "no video stream .audio only"),
        ("sizes.h264", sizes_change, "frame 0 is 64x48, frame 5 is 64x32"),
        ("text.png", lambda path: path.write_text("not an image"), "text.png could not be read as an image"),
    ],
)
def test_what_is_not_a_clip(tmp_path, name, make, says):
    make(tmp_path / name)
    with pytest.raises(DecafError, match=says) as caught:
        open_clip(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (1, 1), (1, 2), (16, 4000)])
def test_written_video_plays_anywhere(tmp_path, size):
    frames = [torch.from_numpy(numbered(index, size)) for index in range(9)]
    path = tmp_path / "new folder" / "out.mp4"
    write_video(path, iter(frames), Fraction(30000, 1001), size)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(30000, 1001)
    clip = open_clip(path)
    assert len(clip) == 9 and clip.frame_size == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    if size[0] > 40:
        assert numbers(frame[: size[0], : size[1]] for frame in clip) == list(range(9))
    assert [one.name for one in path.parent.iterdir()] == ["out.mp4"]


def test_a_stopped_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")

    def frames():
        yield torch.zeros(8, 8, 3, dtype=torch.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(path, frames(), 25, (8, 8))
    for wrong, says in [([], "no frame"), ([torch.zeros(8, 9, 3, dtype=torch.uint8)], r"\(8, 9, 3\) instead of \(8, 8, 3\)")]:
        with pytest.raises(DecafError, match=says):
            write_video(path, wrong, 25, (8, 8))
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["out.mp4"]


FILL = """
import sys
import torch
from PIL import Image
from decaf.errors import DecafError
from decaf.files import write_image, write_json
from decaf.clips.write import write_video

folder = sys.argv[1]
noise = torch.randint(0, 256, (20, 128, 128, 3), dtype=torch.uint8)
for write in (
    lambda: write_video(f"{folder}/out.mp4", noise, 25, (128, 128)),
    lambda: write_image(f"{folder}/out.png", Image.fromarray(noise.flatten(0, 1).numpy())),
    lambda: write_json(f"{folder}/out.json", noise[0].tolist()),
):
    try:
        write()
    except DecafError as error:
        print(error)
    else:
        print("written")
"""


@pytest.fixture
def full_disk(tmp_path):
    """A folder with 64 KB of space: a file system of its own where that may be mounted, else a limit on the size of files."""
    import resource

    folder = tmp_path / "disk"
    folder.mkdir()
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))}
    mounted = False
    if sys.platform == "linux":
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode == 0
    yield folder, {} if mounted else limit
    if mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_full_disk(full_disk):
    folder, limits = full_disk
    run = subprocess.run([sys.executable, "-c", FILL, folder], capture_output=True, text=True, check=True, **limits)
    lines = run.stdout.splitlines()
    assert len(lines) == 3, run.stdout
    for line, name in zip(lines, ("out.mp4", "out.png", "out.json"), strict=True):
        assert line.startswith("The disk is full") and name in line, line
    assert list(folder.iterdir()) == []


def test_an_output_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DecafError, match="could not be written"):
        write_video(tmp_path / "file" / "out.mp4", [torch.zeros(8, 8, 3, dtype=torch.uint8)], 25, (8, 8))
