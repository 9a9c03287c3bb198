"""InternVL3, and InternVL3.5, whose text tower is Qwen3."""

from __future__ import annotations

from pathlib import Path

from .writing import QWEN_TOKENS, make_tokenizer, text_numbers, write_json, write_tokenizer

NAMES = ("internvl", "internvl3_5")
HUB_NAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
)

_TOKENS = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box> <video>".split()
_NAMED = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}

_CHAT = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- else -%}
{{- {'image': '<IMG_CONTEXT>\\n', 'video': '<video>\\n'}[part['type']] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def write(folder: Path, name: str, *, numbers: dict, text: dict, vision: dict, known: str, tile: int = 112) -> None:
    """`tile`: side of the square tiles in pixels, a multiple of 28 (the real one is 448); a tile becomes (tile / 28)^2 tokens."""
    tokens = [*QWEN_TOKENS, *_TOKENS]
    tokenizer = make_tokenizer(tokens, known)
    if name == "internvl3_5":  # heads of Qwen3 are wider than their share
        kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 24, "attention_bias": False, "sliding_window": None}
    else:
        kind = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 32768}
    kind |= {"max_window_layers": numbers["layers"], "use_sliding_window": False}
    text = text_numbers(tokenizer, end="<|im_end|>", padding="<|endoftext|>", **numbers) | kind | text
    config = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "image_seq_length": (tile // 28) ** 2,
        "image_token_id": tokenizer.token_to_id("<IMG_CONTEXT>"),
        "tie_word_embeddings": False,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.0",
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "internvl_vision",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "attention_bias": True,
            "use_qk_norm": False,
            "norm_type": "layer_norm",
            "hidden_act": "gelu",
            "image_size": [tile, tile],
            "patch_size": [14, 14],
            "num_channels": 3,
            "layer_norm_eps": 1e-6,
            "layer_scale_init_value": 0.1,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            **vision,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
    write_json(folder / "config.json", config)
    more = {**_NAMED, "extra_special_tokens": _NAMED, "return_token_type_ids": False, "processor_class": "InternVLProcessor"}
    write_tokenizer(folder, tokenizer, tokens, end="<|im_end|>", more=more)
    _write_processor(folder, tile)


def _write_processor(folder: Path, tile: int) -> None:
    (folder / "chat_template.jinja").write_text(_CHAT, encoding="utf-8")
    shared = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": tile, "width": tile},
    }
    tiles = {"crop_to_patches": False, "max_patches": 12, "min_patches": 1, "image_processor_type": "GotOcr2ImageProcessorFast"}
    write_json(folder / "preprocessor_config.json", shared | tiles)
    write_json(folder / "video_preprocessor_config.json", shared | {"video_processor_type": "InternVLVideoProcessor"})
    write_json(folder / "processor_config.json", {"image_seq_length": (tile // 28) ** 2, "processor_class": "InternVLProcessor"})
