"""LLaVA-OneVision."""

from __future__ import annotations

from pathlib import Path

from .writing import make_tokenizer, text_numbers, write_json, write_tokenizer

NAMES = ("llava_onevision",)
HUB_NAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"^model\.(multi_modal_projector\.|image_newline)", r"\1"),
)

_TOKENS = "<|endoftext|> <|im_start|> <|im_end|> <image> <video>".split()

_CHAT = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] in ('image', 'video') -%}
{{- '<' + part['type'] + '>\\n' -}}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def write(folder: Path, name: str, *, numbers: dict, text: dict, vision: dict, known: str, tile: int = 112) -> None:
    """`tile`: side of the square tiles in pixels (the real one is 384). A tile becomes (tile // 14)^2 tokens, or a quarter of them in a video."""
    tokenizer = make_tokenizer(_TOKENS, known)
    text = text_numbers(tokenizer, end="<|im_end|>", padding="<|endoftext|>", **numbers) | {
        "max_window_layers": numbers["layers"],
        "sliding_window": 32768,
        "use_sliding_window": False,
        **text,
    }
    shapes = [[tile * rows, tile * cols] for rows in range(1, 5) for cols in range(1, 5)]
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_grid_pinpoints": shapes,
        "image_token_index": tokenizer.token_to_id("<image>"),
        "video_token_index": tokenizer.token_to_id("<video>"),
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "text_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **text},
        "torch_dtype": "float16",
        "transformers_version": "4.45.0",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_channels": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "attention_dropout": 0.0,
            "image_size": tile,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
            "vision_use_head": False,
            **vision,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    write_json(folder / "config.json", config)
    write_tokenizer(folder, tokenizer, _TOKENS, end="<|im_end|>", more={"processor_class": "LlavaOnevisionProcessor"})
    _write_processor(folder, tile, shapes)


def _write_processor(folder: Path, tile: int, shapes: list[list[int]]) -> None:
    (folder / "chat_template.jinja").write_text(_CHAT, encoding="utf-8")
    shared = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": tile, "width": tile},
    }
    tiles = {"do_pad": True, "image_grid_pinpoints": shapes, "image_processor_type": "LlavaOnevisionImageProcessor"}
    write_json(folder / "preprocessor_config.json", shared | tiles)
    write_json(folder / "video_preprocessor_config.json", shared | {"video_processor_type": "LlavaOnevisionVideoProcessor"})
    processor = {
        "num_image_tokens": (tile // 14) ** 2,
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<image>",
        "video_token": "<video>",
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }
    write_json(folder / "processor_config.json", processor)
