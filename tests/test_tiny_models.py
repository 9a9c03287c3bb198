"""The tiny models of tests/support load the way that real ones do, and answer the prompts that their processors make."""

import hashlib

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, make_mllm
from transformers import AutoModelForImageTextToText, AutoProcessor

VISUAL = {
    "qwen2_vl": ("<|image_pad|>", "<|video_pad|>"),
    "qwen2_5_vl": ("<|image_pad|>", "<|video_pad|>"),
    "qwen3_vl": ("<|image_pad|>", "<|video_pad|>"),
    "qwen3_vl_moe": ("<|image_pad|>", "<|video_pad|>"),
    "internvl": ("<IMG_CONTEXT>",) * 2,
    "internvl3_5": ("<IMG_CONTEXT>",) * 2,
    "llava_onevision": ("<image>", "<video>"),
    "smolvlm": ("<image>", "<image>"),
}
CELL = {"qwen3_vl": 32, "qwen3_vl_moe": 32}
"""Side of a visual token in pixels, 28 for the others."""


@pytest.fixture(scope="module", params=list(VISUAL))
def loaded(request, mllm_folder):
    folder = mllm_folder(request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return request.param, model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_its_place(mllm_folder, family):
    _, info = AutoModelForImageTextToText.from_pretrained(mllm_folder(family), output_loading_info=True, trust_remote_code=False)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def ask(processor, kind, query="the red object", **media):
    messages = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": query}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text, processor(text=[text], return_tensors="pt", **media)


def test_video_prompt(loaded):
    family, model, processor = loaded
    cell = CELL.get(family, 28)
    video = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (4, 3, 3 * cell, 4 * cell), dtype=np.uint8))
    text, inputs = ask(processor, "video", videos=[[video] if family == "smolvlm" else video], do_sample_frames=False)
    ending = "<end_of_utterance>\nAssistant:" if family == "smolvlm" else "<|im_end|>\n<|im_start|>assistant\n"
    assert text.endswith("the red object" + ending)
    visual = (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(VISUAL[family][1])).sum()
    prompt = processor.tokenizer.decode(inputs["input_ids"][0])
    if family == "llava_onevision":  # and one token behind the last frame
        assert visual == 4 * 16 + 1
        assert prompt.startswith("<|im_start|>user\n<video><video>") and "<video>\nthe red object<|im_end|>\n" in prompt
    elif family == "smolvlm":
        assert visual == 4 * 4
        assert "series of four frames" in prompt and prompt.count("Frame from 00:00:<fake_token_around_image><global-img><image>") == 4
    elif family.startswith("internvl"):
        assert visual == 4 * 16
        assert text.startswith("<|im_start|>user\n<video>\nthe red")
        assert "Frame1: <img>" + "<IMG_CONTEXT>" * 16 + "</img>\nFrame2: <img>" in prompt
    else:
        assert inputs["video_grid_thw"].tolist()[0][0] == 2
        assert visual == inputs["video_grid_thw"].prod() // 4
    if family.startswith("qwen3_vl"):
        assert text.startswith("<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>the red")
        slot = "<|vision_start|>" + "<|video_pad|>" * (visual // 2) + "<|vision_end|>"
        assert f"<0.0 seconds>{slot}<0.1 seconds>{slot}" in prompt  # 24 frames a second where nothing else is said
    elif family.startswith("qwen"):
        system, user = text.split("<|im_end|>\n")[:2]
        assert system == "<|im_start|>system\nYou are a helpful assistant."
        assert user == "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>the red object"
    with torch.inference_mode():
        logits = model(**inputs).logits
    assert logits.shape[:2] == inputs["input_ids"].shape
    assert torch.isfinite(logits).all()
    assert logits[0, -1].std() > 0.1


def test_image_prompt(loaded):
    family, model, processor = loaded
    cell = CELL.get(family, 28)
    image = torch.from_numpy(np.random.default_rng(1).integers(0, 255, (3, 8 * cell, 12 * cell), dtype=np.uint8))
    options = {"crop_to_patches": True, "min_patches": 2, "max_patches": 6} if family.startswith("internvl") else {}
    _, inputs = ask(processor, "image", images=[image], **options)
    visual = (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(VISUAL[family][0])).sum()
    # InternVL: 2 x 3 tiles and the thumbnail. LLaVA-OneVision: the thumbnail, and rows of 3 x 8 tokens with one behind each.
    # SmolVLM2: 3 x 4 tiles and the thumbnail.
    expected = {"internvl": 7 * 16, "internvl3_5": 7 * 16, "llava_onevision": 64 + 16 * 25, "smolvlm": 13 * 4}
    assert visual == expected.get(family, 8 * 12)
    with torch.inference_mode():
        assert torch.isfinite(model(**inputs).logits).all()


def test_any_text_survives_the_tokenizer(loaded):
    _, _, processor = loaded
    text = "Das größte Tier, 最大的动物 🐘?\n\t x²"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text
    assert len(processor.tokenizer("assistant")["input_ids"]) == 1


def test_folders_are_small_and_reproducible(tmp_path):
    def digests(folder):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

    for family in FAMILIES:
        first = make_mllm(tmp_path / family, family, seed=3)
        assert sum(path.stat().st_size for path in first.iterdir()) < 2_000_000
        assert digests(first) == digests(make_mllm(tmp_path / f"{family}_again", family, seed=3))
        other = make_mllm(tmp_path / f"{family}_other", family, seed=4)
        assert digests(first)["model.safetensors"] != digests(other)["model.safetensors"]
