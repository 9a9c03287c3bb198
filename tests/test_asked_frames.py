"""A part of a clip, and key frames chosen by hand: what is shown, what is tracked, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_sam2
import torch
from moving_shapes import make_prompts, moving_shapes
from random_clips import clip_of
from short_runs import FRAMES, Meter, masks, read

from decaf import clip_from_images, extract_attention, load_mllm
from decaf.attention.frames import key_frames, read_key_frames, shown_frames
from decaf.command import main as cli
from decaf.errors import DecafError
from decaf.report import Report
from decaf.sam2 import load_sam2
from decaf.settings import AttentionSettings
from decaf.tracking import Marks, TrackMemo, correct, segment


def shown(length, **settings):
    return shown_frames(length, AttentionSettings(**settings))


def test_key_frames_are_spread_over_the_part():
    assert shown(100) == key_frames(100) and shown(100, last_frame=99) == key_frames(100)
    assert shown(100, first_frame=10, last_frame=12) == (10, 11, 12)
    assert shown(100, first_frame=20, last_frame=59, max_key_frames=3) == (20, 39, 59)
    assert shown(100, first_frame=99) == (99,)


def test_key_frames_chosen_by_hand():
    """They are shown however many the settings would show."""
    assert shown(100, key_frames=(40, 0, 12, 40), max_key_frames=2) == (0, 12, 40)
    assert shown(100, key_frames=tuple(range(20)), detail="fast") == tuple(range(20))
    assert shown(50, key_frames=(30,), first_frame=30, last_frame=30) == (30,)
    assert read_key_frames(" 0, 12,40 7") == (0, 12, 40, 7) and read_key_frames(" ") == ()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"first_frame": 9}, "The first frame is 9, but the clip has frames 0 to 8"),
        ({"first_frame": -1}, "The first frame is -1"),
        ({"last_frame": 9}, "The last frame is 9, but the clip has frames 0 to 8"),
        ({"first_frame": 5, "last_frame": 4}, "The first frame is 5 and the last one 4.*Exchange the two"),
        ({"key_frames": (3, 9)}, "Key frame 9 cannot be shown: the clip has frames 0 to 8"),
        ({"key_frames": (3, 6), "first_frame": 2, "last_frame": 5}, "Key frame 6 cannot be shown: the frames asked about are 2 to 5"),
        ({"key_frames": (1, 6), "first_frame": 2}, "Key frame 1 cannot be shown"),
    ],
)
def test_frames_that_cannot_be(settings, told, mllm_folder):
    with pytest.raises(DecafError, match=told):
        shown(9, **settings)
    with pytest.raises(DecafError, match=told):
        extract_attention(load_mllm(mllm_folder("qwen2_vl")), clip_of(9), "it", **settings)


def test_too_many_or_unreadable_key_frames():
    with pytest.raises(DecafError, match="300 key frames were chosen; choose at most 256"):
        shown(1000, key_frames=tuple(range(300)))
    for text in ("0, x", "-1", "1.5", "9" * 10, "²"):
        with pytest.raises(DecafError, match="no number of a frame"):
            read_key_frames(text)


def images_of(clip, frames):
    return clip_from_images(torch.stack([clip[frame] for frame in frames]))


def test_attention_of_a_part_is_that_of_a_clip_cut_so(mllm_folder):
    """With a model that is not told the times of its frames."""
    mllm, clip = load_mllm(mllm_folder("qwen2_vl")), clip_of(9)
    part = extract_attention(mllm, clip, "it", first_frame=3, last_frame=6, tokens_per_frame=16)
    by_hand = extract_attention(mllm, clip, "it", key_frames=(3, 4, 5, 6), max_key_frames=1, tokens_per_frame=16)
    cut = extract_attention(mllm, images_of(clip, range(3, 7)), "it", tokens_per_frame=16)
    for one, handpicked, other in zip(part, by_hand, cut, strict=True):
        assert one.clip.key_frames == (3, 4, 5, 6) and one.clip.length == 9 and one.clip.part == (3, 6)
        assert handpicked.clip.key_frames == (3, 4, 5, 6) and handpicked.clip.part is None
        assert torch.equal(one.video, other.video) and torch.equal(one.frame, other.frame) and torch.equal(handpicked.frame, other.frame)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_sam2(tiny_sam2.make_sam2(tmp_path_factory.mktemp("sam2") / "tiny.safetensors", 3, 64, "2.1"))


def moved(prompts, first, length):
    """Prompts of a cut clip as those of the whole one."""
    info = prompts.fused.clip
    last = first + info.length - 1
    whole = replace(info, length=length, key_frames=tuple(first + key for key in info.key_frames), part=(first, last))
    return replace(prompts, fused=replace(prompts.fused, clip=whole))


def test_masks_of_a_part_are_those_of_a_clip_cut_so_and_empty_outside(model):
    clip = moving_shapes(14, 48, 64, 3)
    cut = images_of(clip, range(4, 11))
    prompts, report, memo = make_prompts(cut, 8, 3), Report(), TrackMemo()
    expected = segment(model, cut, prompts, score_threshold=0.4)
    tracks = segment(model, clip, moved(prompts, 4, 14), score_threshold=0.4, progress=report, memo=memo)
    assert tracks.length == 14 and len(tracks.tracks) == len(expected.tracks) > 0
    for place in range(len(tracks.tracks)):
        assert torch.equal(tracks.masks(place)[4:11], expected.masks(place))
        assert not tracks.masks(place)[:4].any() and not tracks.masks(place)[11:].any()
    assert expected.union().any()
    assert sum(report.counts[name] for name in ("sam2_key_encodings", "sam2_clip_encodings")) == 7, "no frame outside is encoded"
    # The same prompts for all of the clip are something else.
    info = replace(moved(prompts, 4, 14).fused.clip, part=None)
    whole = segment(model, clip, replace(prompts, fused=replace(prompts.fused, clip=info)), score_threshold=0.4, memo=memo)
    assert whole.union()[11:].any()


def test_a_correction_stays_in_the_part(model):
    clip = moving_shapes(14, 48, 64, 3)
    cut = images_of(clip, range(4, 11))
    prompts = make_prompts(cut, 8, 3)
    expected = segment(model, cut, prompts, score_threshold=0.4)
    tracks = segment(model, clip, moved(prompts, 4, 14), score_threshold=0.4)
    report = Report()
    marks = {"positive": ((0.4, 0.5),), "negative": ((0.9, 0.9),)}
    for mode in ("refine", "add", "replace"):
        alone = correct(model, cut, expected, Marks(2, **marks), number=0, mode=mode)
        found = correct(model, clip, tracks, Marks(6, **marks), number=0, mode=mode, progress=report)
        assert torch.equal(found.masks(0)[4:11], alone.masks(0)) and alone.masks(0).any()
        assert not found.masks(0)[:4].any() and not found.masks(0)[11:].any()
    for frame in (3, 11):
        with pytest.raises(DecafError, match=f"Frame {frame} cannot be corrected: only frames 4 to 10"):
            correct(model, clip, tracks, Marks(frame, **marks), number=0)


@pytest.mark.slow
def test_command(line, tmp_path, monkeypatch, capsys):
    out, meter = tmp_path / "out", Meter(monkeypatch)
    assert cli.main(line("--first", "2", "--last", "5", "--presence-threshold", "0")) == 0
    result = read(out)
    assert result["key_frames"] == [2, 3, 4, 5] and meter.sam2 == 4
    filled = [bool(mask.any()) for mask in masks(out / "masks")]
    assert len(filled) == FRAMES and any(filled) and not any(filled[:2] + filled[6:])
    # The attention is taken up again with its part, from another threshold on.
    before = masks(out / "masks")
    assert cli.main(line("--resume", "--first", "2", "--last", "5", "--presence-threshold", "0.0001")) == 0
    assert read(out)["attention_from_earlier_run"] and all(map(np.array_equal, masks(out / "masks"), before))
    assert cli.main(line("--resume", "--key-frames", "8, 1")) == 0
    assert read(out)["key_frames"] == [1, 8] and not read(out)["attention_from_earlier_run"]
    capsys.readouterr()
    for more, told in (
        (["--first", "5", "--last", "4"], "Exchange the two"),
        (["--last", str(FRAMES)], f"frames 0 to {FRAMES - 1}"),
        (["--key-frames", "1,x"], "no number of a frame"),
        (["--key-frames", "7", "--last", "6"], "Key frame 7"),
    ):
        assert cli.main(line(*more)) == 2
        assert told in capsys.readouterr().err
