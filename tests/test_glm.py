"""GLM-4.1V and GLM-4.6V-Flash: what their prompts say word for word, and positions that are those of the model's own code."""

import inspect
import json
import shutil

import pytest
import torch
from dense_rollout import relative
from published_prompts import FPS, QUESTION, pictures, published
from random_clips import clip_of
from tiny_models import FAMILIES
from transformers import AutoProcessor

from decaf.attention.extract import extract_attention
from decaf.mllm import load_mllm
from decaf.mllm.packed import pack

GLM = [family for family in FAMILIES if family.startswith("glm")]


@pytest.fixture(params=GLM)
def both(request, mllm_folder):
    folder = mllm_folder(request.param)
    return load_mllm(folder), AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def layout_of(mllm, kind, count, size, most):
    if kind == "video":
        return mllm.family.video_layout(mllm.vision, size, [index / FPS for index in range(count)], most)
    return mllm.family.image_layout(mllm.vision, size, count, most)


@pytest.mark.parametrize("kind, count", [("image", 1), ("video", 1), ("video", 2), ("video", 5), ("video", 8)])
@pytest.mark.parametrize("size", [(112, 224), (224, 84), (28, 28)], ids=["landscape", "portrait", "one token"])
def test_positions_are_those_of_the_models_own_code(both, kind, count, size):
    mllm, processor = both
    most = size[0] * size[1] // 28**2
    layout = layout_of(mllm, kind, count, size, most // 4 or 1) if kind == "image" else layout_of(mllm, kind, count, size, most)
    frames = pictures(count, layout.grid[1] * 28, layout.grid[2] * 28)
    inputs = published(mllm, processor, kind, frames)
    packed = pack(mllm, layout, [QUESTION])
    assert torch.cat([packed.shared_ids, packed.question_ids[0]]).tolist() == inputs["input_ids"][0].tolist()
    code = mllm.model.model.get_rope_index
    expected, _ = code(**{name: inputs[name] for name in inspect.signature(code).parameters if name in inputs})
    assert packed.positions[0].tolist() == expected[:, 0].tolist()


def test_the_prompt_word_for_word(both):
    """Written down here from the published templates, so that the tiny models' own templates are held against something too."""
    mllm, _ = both
    layout = mllm.family.video_layout(mllm.vision, (56, 56), [0.0, 1.25, 2.5, 3.75, 61.26], 4)
    ids, visual = mllm.picture_ids(layout)
    said = mllm.tokenizer.decode([*ids.tolist(), *mllm.question_ids(layout, "Is it red?").tolist()], skip_special_tokens=False)
    later = mllm.family.name == "GLM-4.6V"
    times = ("0.0 seconds", "2.5 seconds", "61.3 seconds") if later else ("0", "2", "61")
    shown = "".join(f"<|begin_of_image|>{'<|image|>' * 4}<|end_of_image|>{time}" for time in times)
    ending = "/nothink<|assistant|>\n<think></think>\n" if later else "<|assistant|>\n<think></think><answer>"
    assert said == f"[gMASK]<sop><|user|>\n<|begin_of_video|>{shown}<|end_of_video|>Is it red?{ending}"
    assert layout.grid == (3, 2, 2) and int(visual.sum()) == 12
    mllm.system = "Be {brief}."
    assert mllm.tokenizer.decode(mllm.question_ids(None, "Why?")).startswith("[gMASK]<sop><|system|>\nBe {brief}.<|user|>\nWhy?")


def test_a_system_prompt_stands_where_the_published_template_puts_it(both):
    mllm, processor = both
    mllm.system = "You see."
    chat = [{"role": "system", "content": "You see."}, {"role": "user", "content": QUESTION}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    expected = processor.tokenizer(text + mllm.family.answer_opening)["input_ids"]
    assert mllm.question_ids(None, QUESTION).tolist() == expected


@pytest.mark.skipif("glm46v" not in GLM, reason="transformers before 5 does not know GLM-4.6V")
@pytest.mark.parametrize("told_by", ["model_type", "processor_config.json", "video_preprocessor_config.json"])
def test_which_generation_a_model_is(tmp_path, mllm_folder, told_by):
    """The same weights with the same model_type: one file decides which prompt is written, whichever it is."""
    first = load_mllm(shutil.copytree(mllm_folder("glm4v"), tmp_path / "first"))
    later = shutil.copytree(mllm_folder("glm4v"), tmp_path / "later")
    file, entry = (
        ("config.json", {"model_type": "glm46v"})
        if told_by == "model_type"
        else (told_by, {"processor_class": "Glm46VProcessor", "video_processor_type": "Glm46VVideoProcessor"})
    )
    given = json.loads((later / file).read_text()) if (later / file).exists() else {}
    if told_by == "model_type":  # its configuration looks the vision tower's up by a name that transformers 4 did not write
        given["vision_config"]["model_type"] = "glm4v_vision"
    (later / file).write_text(json.dumps(given | entry))
    later = load_mllm(later)
    assert (first.family.name, later.family.name) == ("GLM-4.1V", "GLM-4.6V")
    one, two = (extract_attention(mllm, clip_of(3), "the dog", tokens_per_frame=40)[0] for mllm in (first, later))
    assert relative(one.video, two.video) > 1e-3, "the prompts differ"
    assert all(torch.equal(*pair) for pair in zip(first.model.state_dict().values(), later.model.state_dict().values(), strict=True))
