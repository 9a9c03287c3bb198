"""Reading SAM 2 checkpoint files without running anything that is in them."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter

from ..devices import is_out_of_memory
from ..errors import DecafError, reason, shown

METADATA_KEY = "decaf.sam2"
"""Where a checkpoint may carry what tensor shapes cannot tell: a JSON object with fields of `Settings`. In a safetensors file it is a
metadata entry of the header, in a .pt file an entry beside "model"."""

# Of the largest published model: 904 weights, whose list takes 110 KB, and no settings.
MAX_WEIGHTS = 20_000
_MAX_LIST_BYTES = 8 << 20
_MAX_SETTINGS_LENGTH = 10_000


class Checkpoint:
    """A file of weights whose names are known and whose weights are read when they are asked for: `names` in the file's order, `settings`
    that it carries (empty for Meta's files)."""

    def __init__(self, path: Path, names: list[str], settings: dict[str, object], read: Callable[[list[str]], dict[str, Tensor]]):
        self.path, self.names, self.settings, self._read = path, names, settings, read

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The weights of these names. DecafError: one is damaged, or no plain weight."""
        weights = self._read(list(names))
        _refuse_other_tensors(self.path, weights)
        return weights


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A .safetensors file, or one of torch.save with the weights at the top or under "model". DecafError: it is none."""
    path = Path(path)
    if not path.is_file():
        raise DecafError(f"There is no SAM 2 checkpoint at {path}. Download one, for example sam2.1_hiera_large.pt, or correct the path.")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def read_checkpoint(file: Checkpoint) -> dict[str, Tensor]:
    """The weights of a SAM 2 model by name. Raises DecafError."""
    if not file.names:
        raise _no_weights(file.path)
    _refuse_other_models(file.path, file.names)
    return file.read(file.names)


def _no_weights(path: Path) -> DecafError:
    return DecafError(f"{path} holds no weights by name. A SAM 2 checkpoint is a table of tensors, at the top or under 'model'.")


def _open_safetensors(path: Path) -> Checkpoint:
    def read(names: list[str]) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in names}
        except Exception as error:  # the library's own, and whatever a damaged file leads to behind it
            raise _damaged(path, "safetensors file", error) from error

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
    except Exception as error:
        raise _damaged(path, "safetensors file", error) from error
    _refuse_too_many(path, len(names))
    return Checkpoint(path, names, _parse_settings(path, metadata.get(METADATA_KEY)), read)


def _open_torch(path: Path) -> Checkpoint:
    try:
        _refuse_packed(path)
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except DecafError:
        raise
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise DecafError(
                f"{path} holds more than weights: loading it would run code that is in the file, so it was not loaded. "
                "Use Meta's own checkpoint or a .safetensors file."
            ) from error
        raise _damaged(path, "PyTorch checkpoint", error) from error
    except Exception as error:  # a damaged list of weights is a damaged program: there is no error that it does not end in somewhere
        raise _damaged(path, "PyTorch checkpoint", error) from error
    settings = _parse_settings(path, payload.get(METADATA_KEY)) if isinstance(payload, Mapping) else {}
    weights = payload.get("model", payload) if isinstance(payload, Mapping) else payload
    if not isinstance(weights, Mapping):
        raise DecafError(f"{path} holds {type(weights).__name__} instead of weights by name. Use a SAM 2 checkpoint.")
    if not weights or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise _no_weights(path)
    _refuse_too_many(path, len(weights))
    return Checkpoint(path, list(weights), settings, lambda names: {name: weights[name] for name in names})


def _damaged(path: Path, kind: str, error: Exception) -> DecafError:
    if is_out_of_memory(error):
        return DecafError(
            f"Memory ran out while {path} was read, which has {path.stat().st_size / 1e6:.0f} MB. Close other programs; if that much is free, "
            "the file is damaged: download it again."
        )
    return DecafError(f"{path} is damaged or not a {kind} ({reason(error)}). Download it again.")


def _refuse_packed(path: Path) -> None:
    """torch.save writes a zip archive without compression. One of a few megabytes could unpack to any size."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    size, unpacked = path.stat().st_size, sum(member.file_size for member in members)
    if unpacked > size:
        raise DecafError(
            f"{path} has {size / 1e6:.1f} MB and would unpack to {unpacked / 1e6:.1f} MB: it is compressed, or names the same bytes several times. "
            "Use the file as it was published."
        )
    if any(member.file_size > _MAX_LIST_BYTES for member in members if member.filename.endswith(".pkl")):
        raise DecafError(
            f"{path} lists more than a SAM 2 model has: its list of weights takes over {_MAX_LIST_BYTES >> 20} MB. Use Meta's checkpoint."
        )


def _refuse_too_many(path: Path, count: int) -> None:
    if count > MAX_WEIGHTS:
        raise DecafError(f"{path} holds {count} weights; a SAM 2 model has fewer than {MAX_WEIGHTS}. Use Meta's checkpoint.")


def _refuse_other_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Weights are plain dense arrays, each stored in the file: a view may claim gigabytes of a few bytes."""
    claimed = 0
    for name, value in weights.items():
        plain = type(value) in (Tensor, Parameter) and not value.is_nested and value.layout == torch.strided and value.device.type == "cpu"
        if not plain:
            kind = "no values" if value.is_meta else f"a {'nested' if value.is_nested else value.layout} {type(value).__name__}"
            raise DecafError(f"{path}: its weight '{shown(name)}' has {kind}; only plain dense weights are read. Use Meta's checkpoint.")
        if not value.is_floating_point():
            raise DecafError(
                f"{path}: its weight '{shown(name)}' holds {value.dtype} numbers; quantised weights are not supported. Use Meta's checkpoint."
            )
        claimed += value.numel() * value.element_size()
    size = path.stat().st_size
    if claimed > size:
        raise DecafError(
            f"{path} has {size / 1e6:.1f} MB, but its weights claim {claimed / 1e6:.1f} MB: some are repeated views of others. "
            "Save it again with contiguous weights, or use Meta's checkpoint."
        )


def _parse_settings(path: Path, text: object) -> dict[str, object]:
    if text is None:
        return {}
    if isinstance(text, str | bytes) and len(text) > _MAX_SETTINGS_LENGTH:
        raise DecafError(
            f"{path}: its entry '{METADATA_KEY}' is longer than {_MAX_SETTINGS_LENGTH} characters. Use the file as it was published."
        )
    try:
        settings = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DecafError(f"{path}: its entry '{METADATA_KEY}' is not JSON ({reason(error)}).") from error
    if not isinstance(settings, dict):
        raise DecafError(f"{path}: its entry '{METADATA_KEY}' is not a JSON object.")
    return settings


def _refuse_other_models(path: Path, weights: Collection[str]) -> None:
    if any(name.startswith("memory_attention.layers.") for name in weights) and "image_encoder.trunk.pos_embed" in weights:
        return
    if any(name.startswith(("mask_decoder.", "prompt_encoder.")) for name in weights) and "image_encoder.pos_embed" in weights:
        what = "is a checkpoint of SAM 1, which cannot track through a video"
    elif any(name.startswith("spatial_perceiver.") for name in weights):
        what = "is EdgeTAM, whose image encoder and memory are others, and which is not supported"
    elif any(name.startswith("vision_encoder.") for name in weights):
        what = "has the weights under the names of the transformers library"
    else:
        what = f"does not hold a SAM 2 video model (its first weight is '{shown(next(iter(weights)))}')"
    raise DecafError(f"{path} {what}. Use Meta's SAM 2 or SAM 2.1 checkpoint, for example sam2.1_hiera_large.pt.")
