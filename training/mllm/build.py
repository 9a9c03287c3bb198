"""The files of the tiny model around its weights: tokenizer, processor, chat template and configuration, in the format of the hub's models.

Qwen2.5-VL's architecture with one patch of 28 x 28 pixels a visual token (the usual models merge four of 14 x 14 to that), so the grids are
those of the large models at a quarter of the cost.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from decaf.attention.questions import Templates
from decaf.demo.asking import NUMBERS, plural
from decaf.demo.painting import BACKGROUNDS, COLOURS, SHAPES

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> "
    "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
NAMES = [f"{colour}-{shape}" for colour in COLOURS for shape in SHAPES] + [
    f"{number}-{plural(shape)}" for number in NUMBERS for shape in SHAPES
]
"""Answers to the object question, a token each. They join two words: neither follows from a query that tells only one of them."""

PATCH = 28

CHAT = """\
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


def fixed_texts() -> list[str]:
    """What never changes in a prompt: a token each, so that prompts are short."""
    templates = Templates()
    pieces = ["user\n", "assistant\n"]
    for template in (templates.object, templates.background, templates.class_background, templates.choose, templates.presence):
        pieces += [piece for piece in re.split(r"\{\w+\}", template) if len(piece) > 1]
    return list(dict.fromkeys(pieces))


def build_tokenizer() -> Tokenizer:
    """Byte-level, so that any text can be encoded; every word of the scenes' queries is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pieces = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [*COLOURS, *SHAPES, *map(plural, SHAPES), *BACKGROUNDS, *NUMBERS]
    words += "none the all object thing one shape largest biggest smallest leftmost rightmost topmost bottommost to left right of".split()
    words += "above below moving that moves stays still stops appears last disappears up down a an in on is which who whose with and yes no".split()
    corpus = [text for word in words for text in (word, " " + word)] * 4
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in [*fixed_texts(), *NAMES]])
    return tokenizer


def model_config(tokenizer: Tokenizer, *, width=128, layers=3, heads=4, hidden=320, depth=4, vision_width=128, theta=10.0) -> dict:
    size = tokenizer.get_vocab_size()
    half = width // heads // 2
    side = half * 3 // 8
    ids = ("vision_start", "vision_end", "image_pad", "video_pad")
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "decaf": {"system_prompt": ""},  # it was trained without one, unlike its family
        "vocab_size": size + -size % 32,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "initializer_range": 0.04,
        "rms_norm_eps": 1e-6,
        "rope_theta": theta,
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * side, side, side]},
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        **{f"{name.replace('_pad', '')}_token_id": tokenizer.token_to_id(f"<|{name}|>") for name in ids},
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": depth,
            "hidden_act": "silu",
            "hidden_size": vision_width,
            "out_hidden_size": width,
            "intermediate_size": vision_width * 5 // 2,
            "num_heads": vision_width // 32,
            "in_chans": 3,
            "patch_size": PATCH,
            "spatial_patch_size": PATCH,
            "spatial_merge_size": 1,
            "temporal_patch_size": 2,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": list(range(depth)),
            "tokens_per_second": 2,
            "initializer_range": 0.04,
        },
        "torch_dtype": "float16",
        "transformers_version": "4.57.0",
    }


def write_model_files(folder: Path, **sizes) -> Tokenizer:
    """Everything but model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    config = model_config(tokenizer, **sizes)
    _write(folder / "config.json", config)
    ends = [config["eos_token_id"], config["bos_token_id"]]
    _write(folder / "generation_config.json", {"bos_token_id": config["bos_token_id"], "pad_token_id": ends[1], "eos_token_id": ends})
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {text: text in SPECIAL for text in [*SPECIAL, *fixed_texts(), *NAMES]}
    _write(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(text)): {"content": text, **flags, "special": special} for text, special in added.items()
            },
            "additional_special_tokens": SPECIAL[1:],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
            "chat_template": CHAT,
        },
    )
    _write(folder / "chat_template.json", {"chat_template": CHAT})
    _write(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 16 * PATCH * PATCH,
            "max_pixels": 2048 * PATCH * PATCH,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "merge_size": 1,
            "image_mean": list(MEAN),
            "image_std": list(STD),
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )
    return tokenizer


MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
