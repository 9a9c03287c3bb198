"""Key frames from the parts of a clip in which the query can be seen."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from decaf.attention.extract import extract_attention, extract_attentions
from decaf.attention.frames import looked_at_frames, shown_frames
from decaf.attention.present_frames import _shared, _span
from decaf.clips import clip_from_images
from decaf.command import main as cli
from decaf.demo import MLLM_FOLDER, SAM2_FILE
from decaf.demo.painting import BACKGROUNDS
from decaf.demo.scenes import render
from decaf.demo.things import Thing
from decaf.errors import DecafError
from decaf.mllm import load_mllm
from decaf.report import Report
from decaf.settings import AttentionSettings

LENGTH = 64
FIRST, LAST = 34, 39
BY_PRESENCE = AttentionSettings(key_frames_by="presence")


@pytest.fixture(scope="module")
def bundled():
    return load_mllm(MLLM_FOLDER)


@pytest.fixture(scope="module")
def visited():
    """A green square all the time, and a red circle that is there for six frames of 64."""

    def thing(shape, colour, x, first, last):
        return Thing(shape, colour, 42.0, np.tile(np.float32([x, 140]), (LENGTH, 1)), "still", first, last)

    things = [thing("square", "green", 90, 0, LENGTH - 1), thing("circle", "red", 270, FIRST, LAST)]
    return clip_from_images(torch.from_numpy(render(np.random.default_rng(0), things, BACKGROUNDS[0], (280, 364), LENGTH)[0]))


def test_what_is_seen_briefly_is_found(bundled, visited):
    even, _ = extract_attention(bundled, visited, "the red circle")
    found, background = extract_attention(bundled, visited, "the red circle", BY_PRESENCE)
    there = range(FIRST, LAST + 1)
    assert sum(frame in there for frame in even.clip.key_frames) <= 2
    assert len({*found.clip.key_frames} & {*there}) >= 5 and len(found.clip.key_frames) <= 16
    assert background.clip.key_frames == found.clip.key_frames
    assert found.presence > 0.9 > even.presence


def test_what_is_there_all_the_time_has_evenly_spread_key_frames(bundled, visited):
    even, _ = extract_attention(bundled, visited, "the green square")
    found, _ = extract_attention(bundled, visited, "the green square", BY_PRESENCE)
    assert found.clip.key_frames == even.clip.key_frames
    assert torch.equal(found.video, even.video) and torch.equal(found.frame, even.frame)


def test_what_is_not_there_stays_absent(bundled, visited):
    assert extract_attention(bundled, visited, "the yellow star", BY_PRESENCE)[0].presence < 0.2


def test_several_queries_share_the_key_frames(bundled, visited):
    pairs = extract_attentions(bundled, visited, ["the red circle", "the green square"], BY_PRESENCE)
    keys = pairs[0][0].clip.key_frames
    assert pairs[1][0].clip.key_frames == keys and len(keys) <= 16
    assert len({*keys} & {*range(FIRST, LAST + 1)}) >= 4, "of the one that is there briefly"
    assert keys[0] == 0 and keys[-1] == LENGTH - 1, "of the one that is always there"
    assert all(object.presence > 0.9 for object, _ in pairs)


def test_only_the_part_that_is_asked_about_is_looked_at(bundled, visited):
    settings = replace(BY_PRESENCE, first_frame=0, last_frame=30, max_key_frames=4)
    found, _ = extract_attention(bundled, visited, "the red circle", settings)
    assert found.presence < 0.2 and max(found.clip.key_frames) <= 30


def test_it_is_told_and_can_be_cancelled_at_every_piece(bundled, visited):
    told = []
    report = Report(lambda done, total, step: told.append((done, total, step)))
    extract_attention(bundled, visited, "the red circle", replace(BY_PRESENCE, max_key_frames=4), progress=report)
    looking = [(done, total) for done, total, step in told if step == "Looking for key frames"]
    assert [*dict.fromkeys(looking)] == [(0, 3), (1, 3), (2, 3), (3, 3)]  # 24 frames in pieces of eight
    assert report.counts["frames_encoded_video"] == 24 + report.counts["key_frames"]

    class Stop(Exception):
        pass

    def stop(done, total, step):
        if (done, step) == (1, "Looking for key frames"):
            raise Stop

    with pytest.raises(Stop):
        extract_attention(bundled, visited, "the red circle", replace(BY_PRESENCE, max_key_frames=4), progress=stop)


def test_memory_of_a_piece_is_counted(bundled):
    from decaf.attention.batches import memory_needed

    few = AttentionSettings(max_key_frames=1, tokens_per_frame=1600, detail="fast")
    assert memory_needed(bundled, 64, (1120, 1456), replace(few, key_frames_by="presence")) > memory_needed(bundled, 64, (1120, 1456), few)


def test_a_model_that_cannot_say_yes(bundled, visited, monkeypatch):
    monkeypatch.setattr("decaf.attention.present_frames.yes_and_no", lambda mllm: ([3], []))
    with pytest.raises(DecafError, match='cannot answer yes or no.*by "spacing"'):
        extract_attention(bundled, visited, "the red circle", BY_PRESENCE)
    few = replace(BY_PRESENCE, key_frames=(3, 9))  # chosen by hand: nothing is looked for
    assert extract_attention(bundled, visited, "the red circle", few)[0].clip.key_frames == (3, 9)


def test_an_unknown_way(bundled, visited):
    with pytest.raises(DecafError, match='no way to choose key frames "luck".*spacing, presence'):
        extract_attention(bundled, visited, "the red circle", key_frames_by="luck")


@pytest.mark.parametrize(
    ("length", "settings", "expected"),
    [
        (16, {}, 0),  # every frame is a key frame
        (17, {}, 17),
        (95, {}, 95),
        (500, {}, 96),
        (500, {"detail": "fast"}, 48),
        (500, {"key_frames": (1,)}, 0),
        (500, {"key_frames_by": "spacing"}, 0),
        (500, {"first_frame": 100, "last_frame": 119}, 20),
        (5000, {"max_key_frames": 256}, 256),
    ],
)
def test_frames_that_are_looked_at(length, settings, expected):
    settings = replace(BY_PRESENCE, **settings)
    frames = looked_at_frames(length, settings)
    assert len(frames) == expected == len({*frames})
    assert not frames or (frames[0], frames[-1]) == (settings.first_frame, length - 1 if settings.last_frame is None else settings.last_frame)


def test_spans():
    starts = [10, 20, 30, 40, 50]
    assert _span([0.1, 0.9, 0.1, 0.1], starts) == tuple(range(20, 30))
    assert _span([0.1, 0.9, 0.1, 0.5], starts) == (*range(20, 30), *range(40, 50))
    assert _span([0.9, 0.9, 0.1, 0.9], starts) == tuple(range(10, 50))
    assert _span([0.0, 0.0, 0.0, 0.0], starts) == tuple(range(10, 50)), "seen nowhere is no reason to look anywhere else"


def test_key_frames_are_shared_by_spans():
    brief, always = tuple(range(40, 44)), tuple(range(100))
    assert _shared([always], 16) == shown_frames(100, AttentionSettings())
    assert _shared([brief], 16) == brief
    shared = _shared([brief, always], 16)
    assert {*brief} <= {*shared} and {0, 99} <= {*shared} and len(shared) <= 12
    assert len(_shared([(n,) for n in range(20)], 16)) == 16


@pytest.mark.slow
def test_the_command_takes_it(visited, tmp_path):
    from PIL import Image

    (tmp_path / "clip").mkdir()
    for number in range(LENGTH):
        Image.fromarray(visited[number].numpy()).save(tmp_path / "clip" / f"{number:03}.png")
    models = ["--mllm", str(MLLM_FOLDER), "--sam2", str(SAM2_FILE)]
    line = ["segment", str(tmp_path / "clip"), "--query", "the red circle", *models, "--out", str(tmp_path / "out")]
    assert cli.main([*line, "--key-frames-by", "presence", "--quiet"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len({*result["key_frames"]} & {*range(FIRST, LAST + 1)}) >= 5
    masked = [number for number in range(LENGTH) if np.asarray(Image.open(tmp_path / "out" / "masks" / f"{number:05}.png")).any()]
    assert masked == [*range(FIRST, LAST + 1)]
