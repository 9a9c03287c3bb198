"""Reading SAM 2 checkpoint files without running anything that is in them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DecafError

METADATA_KEY = "decaf.sam2"
"""Where a checkpoint may carry what tensor shapes cannot tell: a JSON object with fields of `Settings`. In a safetensors file it is a
metadata entry of the header, in a .pt file an entry beside "model"."""


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Weights by name, and the settings that the file carries (empty for Meta's files).

    Takes .safetensors, or a file of torch.save with the weights at the top or under "model". Raises DecafError.
    """
    path = Path(path)
    if not path.is_file():
        raise DecafError(f"There is no SAM 2 checkpoint at {path}. Download one, for example sam2.1_hiera_large.pt, or correct the path.")
    weights, settings = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not weights or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise DecafError(f"{path} holds no weights by name. A SAM 2 checkpoint is a table of tensors, at the top or under 'model'.")
    _refuse_other_models(path, weights)
    whole = next((name for name, value in weights.items() if not value.is_floating_point()), None)
    if whole is not None:
        raise DecafError(
            f"{path}: its weight '{whole}' holds {weights[whole].dtype} numbers; quantised weights are not supported. Use Meta's checkpoint."
        )
    return weights, settings


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise DecafError(f"{path} is damaged or not a safetensors file ({error}). Download it again.") from error
    return weights, _parse_settings(path, metadata.get(METADATA_KEY))


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise DecafError(
                f"{path} holds more than weights: loading it would run code that is in the file, so it was not loaded. "
                "Use Meta's own checkpoint or a .safetensors file."
            ) from error
        raise _damaged(path, error) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise _damaged(path, error) from error
    settings = _parse_settings(path, payload.get(METADATA_KEY)) if isinstance(payload, Mapping) else {}
    weights = payload.get("model", payload) if isinstance(payload, Mapping) else payload
    if not isinstance(weights, Mapping):
        raise DecafError(f"{path} holds {type(weights).__name__} instead of weights by name. Use a SAM 2 checkpoint.")
    return dict(weights), settings


def _damaged(path: Path, error: Exception) -> DecafError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
    return DecafError(f"{path} is damaged or not a PyTorch checkpoint ({reason}). Download it again.")


def _parse_settings(path: Path, text: object) -> dict[str, object]:
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except (TypeError, ValueError) as error:
        raise DecafError(f"{path}: its entry '{METADATA_KEY}' is not JSON ({error}).") from error
    if not isinstance(settings, dict):
        raise DecafError(f"{path}: its entry '{METADATA_KEY}' is not a JSON object.")
    return settings


def _refuse_other_models(path: Path, weights: dict[str, Tensor]) -> None:
    if any(name.startswith("memory_attention.layers.") for name in weights) and "image_encoder.trunk.pos_embed" in weights:
        return
    if any(name.startswith(("mask_decoder.", "prompt_encoder.")) for name in weights) and "image_encoder.pos_embed" in weights:
        what = "is a checkpoint of SAM 1, which cannot track through a video"
    elif any(name.startswith("vision_encoder.") for name in weights):
        what = "has the weights under the names of the transformers library"
    else:
        what = f"does not hold a SAM 2 video model (its first weight is '{next(iter(weights))}')"
    raise DecafError(f"{path} {what}. Use Meta's SAM 2 or SAM 2.1 checkpoint, for example sam2.1_hiera_large.pt.")
