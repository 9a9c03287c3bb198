"""Layers of models that ComfyUI did not build, made fit for its partial loading: what does not fit on the device is streamed from RAM.

No code of a model is touched. Its modules become one of three kinds:

- **Casting layers.** A plain `torch.nn` layer is given the class of the same name in `comfy.ops`, which copies its weights to the device of
  its input when it computes. ComfyUI decides which of them wait in RAM.
- **Streamed parameters.** A large parameter of a module that PyTorch does not know, such as the fused experts of a mixture, moves into a
  casting child; hooks bring it to the device for the module's forward pass.
- **Residents**: norms, tables of positions, buffers, other loose parameters. They are small, and `settle` puts them on the device whenever
  ComfyUI has loaded the model; it leaves them behind itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import contextmanager

import comfy.ops
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..decaf.report import Progress, silent

LARGE = 16 << 20
"""Bytes of a loose parameter from which on it is streamed."""

FLOAT8 = torch.float8_e4m3fn
_LARGEST_FLOAT8 = 448.0


class _Linear(comfy.ops.manual_cast.Linear):
    """Brings its weights to the device as they are: ComfyUI's would cast them to the input's format, which under autocast is not what they
    are computed in."""

    def forward_comfy_cast_weights(self, input):
        with _cast(self, input.device) as (weight, bias):
            return F.linear(input, weight, bias)


class _Table(comfy.ops.manual_cast.Embedding):
    """Looks words up where the table lies, and brings the rows: a table of a gigabyte is not copied for a few hundred of them."""

    def forward_comfy_cast_weights(self, input, out_dtype=None):
        return F.embedding(input.to(self.weight.device), self.weight, self.padding_idx).to(input.device, out_dtype)


class _Float8Linear(_Linear):
    """Weights in float8 with one scale, a power of two: multiplying the input by it instead of the weights gives the very same numbers."""

    scale = 1.0

    def forward_comfy_cast_weights(self, input):
        with _cast(self, input.device, input.dtype) as (weight, bias):
            return F.linear(input * self.scale, weight, bias)


class _Parameter(nn.Module, comfy.ops.CastWeightBiasOp):
    """A parameter of another module, as ComfyUI moves it. `dtype`: what it is computed in."""

    comfy_cast_weights = True
    scale = 1.0

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight, self.bias, self.dtype = weight, None, weight.dtype
        self.weight_function, self.bias_function = [], []


class _TiedHead(nn.Module):
    """An output layer without weights of its own: it has those of the table of embeddings, which is moved and counted once."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self._table = (table,)  # in a tuple it is no child of this module

    def forward(self, hidden: Tensor) -> Tensor:
        with _cast(self._table[0], hidden.device, hidden.dtype) as (weight, _):
            return F.linear(hidden, weight)


@contextmanager
def _cast(layer: nn.Module, device: torch.device, dtype: torch.dtype | None = None):
    """(weight, bias) of a casting layer on `device`, in `dtype` or as they are, for as long as the block runs."""
    dtypes = {"dtype": dtype or layer.weight.dtype, "bias_dtype": dtype or (None if layer.bias is None else layer.bias.dtype)}
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, **dtypes, device=device, offloadable=True)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)


_LAYERS = {
    nn.Linear: _Linear,
    nn.Embedding: _Table,
    **{
        getattr(nn, name): getattr(comfy.ops.manual_cast, name)
        for name in ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d")
    },
}
"""Norms are left out: they are too small to be worth a copy."""


def make_streamable(root: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Turns `modules`, which are `root`'s and whose weights nothing reads but their own forward pass, into casting layers and modules of
    streamed parameters, once and for all."""
    chosen = list(modules)
    tables = {id(module.weight): module for module in chosen if type(module) is nn.Embedding}
    parents = {id(child): (parent, name) for parent in root.modules() for name, child in parent.named_children()}
    for module in chosen:
        kind = type(module)
        if kind is nn.Linear and module.bias is None and id(module.weight) in tables:
            parent, name = parents[id(module)]
            setattr(parent, name, _TiedHead(tables[id(module.weight)]))
        elif kind in _LAYERS:
            module.__class__ = _LAYERS[kind]
            if kind is nn.Embedding:
                module.bias = None  # ComfyUI asks every layer for one
        else:
            _stream_parameters(module, [name for name, one in module._parameters.items() if one is not None and one.nbytes >= LARGE])


def _stream_parameters(module: nn.Module, names: list[str]) -> None:
    if not names:
        return
    held = {name: _Parameter(module._parameters.pop(name)) for name in names}
    for name, one in held.items():
        module.add_module(f"streamed_{name}", one)
    open_casts = []

    def fetch(module, args, kwargs):
        device = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)).device
        for name, one in held.items():
            cast = _cast(one, device, one.dtype)
            weight, _ = cast.__enter__()
            open_casts.append(cast)
            module.__dict__[name] = weight if one.scale == 1 else weight * one.scale

    def release(module, args, output):
        for name in held:
            module.__dict__.pop(name, None)
        while open_casts:
            open_casts.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(fetch, with_kwargs=True)
    module.register_forward_hook(release, always_call=True)  # also when the pass fails


def store_as_float8(modules: Iterable[nn.Module], progress: Progress = silent) -> None:
    """Keeps the weights of casting Linear layers and streamed parameters among `modules` in float8: one byte a number, and a scale for
    each. They compute in the format of their input as before. Weights already converted are left as they are."""
    modules = list(modules)
    for number, module in enumerate(modules):
        progress(number, len(modules), "Converting to fp8")
        linear = type(module) is _Linear
        if not (linear or type(module) is _Parameter) or module.weight.dtype == FLOAT8:
            continue
        module.scale, stored = _as_float8(module.weight)
        module.weight = nn.Parameter(stored, requires_grad=False)
        if linear:
            module.__class__ = _Float8Linear


def _as_float8(weight: Tensor) -> tuple[float, Tensor]:
    """The scale, and the weights divided by it. A power of two, so that no number is rounded twice."""
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    scale = 2.0 ** math.ceil(math.log2(largest / _LARGEST_FLOAT8)) if 0 < largest < math.inf else 1.0
    return scale, (weight / scale).to(FLOAT8)


def is_casting(module: nn.Module) -> bool:
    """Whether its weights are brought to the device when it computes."""
    return hasattr(module, "comfy_cast_weights")


def resident_bytes(root: nn.Module) -> int:
    """Bytes of everything that has to be on the device while the model computes."""
    return sum(one.nbytes for one in _residents(root))


def settle(root: nn.Module, device: torch.device) -> None:
    """Puts the residents on the device. After ComfyUI has loaded `root`, which by itself leaves some of them where they were."""
    for module in root.modules():
        if not is_casting(module):
            module._apply(lambda one: one.to(device), recurse=False)


def bytes_on(root: nn.Module, device: torch.device) -> tuple[int, int]:
    """Bytes of weights and buffers on `device`, and of all of them."""
    every = {id(one): one for one in [*root.parameters(), *root.buffers()]}.values()
    return sum(one.nbytes for one in every if _same(one.device, device)), sum(one.nbytes for one in every)


def _residents(root: nn.Module) -> list[Tensor]:
    plain = [module for module in root.modules() if not is_casting(module)]
    return [one for module in plain for one in (*module._parameters.values(), *module._buffers.values()) if one is not None]


def _same(one: torch.device, other: torch.device) -> bool:
    """cuda is cuda:0, or whichever is current."""
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)
