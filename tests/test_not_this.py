"""Not this: a second sentence in the same passes, what it is subtracted from, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_clips import clip_of
from scipy.ndimage import convolve
from slow import EACH_FAMILY

from decaf import extract_attention, extract_attentions, load_mllm
from decaf.attention.fusion import frame_fusion, object_background_fusion
from decaf.attention.questions import LONGEST_QUERY, clean_not_this
from decaf.command.attention_file import load_attention, save_attention
from decaf.data import Attention, ClipInfo
from decaf.errors import DecafError
from decaf.report import Report

QUERIES = ["the cup.", "Who comes last, the dog or the cat?"]


@pytest.mark.parametrize("setting", ["expression", "class name"])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_is_asked_in_the_same_passes_and_gets_what_a_query_would(family, setting, mllm_folder):
    mllm, clip = load_mllm(mllm_folder(family)), clip_of(4)
    without, also = Report(), Report()
    expected = extract_attentions(mllm, clip, QUERIES, setting=setting, tokens_per_frame=16, progress=without)
    found = extract_attentions(mllm, clip, QUERIES, setting=setting, tokens_per_frame=16, not_this="the hand", progress=also)
    alone, _ = extract_attention(mllm, clip, "the hand", setting=setting, tokens_per_frame=16)
    for counted in ("forward_passes", "visual_tokens_encoded", "visual_tokens_prefilled", "tokens_generated"):
        assert also.counts[counted] == without.counts[counted], counted
    assert also.counts["text_tokens_prefilled"] > without.counts["text_tokens_prefilled"]
    for pair, same in zip(found, expected, strict=True):
        for one, other in zip(pair, same, strict=True):
            assert_equal_maps(one, other)
            assert (one.query, one.question, one.answers) == (other.query, other.question, other.answers)
            assert one.presence == pytest.approx(other.presence, abs=1e-5) and other.not_this is None
        assert_equal_maps(pair[0].not_this, alone)
        assert pair[0].not_this.query == "the hand." and pair[0].not_this.question == alone.question and pair[1].not_this is None


def assert_equal_maps(one, other):
    torch.testing.assert_close(one.video, other.video, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(one.frame, other.frame, rtol=1e-4, atol=1e-9)


def attention(kind, seed, query="the dog."):
    make = torch.Generator().manual_seed(seed)
    clip = ClipInfo(3, (48, 64), (0, 1, 2), torch.zeros(3, 16, 16, 3, dtype=torch.uint8))
    return Attention(kind, torch.rand(2, 4, 5, generator=make) * 1e-2, torch.rand(3, 8, 10, generator=make) * 1e-3, clip, query, f"{kind}?")


def smoothed(maps, width):
    offset = np.arange(width) - width // 2
    weights = np.exp(-(offset[:, None] ** 2 + offset**2) / 2.0)
    return np.stack([convolve(one, weights / weights.sum(), mode="constant") for one in maps.double().numpy()])


def test_the_larger_of_background_and_not_this_is_subtracted():
    object, background, unwanted = attention("object", 1), attention("background", 2), attention("object", 3, "the cat.")
    found = object_background_fusion(replace(object, not_this=unwanted), background)
    for name, width, axes in (("video", 3, (0, 1, 2)), ("frame", 7, (1, 2))):
        one, rest, away = (smoothed(getattr(each, name), width) for each in (object, background, unwanted))
        left, other = (np.maximum(maps, 0) for maps in (one - np.maximum(rest, away), away - np.maximum(rest, one)))
        left, other = ((m - m.min(axes, keepdims=True)) / (m.max(axes, keepdims=True) - m.min(axes, keepdims=True)) for m in (left, other))
        np.testing.assert_allclose(getattr(found, name), left, atol=1e-5)
        np.testing.assert_allclose(getattr(found.not_this, name), other, atol=1e-5)
        assert not np.allclose(getattr(object_background_fusion(object, background), name), left, atol=1e-2)
    fused = frame_fusion(found, video_weight=0.3)
    torch.testing.assert_close(fused.not_this, frame_fusion(found.not_this, video_weight=0.3).map, rtol=0, atol=0)


def test_of_another_grid_is_refused():
    object, background, unwanted = attention("object", 1), attention("background", 2), attention("object", 3)
    with pytest.raises(DecafError, match="different grids"):
        object_background_fusion(replace(object, not_this=replace(unwanted, frame=unwanted.frame[:, 1:])), background)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (" \n", "'Not this' is empty.*leave it out"),
        ("THE CUP?", "says the same as the query.*leave it out"),
        ("x" * (LONGEST_QUERY + 1), "'Not this' has 2,001 characters"),
        ("the \ud800", "'Not this' holds bytes.*UTF-8"),
    ],
)
def test_what_cannot_be_asked_is_refused(text, says, mllm_folder):
    with pytest.raises(DecafError, match=says):
        clean_not_this(text, ["the cup."])
    with pytest.raises(DecafError, match=says):
        extract_attention(load_mllm(mllm_folder("qwen2_vl")), clip_of(2), "the cup", not_this=text)


def test_several_lines_are_one_sentence():
    assert clean_not_this("the hand\n  that holds it", ["the cup."]) == "the hand that holds it."


def test_comes_back_from_a_file(tmp_path):
    object, background, unwanted = attention("object", 1), attention("background", 2), attention("object", 3, "the cat.")
    record = {"seconds": {}, "counts": {}, "queries_at_once": 1}
    for not_this in (None, unwanted):
        save_attention(tmp_path / "kept.safetensors", (replace(object, not_this=not_this), background), {"a": 1}, record)
        (found, rest), _ = load_attention(tmp_path / "kept.safetensors", {"a": 1})
        assert (found.not_this is None) == (not_this is None) and torch.equal(rest.video, background.video)
    assert torch.equal(found.not_this.frame, unwanted.frame)
    assert (found.not_this.kind, found.not_this.query, found.not_this.question) == ("object", "the cat.", "object?")


def test_command(line, tmp_path, capsys):
    from decaf.command.main import main

    def result(*more):
        assert main(line("--quiet", *more)) == 0
        return json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))

    plain, without = result(), result("--not", "the blue ground")
    assert without["counts"]["forward_passes"] == plain["counts"]["forward_passes"]
    assert without["questions"]["not_this"].startswith("the blue ground.") and "not_this" not in plain["questions"]
    assert without["settings"]["not_this"] == "the blue ground." and plain["settings"]["not_this"] is None
    assert main(line("--resume", "--not", "the blue ground")) == 0 and "Already finished" in capsys.readouterr().out
    assert main(line("--not", "the red square.")) == 2 and "says the same as the query" in capsys.readouterr().err
    assert main(line("--not", "")) == 2 and "'Not this' is empty" in capsys.readouterr().err
