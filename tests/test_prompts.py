"""Prompts and pictures that families make themselves, held against the chat templates and processors that models are published with."""

import json
import shutil

import pytest
import torch
import transformers
from packaging.version import parse as version
from published_prompts import FPS, QUESTION, chat, pictures, published
from slow import USUAL_FAMILIES, slow_but
from tiny_models import FAMILIES
from transformers import AutoProcessor

from decaf.demo import MLLM_FOLDER
from decaf.errors import DecafError
from decaf.mllm import load_mllm


@pytest.fixture(params=slow_but([*FAMILIES, "bundled"], [*USUAL_FAMILIES, "bundled"]))
def both(request, mllm_folder):
    folder = MLLM_FOLDER if request.param == "bundled" else mllm_folder(request.param)
    return load_mllm(folder), AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def prompt_of_the_release(processor, kind, ids):
    """Qwen3-VL was published with transformers 4.57, which puts the slots of a video, each with its time and a start and end token, in the
    place of the chat template's start, pad and end. From 5.10 on it puts them in the place of the pad alone."""
    if type(processor).__name__ != "Qwen3VLProcessor" or kind != "video":
        return ids
    start, end = (processor.tokenizer.convert_tokens_to_ids(f"<|vision_{side}|>") for side in ("start", "end"))
    starts, ends = ([place for place, one in enumerate(ids) if one == token] for token in (start, end))
    around = starts[0] < starts[1] < ends[0] if len(starts) > 1 else False
    assert around == (version(transformers.__version__) >= version("5.10"))
    return [one for place, one in enumerate(ids) if place not in (starts[0], ends[-1])] if around else ids


PACKED_OTHERWISE = ("llava_onevision", "smolvlm")
"""Families whose pictures lie as in the paper's reference, without a shrunk whole one: their own test files compare all that is alike."""


@pytest.mark.parametrize(
    "both", slow_but([name for name in [*FAMILIES, "bundled"] if name not in PACKED_OTHERWISE], [*USUAL_FAMILIES, "bundled"]), indirect=True
)
@pytest.mark.parametrize("kind, count", [("image", 1), ("video", 1), ("video", 4), ("video", 5)])
def test_prompt_and_pixels_are_the_published_ones(both, kind, count):
    mllm, processor = both
    family, size = mllm.family, (mllm.vision.tile or 4 * mllm.vision.cell,) * 2  # a tile of 4 x 4 tokens, or so many of them
    frames = pictures(count, *size)
    expected = published(mllm, processor, kind, frames)
    if kind == "video":
        layout = family.video_layout(mllm.vision, size, [index / FPS for index in range(count)], 16)
    else:
        layout = family.image_layout(mllm.vision, size, 1, 4)  # images are twice as fine as the video of so many tokens
    assert layout.grid[1:] == (4, 4)
    ids, visual = mllm.picture_ids(layout)
    ids = torch.cat([ids, mllm.question_ids(layout, QUESTION)])
    assert ids.tolist() == prompt_of_the_release(processor, kind, expected["input_ids"][0].tolist())
    assert int(visual.sum()) == layout.tokens
    pixels = family.pixels(mllm, layout, frames)
    for name, value in pixels.items():
        torch.testing.assert_close(value, expected["pixel_values" if name not in expected else name].view(value.shape), rtol=1e-5, atol=1e-5)


def test_several_images_are_those_of_one_after_the_other(both):
    mllm, _ = both
    frames = pictures(3, 100, 180)
    layout = mllm.family.image_layout(mllm.vision, (100, 180), 3, 40)
    together = mllm.family.pixels(mllm, layout, frames)
    one = mllm.family.image_layout(mllm.vision, (100, 180), 1, 40)
    each = [mllm.family.pixels(mllm, one, [frame]) for frame in frames]
    for name, value in together.items():
        assert torch.equal(value, torch.cat([pixels[name] for pixels in each]))


def test_a_prompt_without_pictures(both):
    mllm, processor = both
    assert mllm.question_ids(None, QUESTION).tolist() == processor.tokenizer(chat(mllm, processor, QUESTION))["input_ids"]


def test_words_of_a_question_make_no_visual_tokens(both):
    """Whatever the tokenizer makes of them: which tokens are visual is known from the layout."""
    mllm, _ = both
    layout = mllm.family.image_layout(mllm.vision, (112, 112), 1, 16)
    token = mllm.visual_token_id("image")
    mllm.tokenizer = type("Plain", (), {"all_special_tokens": [], "__call__": lambda self, text, **more: {"input_ids": [token]}})()
    assert mllm.question_ids(layout, "the one").tolist() == [token]
    _, visual = mllm.picture_ids(layout)
    assert int(visual.sum()) == layout.tokens


@pytest.mark.parametrize("listed", ["special", "added", "not at all"])
def test_control_tokens_in_a_question_are_refused(both, listed, monkeypatch):
    """Also where the tokenizer lists them as added, but not as special, as it does tokens for tools and thoughts. Times are ordinary text."""
    mllm, _ = both
    tokens = {*mllm.family.visual_tokens.values()}
    if listed != "not at all":
        tokens |= {mllm.tokenizer.eos_token} | set(mllm.tokenizer.all_special_tokens)
    if listed == "added":  # what is in no brackets, as GLM's "/nothink", is told by its listing alone
        tokens = {token for token in tokens if token[0] + token[-1] in ("<>", "[]")}
    harmless = ["<0.2 seconds>", "a < b > c", "<unknown>", "<|", "pad"]
    expected = {text: mllm.question_ids(None, text).tolist() for text in harmless}
    if listed != "special":
        monkeypatch.setattr(type(mllm.tokenizer), "all_special_tokens", [])
    if listed == "not at all":
        monkeypatch.setattr(type(mllm.tokenizer), "get_added_vocab", lambda self: {})
    assert len(tokens) > (0 if listed == "not at all" else 2)
    for token in tokens:
        with pytest.raises(DecafError, match="control token") as caught:
            mllm.question_ids(None, f"the {token} one")
        assert token in str(caught.value)
    for text in harmless:
        assert mllm.question_ids(None, text).tolist() == expected[text]


def test_a_token_for_thoughts_is_a_control_token(mllm_folder, tmp_path):
    """Qwen3-VL's tokenizer adds some without listing them as special."""
    shutil.copytree(mllm_folder("qwen3_vl"), tmp_path / "model")
    files = [tmp_path / "model" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    whole, config = (json.loads(path.read_text()) for path in files)
    number = max(token["id"] for token in whole["added_tokens"]) + 1
    for index, text in enumerate(("<think>", "   "), start=number):
        token = whole["added_tokens"][0] | {"content": text, "special": False}
        whole["added_tokens"].append(token | {"id": index})
        config["added_tokens_decoder"][str(index)] = {name: value for name, value in token.items() if name != "id"}
    for path, content in zip(files, (whole, config), strict=True):
        path.write_text(json.dumps(content))
    mllm = load_mllm(tmp_path / "model")
    assert "<think>" not in mllm.tokenizer.all_special_tokens and {"<think>", "   "} <= set(mllm.tokenizer.get_added_vocab())
    with pytest.raises(DecafError, match="<think>, a control token"):
        mllm.question_ids(None, "the <think> one")
    mllm.question_ids(None, "the   one that a thinker thinks of")
