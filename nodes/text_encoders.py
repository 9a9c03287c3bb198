"""What the files in models/text_encoders are, told by their headers alone."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..decaf.devices import is_out_of_memory
from ..decaf.errors import DecafError, reason
from ..decaf.report import Progress
from . import host
from .file_head import FileHead

log = logging.getLogger(__name__)

FOLDER = "text_encoders"
SUFFIXES = (".safetensors", ".sft")
WORKS = "Qwen2.5-VL 7B or Qwen3-VL 4B or 8B, such as qwen_2.5_vl_7b_fp8_scaled.safetensors or qwen3vl_4b_fp8_scaled.safetensors"
"""Models that can be used, in words."""

LARGEST_HEADER = 16 << 20
"""Bytes. Real ones have less than a megabyte; the format allows 100, of which Python would make gigabytes whenever the files are listed."""

MOST_AXES = 8
"""Of a tensor."""

_SIZES = {("Qwen2.5-VL", 3584): "7B", ("Qwen3-VL", 2560): "4B", ("Qwen3-VL", 4096): "8B"}
_FORMATS = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "BF16": "bf16", "F16": "fp16", "F32": "fp32", "I8": "int8", "U8": "4 bit"}
_HEADS = ("lm_head.weight", "model.lm_head.weight")


@dataclass(frozen=True)
class TextEncoderFile:
    """A safetensors file. `family`: as people call it, empty where it is none that is known. `problem`: why it cannot be used, as the rest of a
    sentence that begins with its name; None if it can. `names`: of its tensors. `length`: in bytes."""

    path: Path
    family: str
    size: str
    precision: str
    problem: str | None
    head: FileHead | None
    names: frozenset[str] = frozenset()
    length: int = 0

    @property
    def usable(self) -> bool:
        return self.problem is None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the weights `names`, as ComfyUI calls them in the model, that are not in the file: ComfyUI goes on with chance numbers."""
        here = {_in_model(name) for name in self.names}
        return sorted(name for name in names if name not in here)

    @property
    def told(self) -> str:
        """In a few words, for example "Qwen3-VL 4B, fp8, 4.5 GB"."""
        return f"{self.family} {self.size}, {self.precision}, {self.length / 1e9:.1f} GB"


def text_encoders() -> dict[str, TextEncoderFile]:
    """The multimodal files of models/text_encoders that are known: the name that a combo shows -> the file. Damaged ones are among them, so
    that choosing one says what is wrong."""
    found = {name: read_text_encoder(path) for name, path in host.files(FOLDER, SUFFIXES).items()}
    return {name: file for name, file in found.items() if file is not None and file.family}


def text_encoder_problem(name: str) -> str | None:
    """Why the file of that name in models/text_encoders cannot be used, in a sentence; None if there is none of that name, or it can."""
    path = host.files(FOLDER, ("",)).get(name)
    if path is None:
        return None
    if path.suffix.lower() not in SUFFIXES:
        loader = "the loader of the pack that reads such files" if path.suffix.lower() == ".gguf" else "Load CLIP"
        return f"{name} is no safetensors file. Load it with {loader}, and connect its CLIP to Extract Rollout Attention."
    file = read_text_encoder(path)
    if file is None:
        return f"{name} cannot be read. Check the file."
    return None if file.usable else f"{name} {file.problem}"


def read_text_encoder(path: Path) -> TextEncoderFile | None:
    """What a file is; None if it is not there."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):  # the latter for a name that no file can have
        return None
    return _read(str(path), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=256)
def _read(path: str, changed: int, length: int) -> TextEncoderFile:
    try:
        header, begin = _header(path, length)
        tensors = {name: _tensor(entry) for name, entry in header.items()}
    except OSError as error:
        return _no_model(path, f"cannot be read ({reason(error)}). Check the file and its permissions.")
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        return _no_model(path, "is no safetensors file, whatever its name says, or its beginning is damaged. Download it again.")
    family, width = _family(tensors)
    if not family:
        return _no_model(path, f"holds no multimodal LLM that is known: no vision tower was found in it. Choose {WORKS}.")
    size = _SIZES.get((family, width)) or f"{sum(math.prod(tensor.shape) for tensor in tensors.values()) / 1e9:.1f}B"
    whole = begin + max(tensor.end for tensor in tensors.values())
    problem = None
    if length < whole:
        problem = f"is not complete: it has {length / 1e9:.2f} of {whole / 1e9:.2f} GB. Finish or repeat the download."
    elif (family, width) in _REFUSED:
        problem = f"is {_REFUSED[family, width]}. Choose {WORKS}."
    return TextEncoderFile(Path(path), family, size, _precision(tensors), problem, _head(Path(path), tensors), frozenset(tensors), length)


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    end: int


def _tensor(entry: Mapping) -> _Tensor:
    """ValueError, KeyError or TypeError: it describes no tensor."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, begin, end]
    whole = all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    if not whole or len(shape) > MOST_AXES or not re.fullmatch("[A-Z0-9_]{1,16}", dtype):
        raise ValueError("no tensor")
    return _Tensor(dtype, tuple(shape), end)


def _header(path: str, length: int) -> tuple[dict, int]:
    """Entries of the tensors, and where their numbers begin. ValueError: it is none."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(LARGEST_HEADER, length - 8):
            raise ValueError("no header")
        header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("no table")
    header.pop("__metadata__", None)
    if not header:
        raise ValueError("no tensors")
    return header, 8 + size


def _no_model(path: str, problem: str) -> TextEncoderFile:
    return TextEncoderFile(Path(path), "", "", "", problem, None)


_REFUSED = {
    ("Qwen2.5-VL", 2048): "Qwen2.5-VL 3B, which ComfyUI loads without its vision tower. Take it as a folder in models/LLM",
    ("Qwen3-VL", 2048): "Qwen3-VL 2B, which ComfyUI does not load. Take it as a folder in models/LLM",
    ("Qwen3-VL", 5120): "MiniMax H3's Qwen3-VL 32B, of which only the first 50 of 64 layers are there",
}


def _family(tensors: Mapping[str, _Tensor]) -> tuple[str, int]:
    """The family's name, empty if it is not known, and the width of the decoder, by the names and shapes that ComfyUI goes by, too."""
    norm = next((tensors[name] for name in _FIRST_NORMS if name in tensors), None)
    if norm is None or len(norm.shape) != 1:
        return "", 0
    if any(f"{prefix}deepstack_merger_list.0.norm.weight" in tensors for prefix in ("model.visual.", "visual.")):
        return "Qwen3-VL", norm.shape[0]
    if "visual.merger.ln_q.weight" in tensors and "model.layers.0.self_attn.k_proj.bias" in tensors:
        return "Qwen2.5-VL", norm.shape[0]
    return "", 0


def _in_model(name: str) -> str:
    """ComfyUI's name of a weight for its name in a published file."""
    for prefix, own in (("model.language_model.", "model."), ("model.visual.", "visual."), ("lm_head.", "model.lm_head.")):
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


_FIRST_NORMS = ("model.layers.0.input_layernorm.weight", "model.language_model.layers.0.input_layernorm.weight")


def _precision(tensors: Mapping[str, _Tensor]) -> str:
    """The number format of most of the weights."""
    numbers: dict[str, int] = {}
    for tensor in tensors.values():
        numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + math.prod(tensor.shape)
    most = max(numbers, key=numbers.get)
    return _FORMATS.get(most, most)


def _head(path: Path, tensors: Mapping[str, _Tensor]) -> FileHead | None:
    """The output matrix, where its numbers can be read without ComfyUI: as they are, or in fp8 with one scale."""
    name = next((name for name in _HEADS if name in tensors), None)
    if name is None or tensors[name].dtype not in ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"):
        return None
    scales = [other for other in (name.replace(".weight", ".scale_weight"), name + "_scale") if other in tensors]
    if scales and math.prod(tensors[scales[0]].shape) != 1:
        return None
    return FileHead(path, name, scales[0] if scales else None)


def load_text_encoder(name: str, progress: Progress):
    """The file of that name in models/text_encoders as a CLIP of ComfyUI. DecafError: it cannot be loaded."""
    import comfy.sd

    problem = text_encoder_problem(name)
    if problem:
        raise DecafError(problem)
    path = host.files(FOLDER, SUFFIXES)[name]
    log.info("%s: %s", name, read_text_encoder(path).told)
    progress(0, 1, f"Loading {name}")
    try:
        # Of all types this one gives the plain model of every file that is known here.
        clip = comfy.sd.load_clip(ckpt_paths=[str(path)], embedding_directory=None, clip_type=comfy.sd.CLIPType.QWEN_IMAGE)
    except host.Cancelled:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise DecafError(
            f"ComfyUI could not load {name} ({type(error).__name__}: {reason(error)}). Update ComfyUI, or download the file again."
        ) from error
    progress(1, 1, f"Loading {name}")
    return clip
