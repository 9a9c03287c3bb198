"""Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path

from .writing import QWEN_TOKENS, make_tokenizer, text_numbers, write_json, write_tokenizer

NAMES = ("qwen2_vl", "qwen2_5_vl")
HUB_NAMES = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))

CHAT = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
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
    text = text_numbers(tokenizer, end="<|im_end|>", padding="<|endoftext|>", **numbers) | {
        "max_window_layers": numbers["layers"],
        "sliding_window": 32768,
        "use_sliding_window": False,
        **text,
    }
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    spatial = half * 3 // 8
    tower = {
        "depth": 2,
        "in_chans": 3,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "model_type": name,
    }
    if name == "qwen2_vl":
        tower |= {"embed_dim": 32, "hidden_size": text["hidden_size"], "mlp_ratio": 2, "hidden_act": "quick_gelu"}
    else:
        tower |= {"hidden_size": 32, "out_hidden_size": text["hidden_size"], "intermediate_size": 64, "hidden_act": "silu"}
        tower |= {"window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    config = {
        "architectures": [{"qwen2_vl": "Qwen2VLForConditionalGeneration", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}[name]],
        "model_type": name,
        **text,
        **visual_token_ids(tokenizer),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * spatial, spatial, spatial]},
        "vision_config": tower | vision,
        "transformers_version": "4.41.2",
    }
    write_json(folder / "config.json", config)
    write_tokenizer(folder, tokenizer, QWEN_TOKENS, end="<|im_end|>", more={"chat_template": CHAT})
    write_json(folder / "chat_template.json", {"chat_template": CHAT})
    processor = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}[name],
    }
    write_json(folder / "preprocessor_config.json", processor)


def visual_token_ids(tokenizer) -> dict[str, int]:
    """Entries of config.json."""
    names = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}
    return {f"{name}_token_id": tokenizer.token_to_id(f"<|{token}|>") for name, token in names.items()}
