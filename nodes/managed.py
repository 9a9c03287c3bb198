"""Models of decaf under ComfyUI's memory management."""

from __future__ import annotations

import logging
from functools import cache, partial

import comfy.model_management as mm
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP

from ..decaf.errors import DecafError
from ..decaf.mllm.base import MLLM
from ..decaf.report import Progress, silent
from .casting import FLOAT8, bytes_on, make_streamable, resident_bytes, settle, store_as_float8
from .kept import Kept

log = logging.getLogger(__name__)


class _Holder(torch.nn.Module):
    """A module with a `device` of its own, which the patcher sets: a transformers model only has a property without setter."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.device = None


@cache
def _holder_class(name: str) -> type[_Holder]:
    """A holder that goes by the name of the class it holds, which is what ComfyUI writes into its log."""
    return type(name, (_Holder,), {})


class Managed:
    """A model of decaf that ComfyUI loads, unloads and counts, whole or in part. `value`: the record around the module, which is `value.model`.
    `patcher`: ComfyUI's own, None for a model that must not be moved. `kept`: what a segmenter has made of its latest clip."""

    def __init__(self, value, *, float8: bool = False, progress: Progress = silent):
        """`float8`: keep the weights of a multimodal LLM's decoder in float8. DecafError: it cannot be kept so."""
        self.value = value
        self.patcher = None
        self.kept = Kept()
        self._told = None
        if is_fixed(value.model):
            if float8:
                raise DecafError(f"{value.name} is quantised already: choose auto as its dtype instead of fp8.")
            return
        make_streamable(value.model, value.streamable)
        if float8:
            check_float8()
            store_as_float8(value.engine.text_tower.modules(), progress)
        holder = _holder_class(type(value.model).__name__)(value.model)
        # Read when it is used: ComfyUI puts another class in its place where memory is dynamic.
        kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        self.patcher = kind(holder, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
        self.patcher.add_callback(CallbacksMP.ON_DETACH, partial(_leave, self.kept))

    def load(self, memory: int):
        """The record, ready to compute on the device with `memory` bytes free beside its weights; those that do not fit are streamed."""
        if self.patcher is None:
            mm.free_memory(memory + mm.extra_reserved_memory(), self.value.device)
            self._tell(f"on {self.value.device}, outside ComfyUI's memory management (quantised weights cannot be moved)")
            return self.value
        model, device = self.patcher.model, self.patcher.load_device
        mm.load_models_gpu([self.patcher], memory_required=memory + resident_bytes(model))
        settle(model, device)
        if isinstance(self.value, MLLM):
            self.value.engine.device = device
        self._account(model, device)
        return self.value

    def _account(self, model: torch.nn.Module, device: torch.device) -> None:
        """Says where the weights are, and counts those for ComfyUI that it has not put there."""
        there, whole = bytes_on(model, device)
        if self.patcher.is_dynamic():
            self._tell(f"{_size(whole)}, brought to {device} by ComfyUI's dynamic memory as they are needed")
        elif there < whole:
            model.model_loaded_weight_memory = there
            self._tell(f"{_size(there)} of {_size(whole)} on {device}, {_size(whole - there)} streamed from host memory")
        else:
            self._tell(f"all of {_size(whole)} on {device}")

    def _tell(self, where: str) -> None:
        """One line, when it is not what was said last."""
        gpu = _unused_gpu() if self.value.device.type == "cpu" else None
        if gpu:
            where += f". It computes on the CPU, though there is a GPU ({gpu}): ComfyUI was started so, or found no use for it"
        if where != self._told:
            log.log(logging.WARNING if gpu else logging.INFO, "%s: %s", self.value.name, where)
        self._told = where


def _leave(kept: Kept, patcher, unpatch_all: bool) -> None:
    """Takes along what dynamic memory leaves on the device when a model is unloaded; and what was kept of a clip, if that is in the memory
    which is to be freed."""
    if unpatch_all:
        if patcher.load_device.type == "cpu":
            kept.drop()
        settle(patcher.model, patcher.offload_device)


def is_fixed(model: torch.nn.Module) -> bool:
    """Whether the weights have to stay where transformers has put them: quantised ones, whose packed numbers know their device."""
    return bool(getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None))


def check_float8() -> None:
    """DecafError: weights in float8 cannot be brought to the device that computes."""
    device = mm.get_torch_device()
    if not mm.supports_cast(device, FLOAT8):
        raise DecafError(f"Weights cannot be kept in fp8 for {device}, which does not know that format. Choose auto as the dtype.")


def _unused_gpu() -> str | None:
    """A GPU that PyTorch can use here."""
    kinds = {"cuda": torch.cuda, "xpu": getattr(torch, "xpu", None), "mps": torch.backends.mps}
    return next((name for name, kind in kinds.items() if kind is not None and kind.is_available()), None)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.1f} MB"
