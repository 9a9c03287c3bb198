"""Half precision: the image encoder's weights are cast once for a clip, and nothing but time changes."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from decaf.sam2 import load_sam2
from decaf.sam2.fast_steps import FastSteps
from decaf.sam2.half_weights import half_bytes, half_weights
from decaf.sam2.package_steps import PackageSteps


@pytest.fixture(scope="module")
def sam2(sam2_file):
    return load_sam2(sam2_file, dtype=torch.bfloat16)


@pytest.fixture
def picture(sam2):
    return torch.randint(0, 256, (sam2.image_size, sam2.image_size, 3), dtype=torch.uint8)


class Casts(TorchDispatchMode):
    """Shapes of what is cast to half precision."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.bfloat16 and args[0].dtype == torch.float32 and made.shape == args[0].shape:
            self.shapes.append(made.shape)
        return made


@pytest.mark.parametrize("steps", [PackageSteps, FastSteps])
def test_the_same_bits_without_casting_again(sam2, picture, steps):
    layers = [layer for layer in sam2.model.image_encoder.trunk.blocks.modules() if isinstance(layer, nn.Linear)]
    shapes = {layer.weight.shape for layer in layers}
    one, casts = steps(sam2.model, sam2.dtype), {}
    expected, found = [], []
    for held, levels in ((torch.float32, expected), (torch.bfloat16, found)):
        with half_weights(sam2.model, held):
            one.encode(picture)
            with Casts() as casts[held]:
                levels += one.encode(picture).levels
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    counted = {held: sum(shape in shapes for shape in those.shapes) for held, those in casts.items()}
    assert counted[torch.float32] - counted[torch.bfloat16] == len(layers) > 7  # others, of the neck, may have the same shape


def test_a_segmenter_holds_them_for_its_time(sam2):
    weights = list(sam2.model.parameters())
    layer = sam2.model.image_encoder.trunk.blocks[0].attn.qkv
    with pytest.raises(KeyError), sam2.segmenter():
        assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
        half = [one for one in sam2.model.parameters() if one.dtype == torch.bfloat16]
        assert sum(one.nbytes for one in half) == half_bytes(sam2.model, torch.bfloat16) > 0
        raise KeyError
    assert all(one is other for one, other in zip(sam2.model.parameters(), weights, strict=True))
    full = dataclasses.replace(sam2, dtype=torch.float32)
    with full.segmenter():
        assert all(one is other for one, other in zip(sam2.model.parameters(), weights, strict=True))
    assert sam2.working_bytes(1, 1) - full.working_bytes(1, 1) == half_bytes(sam2.model, torch.bfloat16)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt()])
def test_weights_survive_what_goes_wrong(sam2, monkeypatch, error):
    """Without memory for a second set it goes on without one; other errors pass."""
    weights, made, cast = list(sam2.model.parameters()), [], torch.Tensor.to

    def failing(self, *args, **more):
        made.append(1)
        if len(made) == 3:
            raise error
        return cast(self, *args, **more)

    def same():
        return all(one is other for one, other in zip(sam2.model.parameters(), weights, strict=True))

    monkeypatch.setattr(torch.Tensor, "to", failing)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt), half_weights(sam2.model, torch.bfloat16):
            raise AssertionError
    else:
        with half_weights(sam2.model, torch.bfloat16):
            assert same()
    assert len(made) == 3 and same()
