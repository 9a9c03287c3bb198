"""Random multimodal LLMs of a few hundred kilobytes, in the files and the format of the models that users download.

Everything is drawn from the seed: two calls write the same bytes. Both transformers 4.57 and 5.x load the folders without a network.

A module here for each family gives
    NAMES: of its models, each a `model_type` or a variant of one,
    HUB_NAMES, and where it has some, EXCHANGED: see `writing.write_weights`,
    write(folder, name, **shape): everything of a model folder but the weights; `shape` as in `write_files`,
    and where a version of transformers does not know the family, SINCE: the first one that does.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import transformers

from .writing import write_weights


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


_MODULES = [importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__) if entry.name != "writing"]
_OF = {
    name: module
    for module in _MODULES
    if _version(transformers.__version__) >= _version(getattr(module, "SINCE", "0.0"))
    for name in module.NAMES
}

FAMILIES = tuple(_OF)
"""Names of the models that can be made with this version of transformers."""


def make_mllm(folder, family: str, seed: int = 0, **shape) -> Path:
    """Writes a random model of `family` (one of FAMILIES) into `folder` and returns it. `shape`: arguments of `write_files`."""
    write_files(folder, family, **shape)
    write_weights(Path(folder), _OF[family].HUB_NAMES, seed, getattr(_OF[family], "EXCHANGED", None))
    return Path(folder)


def write_files(
    folder,
    family: str,
    *,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 64,
    text: dict | None = None,
    vision: dict | None = None,
    known: str = "",
    **more,
) -> None:
    """Everything of a model folder but the weights.

    `layers`, `heads`, `kv_heads`, `hidden`: of the text tower. `text`, `vision`: further entries of its configuration and of the vision tower's.
    `known`: text whose words become one token each, as most words are to a real tokenizer. `more`: what only one family has.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is none of {FAMILIES}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "hidden": hidden}
    _OF[family].write(folder, family, numbers=numbers, text=text or {}, vision=vision or {}, known=known, **more)
