"""The one place that imports the `sam2` package.

Importing it initialises Hydra for the whole process, which breaks the next `hydra.initialize` of anybody else, and several ComfyUI packs
bring a top-level module of the same name. So it is imported here, late, with Hydra's state put back, and checked to be the one that was
meant.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from types import SimpleNamespace

from ..errors import DecafError

_PUBLIC = {
    "modeling.backbones.hieradet": ["Hiera"],
    "modeling.backbones.image_encoder": ["FpnNeck", "ImageEncoder"],
    "modeling.memory_attention": ["MemoryAttention", "MemoryAttentionLayer"],
    "modeling.memory_encoder": ["CXBlock", "Fuser", "MaskDownSampler", "MemoryEncoder"],
    "modeling.position_encoding": ["PositionEmbeddingSine", "apply_rotary_enc"],
    "modeling.sam.mask_decoder": ["MaskDecoder"],
    "modeling.sam.transformer": ["RoPEAttention", "TwoWayTransformer"],
    "modeling.sam2_base": ["SAM2Base"],
    "modeling.sam2_utils": ["get_1d_sine_pe"],
}


@functools.cache
def sam2_package() -> SimpleNamespace:
    """The classes and functions of `sam2` that this library uses, as attributes.

    Raises DecafError when the package is missing, is shadowed by another module of that name, or is older than SAM 2.1.
    """
    try:
        _import_keeping_hydra()
        found = {name: getattr(importlib.import_module(f"sam2.{module}"), name) for module, names in _PUBLIC.items() for name in names}
    except (ImportError, AttributeError, RuntimeError) as error:
        raise _unusable(str(error)) from error
    if "use_signed_tpos_enc_to_obj_ptrs" not in inspect.signature(found["SAM2Base"].__init__).parameters:
        raise _unusable("it is older than SAM 2.1")
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


def _unusable(why: str) -> DecafError:
    spec = sys.modules["sam2"].__spec__ if "sam2" in sys.modules else importlib.util.find_spec("sam2")
    if spec is None:
        return DecafError("The Python package sam2 is missing. Install it: pip install sam2")
    place = spec.origin or ", ".join(spec.submodule_search_locations or [])
    return DecafError(
        f"The Python module sam2 at {place} is not a working sam2 package of version 1.1 or later ({why}). If another pack or folder on "
        "Python's path shadows the package, disable or rename that one; if not, install it again: pip install --upgrade sam2"
    )
