"""What is said beforehand that a stage takes, against what PyTorch's allocator was asked for while it ran."""

import pytest
import tiny_models
import torch
from live_memory import LiveMemory
from random_clips import clip_of

from decaf.attention.batches import memory_needed
from decaf.attention.extract import extract_attentions
from decaf.attention.questions import Templates
from decaf.mllm import load_mllm
from decaf.settings import MODES, AttentionSettings

pytestmark = pytest.mark.slow

WITHIN = 0.25

_TEXT = {"layers": 4, "heads": 12, "kv_heads": 2, "hidden": 768, "text": {"intermediate_size": 2304}}
_QWEN_TOWER = {"depth": 2, "hidden_size": 384, "num_heads": 6, "intermediate_size": 1024, "fullatt_block_indexes": [1]}
_INTERN_TOWER = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1024}
SHAPES = {
    "tiny Qwen": ("qwen2_5_vl", {}),
    "tiny InternVL": ("internvl", {}),
    "wide Qwen": ("qwen2_5_vl", {**_TEXT, "vision": _QWEN_TOWER}),
    "wide InternVL": ("internvl", {**_TEXT, "vision": _INTERN_TOWER, "tile": 224}),
    "deep Qwen, every head its own keys": ("qwen2_5_vl", {**_TEXT, "layers": 12, "kv_heads": 12, "vision": _QWEN_TOWER}),
}
"""The widths of a model of 100 million parameters, in few layers: what passes through them counts most."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(shape: str):
        if shape not in made:
            family, numbers = SHAPES[shape]
            known = " ".join(vars(Templates()).values())  # one token each, as in the tokenizers of published models
            made[shape] = tiny_models.make_mllm(tmp_path_factory.mktemp("model"), family, known=known, **numbers)
        return made[shape]

    return folder


def measured(folder, frames: int, settings: AttentionSettings, dtype=torch.float32) -> tuple[int, int]:
    """(what was said, what was taken) in bytes."""
    mllm, clip = load_mllm(folder, dtype=dtype), clip_of(frames, 280, 364)
    said = memory_needed(mllm, frames, clip.frame_size, settings, queries=["the cup"])
    with LiveMemory() as memory:
        extract_attentions(mllm, clip, ["the cup"], settings)
    return said, memory.peak


@pytest.mark.parametrize("setting", MODES)
@pytest.mark.parametrize("frames", [1, 6])
@pytest.mark.parametrize("shape", list(SHAPES)[:4])
def test_the_attention_of_a_clip_takes_what_was_said(folders, shape, frames, setting):
    said, taken = measured(folders(shape), frames, AttentionSettings(setting, tokens_per_frame=100))
    assert abs(said / taken - 1) < WITHIN, f"said {said / 1e6:.2f} MB, taken {taken / 1e6:.2f} MB"


def test_answers_behind_many_keys_and_values(folders):
    """A step that generates joins its token to the keys and values of all layers, which takes more than the pass itself."""
    said, taken = measured(folders("deep Qwen, every head its own keys"), 1, AttentionSettings("class name", tokens_per_frame=100))
    assert abs(said / taken - 1) < WITHIN, f"said {said / 1e6:.2f} MB, taken {taken / 1e6:.2f} MB"


def test_in_bfloat16(folders):
    """InternVL's tower is left out: PyTorch's convolution on a CPU takes large buffers of its own in that format."""
    said, taken = measured(folders("wide Qwen"), 4, AttentionSettings(tokens_per_frame=100), torch.bfloat16)
    assert abs(said / taken - 1) < WITHIN, f"said {said / 1e6:.2f} MB, taken {taken / 1e6:.2f} MB"


def test_with_the_detail_fast(folders):
    fast = AttentionSettings(tokens_per_frame=100, detail="fast")
    said, taken = measured(folders("wide InternVL"), 4, fast)
    assert abs(said / taken - 1) < WITHIN, f"said {said / 1e6:.2f} MB, taken {taken / 1e6:.2f} MB"
    paper, _ = measured(folders("wide InternVL"), 4, AttentionSettings(tokens_per_frame=100))
    assert said < paper


def test_every_part_that_grows_is_counted(folders):
    """More frames, tokens, queries and kept layers are said to take more."""
    mllm, size = load_mllm(folders("wide Qwen")), (720, 1280)
    gpu = torch.device("cuda")

    def said(frames=16, queries=1, **settings):
        return memory_needed(mllm, frames, size, AttentionSettings(**settings), queries=["the cup"] * queries, device=gpu)

    assert said(4, tokens_per_frame=100) < said(16, tokens_per_frame=100) < said(16, tokens_per_frame=400)
    assert said(queries=1) < said(queries=30)
    assert said(start_layer=3) < said(start_layer=0) < said(start_layer=0, setting="class name")


def test_the_counter_counts():
    """Also what an operator takes inside, and gives back before it returns."""
    q = torch.zeros(1, 8, 1000, 64)
    mask = torch.ones(1000, 1000, dtype=torch.bool)
    with LiveMemory() as memory:
        torch.zeros(1 << 20)  # gone at once
        torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    outputs = q.nbytes + 4 * 8 * 1000
    assert outputs + 4 * mask.numel() <= memory.peak < outputs + 5 * mask.numel() + (1 << 20)
