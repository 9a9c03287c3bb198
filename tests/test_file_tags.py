"""Texts in copies of video files: where the page reads them, with every packet as it was."""

from __future__ import annotations

import json
import struct

import av
import numpy as np
import pytest
from sounding_clips import soft_masks, write_clip

from decaf.clips import open_clip
from decaf.finishing import SoundFile, apply_mask, copy_with_tags, read_with_alpha, tags
from decaf.settings import EffectSettings

TAGS = {"workflow": json.dumps({"nodes": [], "title": "Größe {"}), "prompt": json.dumps({"1": "x" * 300_000})}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One of each kind, of a clip whose frames are shown for unequal times."""
    folder = tmp_path_factory.mktemp("files")
    clip = open_clip(write_clip(folder / "clip.mkv", 30, times=[index * 40 + index % 3 * 5 for index in range(30)], samples=48000))
    made = {}
    for kind, suffix, effect in (("mov", ".mov", "cut out"), ("webm", ".webm", "cut out"), ("mp4", ".mp4", "blur")):
        made[kind] = folder / f"made{suffix}"
        apply_mask(made[kind], clip, soft_masks(30), EffectSettings(effect), sound=SoundFile(folder / "clip.mkv"), fps=clip.fps)
    made["faststart"] = folder / "faststart.mp4"  # its table of contents lies before the frames
    with av.open(str(made["mp4"])) as given, av.open(str(made["faststart"]), "w", options={"movflags": "faststart"}) as file:
        streams = [file.add_stream_from_template(stream) for stream in given.streams]
        for packet in given.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                file.mux(packet)
    return made


def content(path):
    """All that a reader finds, except the texts; from the beginning, and after a seek."""
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux() if packet.size]
        streams = [(one.type, one.time_base, getattr(one, "average_rate", None), one.start_time, one.duration) for one in file.streams]
        seen = [(one.stream.index, one.pts, one.dts, one.duration, one.is_keyframe, bytes(one)) for one in packets]
        file.seek(600_000)
        after = next(packet for packet in file.demux(video=0))
        return streams, seen, (after.pts, bytes(after)), file.duration


def told(path):
    with av.open(str(path)) as file:
        return {name.lower(): text for name, text in file.metadata.items() if name.lower() in TAGS}


@pytest.mark.parametrize("kind", ["mov", "webm", "mp4", "faststart"])
def test_texts_are_added_and_nothing_else_changes(kind, files, tmp_path):
    source = files[kind]
    copy, again = tmp_path / f"copy{source.suffix}", tmp_path / f"again{source.suffix}"
    assert copy_with_tags(source, copy, TAGS) and told(copy) == TAGS and told(source) == {}
    assert content(copy) == content(source)
    assert all(map(np.array_equal, read_with_alpha(copy), read_with_alpha(source)))
    # Another workflow takes the place of the first: a reader, and the page, would find either.
    other = {"workflow": "{}", "prompt": '{"2": 3}'}
    assert copy_with_tags(copy, again, other) and told(again) == other and content(again) == content(source)
    assert b"x" * 1000 not in again.read_bytes()
    # Before the frames: of a large file the page reads the beginning.
    assert copy.read_bytes().find(b"xxxx") < 4096
    assert copy_with_tags(source, again, {}) is False and again.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("kind", ["mov", "webm", "mp4"])
def test_what_is_cut_off_or_something_else_is_copied_as_it_is(kind, files, tmp_path):
    whole, copy = files[kind].read_bytes(), tmp_path / "copy"
    for content in (whole[: len(whole) // 2], whole[:3], b"", b"no video" * 1000, whole[:-9], whole[:40] + bytes(1000)):
        odd = tmp_path / f"odd{files[kind].suffix}"
        odd.write_bytes(content)
        assert not copy_with_tags(odd, copy, TAGS) and copy.read_bytes() == content
    noise = np.random.default_rng(0)
    for _ in range(100):
        changed = np.frombuffer(whole, np.uint8).copy()
        for place in (range(len(whole) - 3000, len(whole)), range(900)):
            changed[noise.choice(place, 2)] = noise.integers(0, 256, 2)
        odd.write_bytes(changed.tobytes())
        copy_with_tags(odd, copy, TAGS)  # whatever it is then
        assert copy.stat().st_size >= len(whole) - 1000


def test_frames_beyond_four_gigabytes_stay_where_they_are(tmp_path):
    """Their places have 32 bits in such a file, and would have none left if the table came first."""
    size, place = 1 << 32, (1 << 32) - 64
    contents = struct.pack(">II", 0, 1) + struct.pack(">I", place)
    for kind in (b"stco", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        contents = tags._box(kind, contents)
    file = tmp_path / "large.mp4"
    with file.open("wb") as write:  # its middle takes no room on the disk
        write.write(tags._box(b"ftyp", b"isom" * 2) + struct.pack(">I4sQ", 1, b"mdat", size - 16))
        write.seek(size)
        write.write(contents)
    with file.open("rb") as read:
        pieces = tags._iso(read, size + len(contents), {"workflow": b"{}"})
    assert pieces[:2] == [(0, 16), (16, size)] and struct.pack(">I", place) in pieces[2]


@pytest.mark.parametrize("kind", ["mov", "webm"])
def test_a_cancel_stops_it(kind, files, tmp_path):
    class Cancelled(Exception):
        pass

    def cancel(done, total, what):
        raise Cancelled

    with pytest.raises(Cancelled):
        copy_with_tags(files[kind], tmp_path / "copy", TAGS, cancel)
    assert not (tmp_path / "copy").stat().st_size
