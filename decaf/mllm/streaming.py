"""Weights that wait in host memory and come to the device layer by layer while a model runs.

The layers of both towers and the head lie packed in host memory, one block of bytes each, pinned where there is a CUDA device. On the device is
one working area that holds two layers: one that computes, and one that is being copied meanwhile, on a stream of its own. Layers for which there
is room stay on the device. The table of embeddings never leaves the host: its few rows are looked up there.

Only the order of copies differs from a model that lies on the device whole; every product is made of the same numbers in the same way.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..devices import is_out_of_memory
from ..errors import DecafError

log = logging.getLogger(__name__)

HOST_MEMORY = ("cpu", "mps")
"""Types of devices whose memory is the host's: streaming would take more of it, not less."""

_ALIGNMENT = 256
"""Bytes; a tensor of a packed layer begins at a multiple, as those that PyTorch allocates on a GPU do."""


@dataclass(eq=False)
class Layer:
    """What is copied at once. `tensors`: parameters and buffers, each at its place in bytes in `packed`, (bytes,) uint8 in host memory.
    `resident`: its copy that stays on the device, if there is one."""

    name: str
    module: nn.Module
    tensors: list[tuple[Tensor, int]] = field(default_factory=list)
    packed: Tensor | None = None
    resident: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return len(self.packed)

    def point_at(self, memory: Tensor) -> None:
        """Makes `memory`, bytes on any device, what the layer computes with."""
        for tensor, place in self.tensors:
            tensor.data = memory[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


class Streaming:
    """Streams the weights of `model` to `device`. Made once; the model must lie in host memory, and must not be moved by anybody else after it.

    Everything that is no layer, such as norms and what cuts the patches, is moved to the device and stays there. A pass that is cancelled, or that
    runs out of memory, leaves the model as usable as before: a layer's weights lie in host memory all the time.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device = device
        self._cuda = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if self._cuda else None
        self._area: Tensor | None = None
        self._slots: list[Layer | None] = [None, None]
        self._ready: list[torch.cuda.Event | None] = [None, None]
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        self.layers = [
            Layer(f"{name}.{number}", block)
            for name, group in model.named_modules()
            if isinstance(group, nn.ModuleList) and not _inside_a_layer(name, model)
            for number, block in enumerate(group)
        ]
        if head is not None:
            self.layers.append(Layer("head", head))
        with torch.inference_mode(False):
            for layer in self.layers:
                self._pack(layer)
            if head is not None and head.weight is embeddings.weight:
                # The head's weight comes and goes; the table is looked up where it lies in host memory.
                embeddings.weight = nn.Parameter(head.weight.data, requires_grad=False)
            waiting = {id(tensor) for layer in self.layers for tensor, _ in layer.tensors} | {id(embeddings.weight)}
            staying = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in waiting]
            for tensor in staying:
                tensor.data = tensor.data.to(device)
        self.layers = [layer for layer in self.layers if layer.tensors]
        self._rest = sum(tensor.nbytes for tensor in staying)
        # Which layer followed which when the model ran last: at first, in the order in which they are listed.
        self._following = dict(zip(self.layers, [*self.layers[1:], self.layers[0]], strict=True))
        self._last: Layer | None = None
        for layer in self.layers:
            layer.module.register_forward_pre_hook(lambda *_, layer=layer: self._enter(layer))
        embeddings.register_forward_pre_hook(lambda module, given: tuple(ids.cpu() for ids in given))
        embeddings.register_forward_hook(lambda module, given, found: found.to(self.device))

    @property
    def least_bytes(self) -> int:
        """Of the device, without which nothing can be computed."""
        return self._rest + self._area_bytes

    @property
    def most_bytes(self) -> int:
        """Of the device, with which every layer stays there."""
        return self._rest + sum(layer.nbytes for layer in self.layers)

    @property
    def device_bytes(self) -> int:
        """Held on the device now."""
        area = 0 if self._area is None else len(self._area)
        return self._rest + area + sum(layer.nbytes for layer in self.layers if layer.resident is not None)

    @property
    def on_device(self) -> list[str]:
        """Names of the layers that are there now, for good or in the working area."""
        return [layer.name for layer in self.layers if layer.resident is not None or layer in self._slots]

    def keep(self, budget_bytes: int) -> None:
        """Keeps as many layers on the device as fit the budget beside all that is needed, the first ones first; fewer where the device has not got
        as much memory left."""
        left = budget_bytes - self._rest
        if self.most_bytes > budget_bytes:
            left -= self._area_bytes
        staying = []
        for layer in self.layers:
            if layer.nbytes <= left:
                left -= layer.nbytes
                staying.append(layer)
        with torch.inference_mode(False):
            for layer in self.layers:
                if layer.resident is not None and layer not in staying:
                    layer.resident = None
                    layer.point_at(layer.packed)
            if len(staying) == len(self.layers):
                self._let_go()
            else:
                self._make_area()
            for layer in staying:
                if layer.resident is None:
                    try:
                        resident = torch.empty_like(layer.packed, device=self.device)
                    except Exception as error:
                        if not is_out_of_memory(error):
                            raise
                        log.warning("%s has less memory than the budget says; %s and what follows waits in host memory.", self.device, layer.name)
                        break
                    self._leave(layer)
                    layer.resident = resident.copy_(layer.packed)
                    layer.point_at(layer.resident)

    def _make_area(self) -> None:
        if self._area is None:
            self._area = torch.empty(self._area_bytes, dtype=torch.uint8, device=self.device)

    def release(self) -> None:
        """Takes all layers off the device."""
        with torch.inference_mode(False):
            for layer in self.layers:
                layer.resident = None
            self._let_go()
            for layer in self.layers:
                layer.point_at(layer.packed)

    @property
    def _slot_bytes(self) -> int:
        """Of the largest layer, the head apart: it alone is larger than others, and takes the whole area where it is."""
        return max(layer.nbytes for layer in self.layers if layer.name != "head")

    @property
    def _area_bytes(self) -> int:
        return max(2 * self._slot_bytes, *(layer.nbytes for layer in self.layers))

    def _pack(self, layer: Layer) -> None:
        """Moves the tensors of a layer into one block of host memory."""
        found = {id(tensor): tensor for tensor in (*layer.module.parameters(), *layer.module.buffers())}
        place = 0
        for tensor in found.values():
            layer.tensors.append((tensor, place))
            place += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        try:
            layer.packed = torch.empty(place, dtype=torch.uint8, pin_memory=self._cuda)
        except RuntimeError as error:  # the system allows only so much that is pinned
            log.info("The weights of %s lie in memory that is not pinned, so copies take longer (%s).", layer.name, error)
            layer.packed = torch.empty(place, dtype=torch.uint8)
        for tensor, begin in layer.tensors:
            layer.packed[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor.data)
        layer.point_at(layer.packed)

    def _enter(self, layer: Layer) -> None:
        """Called before a layer computes: its weights must be there, and those of the next one are sent for."""
        if self._last is not None:
            self._following[self._last] = layer
        self._last = layer
        if layer.resident is None:
            with torch.inference_mode(False):
                self._make_area()
                if layer not in self._slots:
                    self._copy(layer, beside=None)
                place = self._slots.index(layer)
            if self._cuda:
                torch.cuda.current_stream(self.device).wait_event(self._ready[place])
        coming = self._following[layer]
        if coming is not layer and coming.resident is None and coming not in self._slots and self._area is not None:
            if layer.nbytes <= self._slot_bytes and coming.nbytes <= self._slot_bytes:
                with torch.inference_mode(False):
                    self._copy(coming, beside=layer)

    def _copy(self, layer: Layer, beside: Layer | None) -> None:
        """Begins to copy a layer into the working area, `beside` the one that is going to compute."""
        place = 1 if beside is not None and self._slots[0] is beside else 0
        # A layer that is larger than its half covers both.
        whole = layer.nbytes > self._slot_bytes
        for number, held in enumerate(self._slots):
            if held is not None and (whole or number == place or held.nbytes > self._slot_bytes):
                self._leave(held)
        begin = 0 if whole else place * self._slot_bytes
        memory = self._area[begin : begin + layer.nbytes]
        with self._copying():
            memory.copy_(layer.packed, non_blocking=self._cuda)
            if self._cuda:
                self._ready[place] = torch.cuda.Event()
                self._ready[place].record()
        self._slots[place] = layer
        layer.point_at(memory)

    def _copying(self) -> AbstractContextManager:
        """The stream of copies, behind all that was to be computed with what is overwritten."""
        if not self._cuda:
            return nullcontext()
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._copies)

    def _leave(self, layer: Layer) -> None:
        """The layer is no longer in the working area."""
        if layer in self._slots:
            self._slots[self._slots.index(layer)] = None
            layer.point_at(layer.packed)

    def _let_go(self) -> None:
        for layer in [one for one in self._slots if one is not None]:
            self._leave(layer)
        if self._cuda and self._area is not None:
            self._copies.synchronize()
        self._area = None


def _inside_a_layer(name: str, model: nn.Module) -> bool:
    """Whether a list of modules belongs to a layer of another list, as experts do."""
    parents = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parents[:n])), nn.ModuleList) for n in range(1, len(parents)))


def check_budget(memory_budget: int | None, device: torch.device) -> None:
    """DecafError for a budget that cannot be kept to."""
    if memory_budget is None:
        return
    if device.type in HOST_MEMORY:
        raise DecafError(f"A memory budget is for a GPU with memory of its own, and the model is to run on {device}. Leave it out, or choose a GPU.")
    if not isinstance(memory_budget, int | float) or not memory_budget > 0:  # never true of NaN
        raise DecafError(f"A memory budget of {str(memory_budget):.40} bytes was given; give a number above 0, or leave it out.")
