"""Which models can be loaded, told by their config.json: the families, and the reasons why others are refused."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path

from ..errors import DecafError, shown
from . import families
from .base import Family

QUANTISED_AS = ("bitsandbytes",)
"""Quantisation that is loaded, where its package is installed. Other methods may fetch kernels of native code by themselves."""

_LINEAR = "computes most layers with linear attention, which has no attention maps"
_WINDOWS = "attends in sliding windows in most layers and, in some models, to later tokens inside a picture"
_BOTH_WAYS = "lets the tokens of pictures see later ones"
_NO_ROLLOUT = {
    "qwen3_5": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp": _LINEAR,
    "gemma3": _WINDOWS,
    "gemma4": _WINDOWS,
    "paligemma": _BOTH_WAYS,
    "molmo2": _BOTH_WAYS,
    "molmo": "needs Python code from its own folder, which is never run",
    "mllama": "sees pictures through layers of cross-attention: they do not stand in the prompt, whose attention is followed",
    "llama4": "attends within chunks of the prompt in most layers",
}
"""Well-known models that cannot be served as the others are, by the beginning of their `model_type`, and why."""


@cache
def registry() -> dict[str, Family]:
    """Families by the `model_type` of their models' config.json."""
    found = [importlib.import_module(f"{families.__name__}.{entry.name}").FAMILY for entry in pkgutil.iter_modules(families.__path__)]
    return {model_type: family for family in found for model_type in family.model_types}


def all_families() -> list[Family]:
    """Every family once, in the order of their ranks and titles."""
    return sorted(dict.fromkeys(registry().values()), key=lambda family: (family.rank, family.title))


def family_of(config: dict, folder: Path) -> Family:
    """The family of the model whose config.json has these entries. DecafError: it is of none, or something in it is not supported."""
    model_type = config["model_type"]
    family = registry().get(model_type)
    if family is None:
        for beginning, why in _NO_ROLLOUT.items():
            if model_type.startswith(beginning):
                raise DecafError(
                    f'The model in {folder} has the type "{model_type:.60}", which {why}; its attention rollout is not supported. Choose a model '
                    "with plain causal attention in every layer, such as Qwen/Qwen3-VL-8B-Instruct."
                )
        supported = ", ".join(f"{one.title} ({', '.join(one.model_types)})" for one in all_families())
        kind = "" if "vision_config" in config else " It is a text-only model: it cannot see pictures."
        raise DecafError(f'The model in {folder} has the type "{model_type:.60}", which is not supported.{kind} Supported are {supported}.')
    text = config.get("text_config", config)
    if not isinstance(text, dict) or not isinstance(config.get("vision_config"), dict):
        raise DecafError(f"{folder / 'config.json'} is damaged (it does not describe a tower of text and one of vision). Download the model again.")
    for tower, entries, known in (("text", text, family.text_types), ("vision", config["vision_config"], family.vision_types)):
        named = entries.get("model_type", known[0]) if entries is not config else known[0]
        if named not in known:
            raise DecafError(
                f"The model in {folder} has a {tower} tower of the type {shown(named, 60)!r}; supported are {', '.join(known)}. Choose another model."
            )
    method = quantised_as(config)
    if method is not None and method not in QUANTISED_AS:
        raise DecafError(
            f"The model in {folder} cannot be loaded: it is quantised as {shown(method, 60)!r}; supported are weights as published, and "
            f"{', '.join(QUANTISED_AS)}. Choose another version of the model."
        )
    layer_types = text.get("layer_types")
    others = [one for one in layer_types if one != "full_attention"] if isinstance(layer_types, list) else []
    if others:
        what = "sliding-window attention" if "sliding_attention" in others else f"attention of the type {shown(others[0], 60)!r}"
        raise DecafError(
            f"The model in {folder} uses {what} in some layers; its attention rollout is not supported. "
            "Choose a model with full attention in every layer."
        )
    return family


def quantised_as(config: dict) -> object | None:
    """The method by which the weights are quantised, whatever the configuration says there; None if they are not."""
    text = config.get("text_config")
    quantised = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if quantised is None:
        return None
    return quantised.get("quant_method") or "unnamed" if isinstance(quantised, dict) else quantised
