"""Whether this library's way gives what the installed package gives: tried once per model and device, as it uses private names of the
package, which another version may change."""

from __future__ import annotations

import logging
from importlib import metadata
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..devices import is_device_failure, is_out_of_memory
from ..errors import DecafError, reason
from ..tracking.segmenter import MemoryBank, Outputs
from .encoder import Features
from .fast_steps import FastSteps
from .package_steps import PackageSteps

log = logging.getLogger(__name__)

_TOLERANCE = 0.01
"""Norm of a difference, as a part of the norm of what the package gives. In float32 the two ways differ by a few millionths, with the
TensorFloat-32 of a GPU by about a thousandth."""

_passed: WeakKeyDictionary[nn.Module, dict[torch.device, bool]] = WeakKeyDictionary()


def fast_steps_agree(model: nn.Module, name: str) -> bool:
    """Tries it at the first call for the model on its device, and warns if the result is no. `name`: the model's, for people.

    DecafError: the package's own steps do not work either. Memory that runs out, and a cancel, pass through; they decide nothing.
    """
    known = _passed.setdefault(model, {})
    if model.device not in known:
        problem = _problem(model)
        if problem:
            log.warning(
                "%s: the installed package sam2 %s differs from what the faster way of this library expects (%s). The package's own steps are "
                "used, which give the same masks more slowly.",
                name,
                _version(),
                problem,
            )
        known[model.device] = not problem
    return known[model.device]


def _problem(model: nn.Module) -> str:
    """What differs; empty if nothing does."""
    picture, mask = _scene(model.image_size)
    theirs, ours = PackageSteps(model), FastSteps(model)
    try:
        features = theirs.encode(picture)
        outputs = theirs.remember(features, [mask])
        bank = _bank(outputs)
        expected = theirs.track(features, [bank], [True], 3)
    except (AttributeError, TypeError, KeyError) as error:
        raise DecafError(
            f"The Python package sam2 {_version()} does not work in the way that this library expects ({reason(error)}). "
            "Install another version of it: pip install sam2==1.1.0"
        ) from error
    try:
        our_features = ours.encode(picture)
        if our_features.sizes != features.sizes or not _alike(_tensors(our_features), _tensors(features)):
            return "other image features"
        ours.remember(features, [mask])
        found = ours.track(features, [bank], [True], 3)
        return "" if _alike(_results(found), _results(expected)) else "other masks or memories"
    except Exception as error:
        if isinstance(error, DecafError) or is_out_of_memory(error) or is_device_failure(error):
            raise
        return reason(error)


def _scene(size: int) -> tuple[Tensor, Tensor]:
    """A picture (size, size, 3) uint8 of an ellipse on a gradient, and its mask (size, size)."""
    ramp = torch.arange(size) / size
    y, x = ramp[:, None], ramp[None]
    mask = ((x - 0.45) / 0.2) ** 2 + ((y - 0.55) / 0.25) ** 2 < 1
    ground = torch.stack([x.expand(size, size), y.expand(size, size), (x + y) / 2], -1) * 160
    thing = torch.tensor([230.0, 60.0, 30.0]) * (0.7 + 0.3 * x[..., None])
    return torch.where(mask[..., None], thing, ground).to(torch.uint8), mask


def _bank(outputs: Outputs) -> MemoryBank:
    """As on the third frame of a still clip: the prompt's memory, and one of the frame between."""
    return MemoryBank([(2, outputs.memories[0]), (1, outputs.memories[0])], [(2, outputs.pointers[0]), (1, outputs.pointers[0])])


def _tensors(features: Features) -> list[Tensor]:
    return [*features.levels, features.pos_enc]


def _results(outputs: Outputs) -> list[Tensor]:
    return [outputs.logits, outputs.memories[0], outputs.pointers[0]]


def _alike(found: list[Tensor], expected: list[Tensor]) -> bool:
    if [x.shape for x in found] != [x.shape for x in expected]:
        return False
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    # A damaged checkpoint, which gives no finite numbers in either way, is told of by whoever looks at its scores.
    return all(not b.isfinite().all() or float((a - b).norm()) <= _TOLERANCE * float(b.norm()) for a, b in pairs)


def _version() -> str:
    for name in ("sam2", "rf-sam-2"):  # the same package by two publishers
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return "of an unknown version"
