"""Qwen3-VL, dense and mixture of experts."""

from __future__ import annotations

from pathlib import Path

from .qwen_vl import visual_token_ids
from .writing import QWEN_TOKENS, make_tokenizer, text_numbers, write_json, write_tokenizer

NAMES = ("qwen3_vl", "qwen3_vl_moe")
HUB_NAMES = ()
EXCHANGED = r"\.experts\.(gate_up|down)_proj$"
SINCE = "4.57"

_CHAT = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def write(folder: Path, name: str, *, numbers: dict, text: dict, vision: dict, known: str) -> None:
    tokenizer = make_tokenizer(QWEN_TOKENS, known)
    # As in the real ones, heads are wider than their share of the hidden states.
    text = text_numbers(tokenizer, end="<|im_end|>", padding="<|endoftext|>", **numbers) | {
        "model_type": f"{name}_text",
        "attention_bias": False,
        "head_dim": 2 * numbers["hidden"] // numbers["heads"],
        **text,
    }
    if name == "qwen3_vl_moe":
        # No matrix is square, so that one that lies the wrong way round cannot pass.
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 3 * numbers["hidden"] // 4}
        text = experts | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True} | text
    half = text["head_dim"] // 2
    spatial = half * 5 // 16
    config = {
        "architectures": [{"qwen3_vl": "Qwen3VLForConditionalGeneration", "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration"}[name]],
        "model_type": name,
        **visual_token_ids(tokenizer),
        "text_config": {
            **text,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [half - 2 * spatial, spatial, spatial], "rope_type": "default"},
        },
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "vision_config": {
            "deepstack_visual_indexes": [0, 1],
            "depth": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 64,
            "model_type": name,
            "num_heads": 2,
            "num_position_embeddings": 64,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
    }
    write_json(folder / "config.json", config)
    write_tokenizer(folder, tokenizer, QWEN_TOKENS, end="<|im_end|>", more={"chat_template": _CHAT})
    write_json(folder / "chat_template.json", {"chat_template": _CHAT})
    shared = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    shared |= {"processor_class": "Qwen3VLProcessor"}
    pictures = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "image_processor_type": "Qwen2VLImageProcessorFast"}
    videos = {"size": {"longest_edge": 25165824, "shortest_edge": 4096}, "video_processor_type": "Qwen3VLVideoProcessor"}
    write_json(folder / "preprocessor_config.json", shared | pictures)
    write_json(folder / "video_preprocessor_config.json", shared | videos)
