"""Modules of the pack's `nodes` folder that need nothing of ComfyUI, imported the way ComfyUI has them: below a package of the pack's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parents[2]
_PACK = "pack_without_comfyui"


def pack_module(name: str) -> ModuleType:
    """`nodes/NAME.py`. The pack's `__init__` files, which make the nodes, are not run."""
    for package, folder in ((_PACK, _ROOT), (f"{_PACK}.nodes", _ROOT / "nodes")):
        if package not in sys.modules:
            module = ModuleType(package)
            module.__path__ = [str(folder)]
            sys.modules[package] = module
    return importlib.import_module(f"{_PACK}.nodes.{name}")
