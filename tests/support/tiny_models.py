"""Random multimodal LLMs of a few hundred kilobytes, in the files and the format of the models that users download.

Everything is drawn from the seed: two calls write the same bytes. Both transformers 4.57 and 5.x load the folders without a network.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "internvl")

_QWEN_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> "
    "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
_INTERNVL_TOKENS = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box> <video>".split()
_INTERNVL_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

# Names that the code which loads these tensors has for them -> names in the files on the hub, which are older.
_HUB_NAMES = {
    "qwen": ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),
    "internvl": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    ),
}

_QWEN_CHAT = """\
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

_INTERNVL_CHAT = """\
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


def make_mllm(folder, family: str, seed: int = 0, **shape) -> Path:
    """Writes a random model of `family` (one of FAMILIES) into `folder` and returns it. `shape`: arguments of `write_files`."""
    write_files(folder, family, **shape)
    _write_weights(Path(folder), "internvl" if family == "internvl" else "qwen", seed)
    return Path(folder)


def write_files(
    folder,
    family: str,
    *,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 64,
    tile: int = 112,
    text: dict | None = None,
    vision: dict | None = None,
    known: str = "",
) -> None:
    """Everything of a model folder but the weights.

    `layers`, `heads`, `kv_heads`, `hidden`: of the text tower. `tile`: side of InternVL's square tiles in pixels, a multiple of 28
    (the real one is 448); a tile becomes (tile / 28)^2 tokens. `text`, `vision`: further entries of a Qwen model's configuration.
    `known`: text whose words become one token each, as most words are to a real tokenizer.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is none of {FAMILIES}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = _QWEN_TOKENS + (_INTERNVL_TOKENS if family == "internvl" else [])
    tokenizer = _tokenizer(tokens, known)
    size = tokenizer.get_vocab_size()
    text = {
        "vocab_size": size + -size % 64,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "torch_dtype": "bfloat16",
        **(text or {}),
    }
    config = _internvl_config(text, tokenizer, tile) if family == "internvl" else _qwen_config(family, text, vision or {}, tokenizer)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": text["bos_token_id"],
            "pad_token_id": text["bos_token_id"],
            "eos_token_id": [text["eos_token_id"], text["bos_token_id"]],
        },
    )
    _write_tokenizer(folder, family, tokenizer, tokens)
    if family == "internvl":
        _write_internvl_processor(folder, tile)
    else:
        _write_qwen_processor(folder, family)


def _qwen_config(family: str, text: dict, more_vision: dict, tokenizer: Tokenizer) -> dict:
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    spatial = half * 3 // 8
    vision = {
        "depth": 2,
        "in_chans": 3,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }
    if family == "qwen2_vl":
        vision |= {
            "model_type": "qwen2_vl",
            "embed_dim": 32,
            "hidden_size": text["hidden_size"],
            "mlp_ratio": 2,
            "hidden_act": "quick_gelu",
        }
    else:
        vision |= {"model_type": "qwen2_5_vl", "hidden_size": 32, "out_hidden_size": text["hidden_size"], "intermediate_size": 64}
        vision |= {"hidden_act": "silu", "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    ids = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    named = {name.replace("_pad", "") if name != "vision_pad" else "vision": tokenizer.token_to_id(f"<|{name}|>") for name in ids}
    return {
        "architectures": [{"qwen2_vl": "Qwen2VLForConditionalGeneration", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}[family]],
        "model_type": family,
        **text,
        **{f"{name}_token_id": number for name, number in named.items()},
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * spatial, spatial, spatial]},
        "vision_config": vision | more_vision,
        "transformers_version": "4.41.2",
    }


def _internvl_config(text: dict, tokenizer: Tokenizer, tile: int) -> dict:
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "image_seq_length": (tile // 28) ** 2,
        "image_token_id": tokenizer.token_to_id("<IMG_CONTEXT>"),
        "tie_word_embeddings": False,
        "projector_hidden_act": "gelu",
        "text_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **text},
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
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def _tokenizer(tokens: list[str], known: str) -> Tokenizer:
    """Byte-level, so any text can be encoded, with a few dozen merges, so that some words are one token and others several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pieces = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = "system\nuser\nassistant\nsystem user assistant You are a helpful assistant."
    corpus = [f"{words} Frame the object in this video? the main object a word or phrase. yes no {known}"] * 4
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=2048 if known else 512, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return tokenizer


def _write_tokenizer(folder: Path, family: str, tokenizer: Tokenizer, tokens: list[str]) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads(tokenizer.to_str())["model"]
    _write_json(folder / "vocab.json", model["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in tokens},
        "additional_special_tokens": tokens[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    if family == "internvl":
        config |= _INTERNVL_NAMES
        config |= {"extra_special_tokens": _INTERNVL_NAMES, "return_token_type_ids": False, "processor_class": "InternVLProcessor"}
    else:
        config |= {"chat_template": _QWEN_CHAT}
    _write_json(folder / "tokenizer_config.json", config)


def _write_qwen_processor(folder: Path, family: str) -> None:
    _write_json(folder / "chat_template.json", {"chat_template": _QWEN_CHAT})
    _write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}[family],
        },
    )


def _write_internvl_processor(folder: Path, tile: int) -> None:
    (folder / "chat_template.jinja").write_text(_INTERNVL_CHAT, encoding="utf-8")
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
    _write_json(folder / "preprocessor_config.json", shared | tiles)
    _write_json(folder / "video_preprocessor_config.json", shared | {"video_processor_type": "InternVLVideoProcessor"})
    _write_json(folder / "processor_config.json", {"image_seq_length": (tile // 28) ** 2, "processor_class": "InternVLProcessor"})


def _write_weights(folder: Path, names: str, seed: int) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False), trust_remote_code=False)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in sorted(model.state_dict().items()):
        for pattern, hub_name in _HUB_NAMES[names]:
            name = re.sub(pattern, hub_name, name)
        tensors[name] = _draw(name, parameter.shape, generator).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Weights that keep activations near 1 and make attention uneven, so that maps of random models have peaks and hollows."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.1 * noise if name.endswith("weight") or "lambda" in name else 0.1 * noise
    if re.search(r"embed_tokens|position_embeddings|cls_token", name):
        return noise
    gain = 2.0 if re.search(r"\.(q_proj|k_proj|qkv)\.", name) else 1.0
    return gain * noise / shape[1:].numel() ** 0.5


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
