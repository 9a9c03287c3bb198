"""GLM-4.1V."""

from __future__ import annotations

from pathlib import Path

from .writing import make_tokenizer, text_numbers, write_json, write_tokenizer

NAMES = ("glm4v",)
HUB_NAMES = ()

TOKENS = (
    "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> <|begin_of_image|> <|end_of_image|> "
    "<|begin_of_video|> <|end_of_video|> <|image|> <|video|> /nothink"
).split()

CHAT = """\
[gMASK]<sop>
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'video' -%}
{{- '<|begin_of_video|><|video|><|end_of_video|>' -}}
{%- elif part['type'] == 'image' -%}
{{- '<|begin_of_image|><|image|><|end_of_image|>' -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- endif -%}
"""


def write(
    folder: Path, name: str, *, numbers: dict, text: dict, vision: dict, known: str, chat: str = CHAT, processor: str = "Glm4v"
) -> None:
    """`chat`: the chat template. `processor`: what the names of the processors' classes begin with."""
    tokenizer = make_tokenizer(TOKENS, known)
    text = text_numbers(tokenizer, end="<|user|>", padding="<|endoftext|>", **numbers) | text
    # Half of each head is turned, as in the published models.
    pairs = text["hidden_size"] // text["num_attention_heads"] // 4
    spatial = pairs * 3 // 8
    turned = {"rope_type": "default", "mrope_section": [pairs - 2 * spatial, spatial, spatial]}
    config = {
        "architectures": ["Glm4vForConditionalGeneration"],
        "model_type": "glm4v",
        "tie_word_embeddings": False,
        "text_config": {"model_type": "glm4v_text", "partial_rotary_factor": 0.5, "rope_scaling": turned, **text},
        "vision_config": {
            "model_type": "glm4v",
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": text["hidden_size"],
            "intermediate_size": 64,
            "num_heads": 2,
            "in_channels": 3,
            "image_size": 112,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "attention_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            **vision,
        },
        **{f"{one}_token_id": tokenizer.token_to_id(f"<|{one}|>") for one in ("image", "video")},
        **{f"{one}_start_token_id": tokenizer.token_to_id(f"<|begin_of_{one}|>") for one in ("image", "video")},
        **{f"{one}_end_token_id": tokenizer.token_to_id(f"<|end_of_{one}|>") for one in ("image", "video")},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.53.0",
    }
    write_json(folder / "config.json", config)
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": f"{processor}Processor"}
    write_tokenizer(folder, tokenizer, TOKENS, end="<|endoftext|>", more=more)
    ends = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    write_json(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": ends[0]})
    (folder / "chat_template.jinja").write_text(chat, encoding="utf-8")
    shared = {
        "size": {"shortest_edge": 12544, "longest_edge": 9633792},
        "do_rescale": True,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": f"{processor}Processor",
    }
    write_json(folder / "preprocessor_config.json", shared | {"image_processor_type": f"{processor}ImageProcessor"})
    write_json(folder / "video_preprocessor_config.json", shared | {"video_processor_type": f"{processor}VideoProcessor"})
