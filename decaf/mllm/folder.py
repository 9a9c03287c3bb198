"""What lies in a model folder, read without trusting it: nothing in it is run, and no number in it is believed before it is compared.

Everything here works on files alone; no model is built.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ..errors import DecafError, shown

LARGEST_CONFIG = 8 << 20
"""Bytes of a config.json that is read. Real ones have a few kilobytes."""

LARGEST_INDEX = 64 << 20
"""Bytes of an index of weights that is read. Real ones have less than a megabyte."""

MOST_LAYERS = 512
"""Layers of one tower. The largest published models have about 130."""

DEEPEST = 16
"""Levels of a configuration. Published ones have three or four."""

LARGEST_WIDTH = 1 << 20
"""Largest single number that a configuration may give for a width, a head or a picture's side; vocabularies and positions are exempt."""

_ATTENTION_CHOICE = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")
_DROPPED = {
    # Which code is imported; no code of the folder is.
    "auto_map",
    "custom_pipelines",
    # Which other model a tower would be, fetched by its name.
    "backbone",
    "backbone_config",
    "backbone_kwargs",
    "use_pretrained_backbone",
    "use_timm_backbone",
    # What a pass hands out: hidden states and attention of every layer would fill the memory.
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    # Kernels from a hub in the place of the library's own layers.
    "use_kernels",
    "kernel_config",
}


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> object:
    """The content of a JSON file. ValueError for anything else: no regular file, too large, no UTF-8, no JSON, nested too deeply."""
    try:
        if not path.is_file():  # a pipe or a device would be read for ever
            raise ValueError("it is not a regular file")
        if path.stat().st_size > largest:
            raise ValueError(f"it has {path.stat().st_size:,} bytes; at most {largest:,} are read")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_config(folder: Path) -> dict:
    """config.json without what would choose the code that runs: see `clean_config`. DecafError: there is none, or it is damaged."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise DecafError(f"There is no model folder {folder}. Put the model's files there, or choose another folder.")
    if not path.exists():
        raise DecafError(f"{folder} holds no config.json, so it is not a model folder. Choose the folder that holds config.json.")
    try:
        config = read_json(path)
        if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
            raise ValueError("it names no model_type")
        return clean_config(config)
    except (ValueError, RecursionError) as error:
        raise DecafError(f"{path} is damaged ({error}). Download the model again.") from error


def clean_config(config: Mapping) -> dict:
    """`config`, and every configuration inside it, without the entries that would override how the model is loaded and run."""

    def clean(value):
        if isinstance(value, Mapping):
            return {
                name: clean(inner)
                for name, inner in value.items()
                if name not in _DROPPED and not _ATTENTION_CHOICE.fullmatch(str(name))
            }
        return [clean(inner) for inner in value] if isinstance(value, list) else value

    return clean(config)


def system_prompt(config: dict, where: Path) -> str | None:
    """Takes the entry "decaf": {"system_prompt": ...} out of `config`: what a model that was trained otherwise than its family is told before
    the chat, empty for nothing. None where there is no such entry. DecafError if it is not a short text."""
    entry = config.pop("decaf", None)
    if entry is None:
        return None
    text = entry.get("system_prompt") if isinstance(entry, dict) else None
    if not isinstance(text, str) or len(text) > 2000:
        raise DecafError(f'{where / "config.json"} has an entry "decaf" without a system_prompt of up to 2,000 characters. Correct or remove it.')
    return text


def check_sizes(config: Mapping, where: Path) -> None:
    """Refuses numbers that no model has, before anything is built from them. DecafError names the entry."""
    exempt = re.compile(r".*(token_id|vocab_size|position|theta|window|length|pixels|seed|bytes|size_in).*")

    def check(value, path: tuple[str, ...]) -> None:
        if len(path) > DEEPEST:
            raise DecafError(f"{where / 'config.json'} is nested more than {DEEPEST} levels deep, which no model's is. Download the model again.")
        if isinstance(value, Mapping):
            for name, inner in value.items():
                check(inner, (*path, str(name)))
        elif isinstance(value, list):
            for inner in value:
                check(inner, (*path, ""))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            name = next((part for part in reversed(path) if part), "")
            layers = re.fullmatch(r"depth|n_layers?|num_(hidden_)?layers|max_window_layers", name)
            most = MOST_LAYERS if layers else LARGEST_WIDTH
            if not abs(value) < float("inf") or (abs(value) > most and not exempt.fullmatch(name)):
                raise DecafError(
                    f"{where / 'config.json'} gives {shown(_digits(value), 30)} for {shown('.'.join(filter(None, path)), 80)}, which no model has "
                    f"(at most {most:,}). Download the model again."
                )

    check(config, ())


def _digits(number: int | float) -> str:
    """The number in decimals, or how large it is: Python refuses to write out very long ones."""
    return str(number) if isinstance(number, float) or number.bit_length() < 1000 else f"a number of {number.bit_length():,} bits"


def check_tokenizer_files(folder: Path) -> None:
    """Refuses tokenizer files that are no model's, before a library reads them: too large, or with a normaliser that rewrites text, which a
    few rules can make gigabytes of. DecafError names the file."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "vocab.json", "merges.txt"):
        path = folder / name
        if path.exists() and (not path.is_file() or path.stat().st_size > LARGEST_INDEX):
            raise DecafError(f"{path} is no file, or has more than {LARGEST_INDEX:,} bytes, which no model's has. Download the model again.")
    try:
        normaliser = read_json(folder / "tokenizer.json", LARGEST_INDEX).get("normalizer") if (folder / "tokenizer.json").exists() else None
        steps = normaliser.get("normalizers", [normaliser]) if isinstance(normaliser, dict) else []
        kinds = {step["type"] for step in steps}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise DecafError(f"{folder / 'tokenizer.json'} is damaged ({type(error).__name__}: {error}). Download the model again.") from error
    if not kinds <= {"NFC", "NFD", "NFKC", "NFKD"}:
        raise DecafError(
            f"{folder / 'tokenizer.json'} rewrites text before it is read ({shown(', '.join(sorted(map(str, kinds))))}), which the tokenizers of "
            "supported models do not. Download the model again."
        )


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights by their names in the files, from the headers alone. DecafError: a file is damaged or only half there.

    Opening a safetensors file compares its length with its header, so that a half-copied file is told by name before memory is taken.
    """
    from safetensors import SafetensorError, safe_open

    shapes = {}
    for file in weight_files(folder):
        try:
            if not file.is_file():
                raise OSError("it is not a regular file")
            with safe_open(file, "pt") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError) as error:
            raise DecafError(f"{file} is damaged or only half downloaded ({error}). Download it again.") from error
    return shapes


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The number format of most weights in a model folder, from the headers alone; None where that cannot be told."""
    from safetensors import SafetensorError, safe_open

    names, bytes_of = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}, Counter()
    try:
        for file in weight_files(folder):
            if not file.is_file():
                return None
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    part = opened.get_slice(name)
                    bytes_of[part.get_dtype()] += math.prod(part.get_shape())
    except (SafetensorError, OSError, ValueError, RecursionError):
        return None
    return names.get(max(bytes_of, key=bytes_of.get, default=None))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the model's weights: those of the index, or the single one."""
    if (folder / "model.safetensors.index.json").exists():
        return [folder / name for name in sorted(set(_index(folder).values()))]
    return [folder / "model.safetensors"]


def _index(folder: Path) -> dict[str, str]:
    """Names of weights -> names of files in the folder. ValueError if the index is damaged or names a file elsewhere."""
    index = read_json(folder / "model.safetensors.index.json", LARGEST_INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError("it has no weight_map")
    for name in files.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\\" in name or "\0" in name:
            raise ValueError(f"it names the file {name!r:.80}, which is not a safetensors file of this folder")
    return files


def missing_files(folder: Path) -> list[str]:
    """Names of files that a complete model folder would have and this one has not."""
    missing = [name for name in ("config.json",) if not (folder / name).is_file()]
    if (folder / "model.safetensors.index.json").exists():
        try:
            missing += sorted(file.name for file in weight_files(folder) if not file.exists())
        except (ValueError, RecursionError):  # damaged counts as missing
            missing.append("model.safetensors.index.json")
    elif not (folder / "model.safetensors").exists():
        missing.append("model.safetensors")
    if not _any_file(folder, ("tokenizer.json", "vocab.json", "tokenizer.model")):
        missing.append("tokenizer.json")
    return missing


def _any_file(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def picture_statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, deviation) of the three colours, 0..1, by which the model's pictures are normalised; None where the folder does not say.

    These six numbers are all that is taken from the folder's description of its picture processor. DecafError if they are no such numbers.
    """
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return None
    try:
        given = read_json(path)
        if not isinstance(given, dict):
            raise ValueError("it is not a JSON object")
        if "image_mean" not in given and "image_std" not in given:
            return None
        numbers = []
        for name, low in (("image_mean", 0.0), ("image_std", 1e-3)):
            values = given.get(name)
            fine = isinstance(values, list) and len(values) == 3 and all(isinstance(value, int | float) and low <= value <= 1 for value in values)
            if not fine:
                raise ValueError(f"its {name} is not three numbers from {low:g} to 1")
            numbers.append(tuple(float(value) for value in values))
        return numbers[0], numbers[1]
    except ValueError as error:
        raise DecafError(f"{path} is damaged ({error}). Download the model again, or remove that file.") from error


def processor_classes(folder: Path) -> set[str]:
    """Names of the classes that the folder's files give for what prepares text, pictures and videos. They are compared, never imported."""
    found = set()
    for file in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer_config.json"):
        try:
            given = read_json(folder / file, LARGEST_INDEX)
        except ValueError:  # not there, or damaged: whoever needs it says so
            continue
        if isinstance(given, dict):
            found |= {str(given.get(name)) for name in ("processor_class", "image_processor_type", "video_processor_type")}
    return found


def check_picture_files(folder: Path, expected: Mapping[str, int]) -> None:
    """Refuses descriptions of a picture processor that were made for another model: their numbers by which pictures are cut are not those of
    config.json, so the colours that are read there are another model's as well. `expected`: numbers by their names in these files; `side`:
    of square pictures. DecafError names file and numbers."""
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        try:
            given = read_json(folder / file)
        except ValueError:  # not there, or damaged: `picture_statistics` says so
            continue
        if not isinstance(given, dict):
            continue
        size = given.get("size")
        sides = {size.get(name) for name in ("height", "width")} if isinstance(size, dict) else set()
        for name, number in expected.items():
            found = sides - {None} if name == "side" else {given.get(name)} - {None}
            if found - {number}:
                what = "pictures of" if name == "side" else f"a {name} of"
                raise DecafError(
                    f"{folder / file} is that of another model: it gives {what} {shown(str(sorted(found, key=str)[0]), 30)}, and config.json "
                    f"{number}. Download the model again."
                )
