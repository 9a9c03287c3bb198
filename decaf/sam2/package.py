"""The one place that imports the `sam2` package.

Importing it initialises Hydra for the whole process, which breaks the next `hydra.initialize` of anybody else, and several ComfyUI packs
bring a top-level module of the same name. So it is imported here, late, with Hydra's state put back, and checked to be the one that was
meant.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from types import SimpleNamespace

from ..errors import DecafError

DISTRIBUTION = "rf-sam-2"
"""What pip installs the module `sam2` from: a wheel of the package's published code. Others that hold the same code, such as `sam2`, serve
as well, but are compiled on the user's machine, with a second torch."""

_PUBLIC = {
    "modeling.backbones.hieradet": ["Hiera"],
    "modeling.backbones.image_encoder": ["FpnNeck", "ImageEncoder"],
    "modeling.memory_attention": ["MemoryAttention", "MemoryAttentionLayer"],
    "modeling.memory_encoder": ["CXBlock", "Fuser", "MaskDownSampler", "MemoryEncoder"],
    "modeling.position_encoding": ["PositionEmbeddingSine"],
    "modeling.sam.mask_decoder": ["MaskDecoder"],
    "modeling.sam.transformer": ["RoPEAttention", "TwoWayTransformer"],
    "modeling.sam2_base": ["SAM2Base"],
    "modeling.sam2_utils": ["get_1d_sine_pe"],
}


_NEEDED = {"hydra": "hydra-core", "omegaconf": "omegaconf", "iopath": "iopath", "torchvision": "torchvision"}
"""Modules that the package imports, and what installs them."""


@functools.cache
def sam2_package() -> SimpleNamespace:
    """The classes and functions of `sam2` that this library uses, as attributes.

    Raises DecafError when the package is missing, is shadowed by another module of that name, or is older than SAM 2.1.
    """
    try:
        _import_keeping_hydra()
        found = {name: getattr(importlib.import_module(f"sam2.{module}"), name) for module, names in _PUBLIC.items() for name in names}
        if "use_signed_tpos_enc_to_obj_ptrs" not in inspect.signature(found["SAM2Base"].__init__).parameters:
            raise ImportError("it is older than SAM 2.1")
    except Exception as error:  # a module that is another pack's may raise anything
        raise _unusable(error) from error
    return SimpleNamespace(**found)


def _import_keeping_hydra() -> None:
    if "sam2" in sys.modules:
        return
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton

    if GlobalHydra.instance().is_initialized():
        importlib.import_module("sam2")  # it leaves an initialised Hydra alone
        return
    before = Singleton.get_state()
    try:
        importlib.import_module("sam2")
    finally:
        Singleton.set_state(before)


def _unusable(error: Exception) -> DecafError:
    """What is wrong with the module `sam2`, and what to do, after `error` in importing it."""
    lacking = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
    if lacking in _NEEDED:
        return DecafError(f"The Python package sam2 needs {lacking}, which is missing. {_install(_NEEDED[lacking])}")
    module = sys.modules.get("sam2")
    spec = importlib.util.find_spec("sam2") if module is None else module.__spec__
    if spec is None:
        return DecafError(f"The Python package sam2, which SAM 2 runs on, is missing. {_install(DISTRIBUTION)}")
    place = spec.origin or ", ".join(spec.submodule_search_locations or [])
    return DecafError(
        f"The Python module sam2 at {place} is not a working sam2 package of version 1.1 or later ({error}). If another pack or folder on "
        f"Python's path shadows the package, disable or rename that one. If none does: {_install(DISTRIBUTION)}"
    )


def _install(distribution: str) -> str:
    """The sentence that says how to install `distribution` into this Python, also where pip believes that it is there already: a package that
    shares the folder `sam2` takes its files along when it is uninstalled."""
    try:
        importlib.metadata.version(distribution)
        again = "--force-reinstall --no-deps "
    except importlib.metadata.PackageNotFoundError:
        again = ""
    return f'Install it with "{sys.executable}" -m pip install {again}{distribution} and start the program again.'
