"""`python -m benchmarks.memory_table`: which published model runs on which card, from the estimates in the code. Nothing is measured or loaded.

Models are built without memory from the numbers of their published config.json, so their weights are counted exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.utils import logging

from decaf.attention.batches import memory_needed
from decaf.mllm import MLLM, registry
from decaf.mllm.engine import TransformersEngine
from decaf.settings import AttentionSettings

CARDS = (8, 12, 16, 24)
"""GB of video memory."""

TAKEN = 1.0
"""GB of a card that the desktop, the driver and PyTorch's libraries are reckoned to take."""

FRAME_SIZE, FRAMES = (720, 1280), 16
SETTINGS = {"paper": AttentionSettings(), "fast": AttentionSettings(detail="fast")}

_QWEN25_TOWER = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112, "tokens_per_second": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_QWEN3_TOWER = {
    "depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17],
    "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
}  # fmt: skip
_QWEN3_LARGE_TOWER = _QWEN3_TOWER | {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
_INTERN_TOWER = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": [448, 448],
    "patch_size": [14, 14], "attention_bias": True,
}  # fmt: skip


def _text(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, **more) -> dict:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": inner, "vocab_size": vocabulary, "max_window_layers": layers, **more,
    }  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A model as its config.json has it. `tied`: the head is the table of embeddings."""

    name: str
    model_type: str
    text: dict
    vision: dict
    tied: bool

    def mllm(self) -> MLLM:
        """The model without its weights, as if on a GPU in bfloat16."""
        nested = {"text_config": self.text, "vision_config": self.vision | {"out_hidden_size": self.text["hidden_size"]}}
        more = {"image_seq_length": 256} if self.model_type == "internvl" else {}
        config = CONFIG_MAPPING[self.model_type].from_dict({"tie_word_embeddings": self.tied, **nested, **more})
        config.get_text_config().tie_word_embeddings = self.tied
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
        model.tie_weights()
        family = registry()[self.model_type]
        engine = TransformersEngine(model, torch.device("cuda"), torch.bfloat16)
        return MLLM(engine, None, family, self.name, family.vision_shape(config), family.mean, family.std)


MODELS = (
    Published("Qwen2.5-VL-3B", "qwen2_5_vl", _text(2048, 36, 16, 2, 11008, 151936), _QWEN25_TOWER, True),
    Published("Qwen2.5-VL-7B", "qwen2_5_vl", _text(3584, 28, 28, 4, 18944, 152064), _QWEN25_TOWER, False),
    Published("Qwen3-VL-2B", "qwen3_vl", _text(2048, 28, 16, 8, 6144, 151936, head_dim=128), _QWEN3_TOWER, True),
    Published("Qwen3-VL-4B", "qwen3_vl", _text(2560, 36, 32, 8, 9728, 151936, head_dim=128), _QWEN3_TOWER, True),
    Published("Qwen3-VL-8B", "qwen3_vl", _text(4096, 36, 32, 8, 12288, 151936, head_dim=128), _QWEN3_LARGE_TOWER, False),
    Published("InternVL3-2B", "internvl", _text(1536, 28, 12, 2, 8960, 151674, model_type="qwen2"), _INTERN_TOWER, False),
    Published("InternVL3-8B", "internvl", _text(3584, 28, 28, 4, 18944, 151674, model_type="qwen2"), _INTERN_TOWER, False),
)


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights. `all`; `table`: of the embeddings, which may stay in host memory; `moving`: of what can be streamed;
    `area`: of the two largest layers, or the head, which must be there when weights are streamed."""

    all: int
    table: int
    moving: int
    area: int

    @property
    def least(self) -> int:
        """On the device when as much as possible is streamed."""
        return self.all - self.moving - self.table + self.area


def weights_of(mllm: MLLM, *, float8: bool) -> Weights:
    """`float8`: the decoder's layers kept in it, as *Load Multimodal LLM* does with the dtype fp8."""
    model = mllm.model
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    blocks = []
    for group in (module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)):
        decoder = any(group is inner for inner in mllm.engine.text_tower.modules())
        size = 0.5 if float8 and decoder else 1
        blocks += [round(size * sum(one.nbytes for one in block.parameters())) for block in group]
    saved = sum(one.nbytes for one in mllm.engine.text_tower.layers.parameters()) // 2 if float8 else 0
    tied = head is table
    total = sum(one.nbytes for one in {id(one): one for one in model.parameters()}.values()) - saved
    moving = sum(blocks) + head.nbytes
    return Weights(total, 0 if tied else table.nbytes, moving, max(2 * max(blocks), head.nbytes))


def verdict(card: int, weights: Weights, needed: dict[str, int]) -> str:
    """What a card of so many GB does with a model: the whole of it there, or as much as stays, and in which detail."""
    room = round((card - TAKEN) * 1e9)
    for detail, bytes_needed in needed.items():
        marked = "" if detail == "paper" else f", detail {detail}"
        if weights.all + bytes_needed <= room:
            return f"whole{marked}"
        if weights.least + bytes_needed <= room:
            streamed = weights.all - (room - bytes_needed - weights.area) - weights.table
            return f"{max(streamed, 0) / 1e9:.1f} GB streamed{marked}"
    return "no"


def table() -> list[str]:
    """The lines of the table in docs/memory.md."""
    heads = ["model", "weights", "GB", "paper", "fast", *(f"{card} GB" for card in CARDS)]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for published in MODELS:
        mllm = published.mllm()
        needed = {detail: memory_needed(mllm, FRAMES, FRAME_SIZE, settings) for detail, settings in SETTINGS.items()}
        for float8 in (False, True):
            weights = weights_of(mllm, float8=float8)
            cells = [published.name, "fp8" if float8 else "bf16", f"{weights.all / 1e9:.1f}", *(f"{one / 1e9:.1f}" for one in needed.values())]
            lines.append(f"| {' | '.join([*cells, *(verdict(card, weights, needed) for card in CARDS)])} |")
    return lines


if __name__ == "__main__":
    logging.set_verbosity_error()
    print("\n".join(table()))  # noqa: T201
