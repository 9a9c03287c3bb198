"""What the tiny models of all families share: a tokenizer, the numbers of a text tower, weights, and how they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

QWEN_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> "
    "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
"""Control tokens of the chats of Qwen's models; the first is that for padding."""


def make_tokenizer(tokens: Sequence[str], known: str) -> Tokenizer:
    """Byte-level, so any text can be encoded, with a few dozen merges, so that some words are one token and others several. `tokens`: control
    tokens. `known`: text whose words become one token each."""
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


def text_numbers(tokenizer: Tokenizer, *, end: str, padding: str, layers: int, heads: int, kv_heads: int, hidden: int) -> dict:
    """Entries of a text tower's configuration that all families name alike."""
    size = tokenizer.get_vocab_size()
    return {
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
        "attention_dropout": 0.0,
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id(padding),
        "eos_token_id": tokenizer.token_to_id(end),
        "torch_dtype": "bfloat16",
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, tokens: Sequence[str], *, end: str, more: Mapping[str, object]) -> None:
    """The tokenizer's files, and the configuration of generation. `tokens`: its control tokens, that for padding first. `end`: the one that
    ends an answer. `more`: further entries of tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads(tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in tokens},
        "additional_special_tokens": list(tokens[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": tokens[0],
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config | dict(more))
    padding, ends = tokenizer.token_to_id(tokens[0]), tokenizer.token_to_id(end)
    write_json(folder / "generation_config.json", {"bos_token_id": padding, "pad_token_id": padding, "eos_token_id": [ends, padding]})


def write_weights(folder: Path, hub_names: Sequence[tuple[str, str]], seed: int, exchanged: str | None = None) -> None:
    """Random weights for the model that config.json describes. `hub_names`: patterns of the names that transformers has for weights, and what
    stands in their place in published files. `exchanged`: pattern of weights whose last two axes stand the other way round in published
    files than in transformers 5."""
    from transformers import AutoConfig, AutoModelForImageTextToText, __version__

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=False), trust_remote_code=False
        )
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in sorted(model.state_dict().items()):
        if exchanged and re.search(exchanged, name) and int(__version__.split(".")[0]) >= 5:
            parameter = parameter.transpose(-1, -2)
        for pattern, hub_name in hub_names:
            name = re.sub(pattern, hub_name, name)
        # Numbers of the published format, in the one that every CPU computes in.
        tensors[name] = draw(name, parameter.shape, generator).to(torch.bfloat16).float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Weights that keep activations near 1 and make attention uneven, so that maps of random models have peaks and hollows."""
    noise = torch.randn(shape, generator=generator)
    if re.search(r"post_(self_attn|mlp)_layernorm", name):  # norms of what a layer adds: at 1 a random model multiplies rounding errors
        return 0.2 + 0.02 * noise
    if len(shape) == 1:
        return 1 + 0.1 * noise if name.endswith("weight") or "lambda" in name else 0.1 * noise
    if re.search(r"embed_tokens|position_embeddings|cls_token", name):
        return noise
    gain = 2.0 if re.search(r"\.(q_proj|k_proj|qkv)\.", name) else 1.0
    summed = shape[1] if ".experts." in name else shape[1:].numel()  # those of all experts lie in one tensor: (experts, in, out)
    return gain * noise / summed**0.5


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
