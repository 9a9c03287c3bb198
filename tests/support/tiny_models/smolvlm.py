"""SmolVLM2."""

from __future__ import annotations

from pathlib import Path

from .writing import make_tokenizer, text_numbers, write_json, write_tokenizer

NAMES = ("smolvlm",)
HUB_NAMES = ()

_PLACES = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
_TOKENS = "<|endoftext|> <|im_start|> <end_of_utterance> <fake_token_around_image> <image> <global-img> <video>".split() + _PLACES

_CHAT = """\
<|im_start|>
{%- for message in messages -%}
{%- if message['content'] is string -%}
{{- message['role'] | capitalize + ': ' + message['content'] -}}
{%- else -%}
{{- message['role'] | capitalize + (':' if message['content'][0]['type'] == 'image' else ': ') -}}
{%- for part in message['content'] -%}
{{- part['text'] if part['type'] == 'text' else '<' + part['type'] + '>' -}}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_utterance>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}
"""


def write(folder: Path, name: str, *, numbers: dict, text: dict, vision: dict, known: str, tile: int = 56) -> None:
    """`tile`: side of the square tiles in pixels, an even number (the real ones have 384 and 512); a tile becomes (tile // 28)^2 tokens."""
    tokenizer = make_tokenizer(_TOKENS, known)
    text = text_numbers(tokenizer, end="<end_of_utterance>", padding="<|endoftext|>", **numbers) | {
        "architectures": ["VLlama3ForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": numbers["hidden"] // numbers["heads"],
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        **text,
    }
    config = {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "image_token_id": tokenizer.token_to_id("<image>"),
        "scale_factor": 2,
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.47.1",
        "vision_config": {
            "model_type": "smolvlm_vision",
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
            **vision,
        },
    }
    write_json(folder / "config.json", config)
    named = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
    named |= {"end_of_utterance_token": "<end_of_utterance>", "video_token": "<video>"}
    more = {**named, "extra_special_tokens": named, "processor_class": "SmolVLMProcessor"}
    write_tokenizer(folder, tokenizer, _TOKENS, end="<end_of_utterance>", more=more)
    (folder / "chat_template.jinja").write_text(_CHAT, encoding="utf-8")
    processor = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "SmolVLMImageProcessor",
        "max_image_size": {"longest_edge": tile},
        "processor_class": "SmolVLMProcessor",
        "resample": 1,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 4 * tile},
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": tile}},
    }
    write_json(folder / "preprocessor_config.json", processor)
    write_json(folder / "processor_config.json", {"image_seq_len": (tile // 28) ** 2, "processor_class": "SmolVLMProcessor"})
