"""What a model folder is checked for while it is loaded: whether its files are whole, of one model, and hold numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ..errors import DecafError
from .base import MLLM
from .folder import missing_files

_OF_A_LAYER = re.compile(r"\b(?:layers|blocks|layer)\.(\d+)\..*\.(?:weight|bias)$")
"""Names of weights that belong to one of the layers of a tower."""


def check_complete(folder: Path) -> None:
    """DecafError: a file is missing, or the folder holds an adapter to another model."""
    if (folder / "adapter_config.json").exists():  # transformers would load the base model that it names instead
        raise DecafError(
            f"{folder} holds an adapter (adapter_config.json), which belongs to another model. Merge it into that model, or choose that model."
        )
    missing = missing_files(folder)
    if missing:
        listed = ", ".join(missing[:4]) + (" and more" if len(missing) > 4 else "")
        raise DecafError(f"The model folder {folder} is incomplete: {listed} is missing. Finish or repeat the download.")


def check_version(config: dict, folder: Path) -> None:
    """transformers 4 overlooks how version 5 writes the rotary embedding, and would put a default in its place."""
    import transformers

    text = config.get("text_config", config)
    if "rope_parameters" in text and "rope_theta" not in text and int(transformers.__version__.split(".")[0]) < 5:
        raise DecafError(
            f"The model in {folder} was saved for transformers 5, and {transformers.__version__} is installed. Update it: pip install --upgrade "
            "transformers"
        )


def check_total(config: object, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Refuses a configuration that asks for more numbers than the weight files hold, before memory is taken for them.

    The model is built without memory. Packed (quantised) weights hold up to 16 numbers in one.
    """
    from transformers import AutoModelForImageTextToText

    _check_depth(config, shapes, folder)  # first: a model of hundreds of layers takes long to build, even without memory
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    asked = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    held = sum(torch.Size(shape).numel() for shape in shapes.values())
    held *= 16 if getattr(config, "quantization_config", None) else 1
    if asked > 1.01 * held + (1 << 24):  # buffers are not in the files
        raise DecafError(
            f"The config.json in {folder} asks for a model of {asked:,} numbers, and its weight files hold {held:,}. Its files are not of one "
            "model; download it again."
        )


def _check_depth(config: object, names: Iterable[str], folder: Path) -> None:
    """DecafError: a tower of more layers than the weights are numbered by."""
    held = 1 + max((int(found[1]) for found in map(_OF_A_LAYER.search, names) if found), default=-1)
    for tower in (config.get_text_config(), config.vision_config):
        asked = getattr(tower, "num_hidden_layers", None) or getattr(tower, "depth", 0)
        if held and asked > held:
            raise DecafError(
                f"The config.json in {folder} asks for {asked} layers, and its weight files hold at most {held}. Its files are not of one model; "
                "download it again."
            )


def check_loaded(folder: Path, info: dict) -> None:
    """Transformers would go on with random numbers in the place of weights that are not there or do not fit, and without layers that are."""
    missing = sorted(info["missing_keys"])
    # transformers 5 lists names with both shapes, 4 names alone
    shaped = sorted(one if isinstance(one, str) else one[0] for one in info["mismatched_keys"])
    if missing:
        raise DecafError(
            f"The model in {folder} lacks {len(missing)} weights that its config.json asks for, first of all {missing[0]}. "
            "Download it again."
        )
    left = sorted(name for name in info["unexpected_keys"] if _OF_A_LAYER.search(name))
    if left:
        raise DecafError(
            f"The files of the model in {folder} hold {len(left)} weights of layers that its config.json does not ask for, first of all {left[0]}. "
            "Its files are not of one model; download it again."
        )
    if shaped:
        raise DecafError(
            f"{len(shaped)} weights of the model in {folder} have another shape than its config.json asks for, first of all {shaped[0]}. "
            "Its files are not of one model; download it again."
        )


def check_numbers(folder: Path, model: nn.Module) -> None:
    """Refuses weights that are not numbers: every norm and bias whole, and the middle row of every matrix.

    To look at all of them would take longer than to load them, since that only maps the files. A few bad numbers elsewhere are told after the
    first pictures, whose attention queries they spoil.
    """
    for name, weight in model.named_parameters():
        row = weight
        while row.ndim > 1:
            row = row[len(row) // 2]
        if row.is_floating_point() and not row.isfinite().all():
            raise DecafError(
                f"The model in {folder} is damaged: its weight {name} holds numbers that are not finite (NaN or infinite). Download it again."
            )


def check_tokenizer(mllm: MLLM) -> None:
    """DecafError: the tokenizer is that of another model, or one without words, which load without a complaint."""
    for kind in mllm.family.visual_tokens:
        mllm.visual_token_id(kind)
    if len(mllm.question_ids(None, "cup")) <= len(mllm.question_ids(None, "")):
        raise DecafError("Its tokenizer knows no letters. Download the model again.")
