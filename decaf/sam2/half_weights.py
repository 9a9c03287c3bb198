"""Weights in the half precision that SAM 2 computes in, made once for a clip and not once for every use.

Autocast casts float32 weights again for every frame: it only remembers casts of weights that are trained. Nearly all weights are those of the
linear layers in the image encoder's blocks, which nothing but matrix products under autocast ever reads, so that no number changes. On a CPU in
bfloat16 the encoder of SAM 2.1 small at 256 px takes 18 % less time so. That of SAM 2.1 large would read and write 1.3 GB a frame for casts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..devices import is_out_of_memory


@contextmanager
def half_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it, the linear layers of `model`'s image encoder hold `dtype`, and afterwards what they held. In float32, or where there is no
    memory for the second set, nothing is done; nor to layers whose weights wait elsewhere, which whoever streams them knows by address."""
    layers = [] if dtype == torch.float32 else [layer for layer in _layers(model) if layer.weight.device == model.device]
    own = {(layer, name): layer._parameters[name] for layer in layers for name in ("weight", "bias")}
    try:
        try:
            for (layer, name), value in own.items():
                layer._parameters[name] = nn.Parameter(value.to(dtype), requires_grad=False)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _put_back(own)
        yield
    finally:
        _put_back(own)


def half_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that the second set takes."""
    if dtype == torch.float32:
        return 0
    return dtype.itemsize * sum(value.numel() for layer in _layers(model) for value in layer.parameters())


def _layers(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.image_encoder.trunk.blocks.modules() if isinstance(layer, nn.Linear) and layer.bias is not None]


def _put_back(own: dict[tuple[nn.Linear, str], nn.Parameter]) -> None:
    for (layer, name), value in own.items():
        layer._parameters[name] = value
