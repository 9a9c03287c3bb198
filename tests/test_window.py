"""A part of a video file as a clip: exactly the frames that a decode of the whole file has there, however they are asked for."""

import os
import random
from fractions import Fraction

import av
import numpy as np
import pytest
from video_files import encode, linear, number_of

from decaf.clips import Window, open_clip, open_window, video_file
from decaf.clips.base import Clip
from decaf.errors import DecafError

B_FRAMES = {"g": "12", "bf": "3", "b_strategy": "0"}

FILES = {
    "h264 with B frames": ("clip.mp4", {"options": B_FRAMES}),
    "open groups": ("clip.mkv", {"options": {**B_FRAMES, "x264-params": "open-gop=1"}}),
    "one group": ("clip.mp4", {"options": {"g": "500", "bf": "2"}}),
    "transport stream": ("clip.ts", {"options": B_FRAMES}),
    "avi": ("clip.avi", {"codec": "mpeg4", "options": {"g": "9"}}),
    "every frame a start": ("clip.mov", {"codec": "mjpeg", "pixels": "yuvj420p"}),
    "29.97 a second": ("clip.mkv", {"rate": Fraction(30000, 1001), "options": B_FRAMES}),
    "uneven times": (
        "clip.mkv",
        {"times": [index * 40 + (index % 3) * 11 + 500 * (index > 30) for index in range(60)], "options": B_FRAMES},
    ),
}


def times_of(path):
    with av.open(str(path)) as file:
        return [frame.pts for frame in file.decode(video=0)], file.streams.video[0].time_base


def same(frame, other) -> bool:
    return np.array_equal(frame.numpy(), other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_a_window_is_that_part_of_the_file(tmp_path, kind):
    name, how = FILES[kind]
    path = encode(tmp_path / name, 60, **how)
    frames, (times, base) = linear(path), times_of(path)
    end, draw = float(times[-1] * base), random.Random(kind)
    windows = [(0.0, None), (0.0, 0.2), (end, None), (0.48, 0.52), (0.4, 99.0)]
    windows += [(start, start + draw.uniform(0.1, 1.5)) for start in (draw.uniform(0, end - 0.1) for _ in range(6))]
    windows += [(float(times[place] * base), float(times[place + 7] * base)) for place in (11, 12, 13, 24)]
    for start, stop in windows:
        first, last = int(start / base), None if stop is None else int(stop / base)
        wanted = [frame for frame, time in zip(frames, times, strict=True) if time >= first and (last is None or time < last)]
        if not wanted:  # between two frames
            with pytest.raises(DecafError, match="no frame in the part"):
                open_window(path, start, stop)
            continue
        for budget in (1, 5 * frames[0].nbytes, 1 << 30):
            clip = open_window(path, start, stop, budget=budget)
            assert len(clip) == len(wanted), (start, stop)
            orders = (range(len(clip)), range(len(clip) - 1, -1, -1), draw.choices(range(len(clip)), k=12))
            for index in (place for order in orders for place in order):
                assert same(clip[index], wanted[index]), (start, stop, budget, index, number_of(clip[index]))


def test_only_the_window_is_decoded_and_held(tmp_path, monkeypatch):
    """Of a file of 240 frames: from the group of pictures in which the window begins to its end."""
    path = encode(tmp_path / "long.mp4", 240, options={"g": "12", "bf": "0"})
    decoded, step = [], video_file._Stream._decoded

    def counting(stream):
        for frame in step(stream):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_file._Stream, "_decoded", counting)
    clip = open_window(path, 8.0, 8.4, budget=1 << 30)
    assert len(clip) == 10 and len(decoded) <= 12 + 10 + 1, "frames 192 to 210 at most"
    assert len(clip._clip._cache._frames) == 10


def test_a_window_of_any_clip(tmp_path):
    path = encode(tmp_path / "clip.mp4", 12)
    whole = open_clip(path)
    part = Window(whole, 3, 7)
    assert isinstance(part, Clip) and len(part) == 4 and part.fps == whole.fps == 25 and part.frame_size == whole.frame_size
    assert [number_of(part[index]) for index in range(4)] == [3, 4, 5, 6]
    assert [number_of(frame) for frame in (part[1], part[2])] == [4, 5]
    with pytest.raises(IndexError):
        part[4]
    with pytest.raises(IndexError):
        part[-1]
    for start, stop in ((3, 3), (-1, 4), (0, 13), (5, 4)):
        with pytest.raises(DecafError, match="frames 0 to 11"):
            Window(whole, start, stop)


def test_what_cannot_be_cut_is_refused(tmp_path):
    path = encode(tmp_path / "clip.mp4", 12)
    for start, stop in ((5.0, None), (5.0, 6.0), (0.2, 0.2)):
        with pytest.raises(DecafError, match="clip.mp4 has no frame in the part"):
            open_window(path, start, stop)
    with pytest.raises(DecafError, match="There is no video file"):
        open_window(tmp_path / "none.mp4", 0, 1)
    raw = encode(tmp_path / "raw.h264", 12, options={"bf": "0"})
    if times_of(raw)[0][0] is None:
        with pytest.raises(DecafError, match="do not say when they are shown"):
            open_window(raw, 0.1, 0.3)


def test_a_damaged_file_gives_what_can_be_decoded(tmp_path):
    path = encode(tmp_path / "clip.mkv", 60, options={"g": "12", "bf": "0"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    whole = linear_or_less(path)
    clip = open_window(path, 0.48, None)
    assert 0 < len(clip) == len(whole) - 12
    assert same(clip[0], whole[12])


def linear_or_less(path):
    clip = open_clip(path)
    return [clip[index].numpy() for index in range(len(clip))]


def held_open(path) -> bool:
    """Whether this process has the file open."""
    try:
        return str(path) in {os.readlink(link) for link in os.scandir("/proc/self/fd") if os.path.lexists(link)}
    except FileNotFoundError:  # another system; Windows refuses to rename what is open
        try:
            path.rename(path.with_suffix(".tmp")).rename(path)
        except PermissionError:
            return True
        return False


@pytest.mark.parametrize("seconds", [None, (0.44, None), (0.48, 2.0)])
def test_a_closed_clip_lets_go_of_its_file_and_opens_it_again(tmp_path, seconds):
    path = encode(tmp_path / "clip.mp4", 60, options=B_FRAMES)
    frames, budget = linear(path), 5 * 48 * 64 * 3
    clip = open_clip(path, budget=budget) if seconds is None else open_window(path, *seconds, budget=budget)
    first = 0 if seconds is None else round(seconds[0] * 25)
    for index in (0, 7, 30, 29, 11, len(clip) - 1, 20, 0):
        assert same(clip[index], frames[first + index])
        clip.close()
        clip.close()
        assert not held_open(path)
        if index in (7, 30):
            assert same(clip[index + 1], frames[first + index + 1])
    assert all(same(clip[index], frames[first + index]) for index in range(len(clip)))
    path.unlink()
    clip.close()
    with pytest.raises(DecafError, match="clip.mp4"):
        [clip[index] for index in range(0, len(clip), 3)]
