"""Whether this library's way gives what the installed package gives: tried once per model and device, as it uses private names of the
package, which another version may change."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..devices import is_device_failure, is_out_of_memory
from ..errors import DecafError, reason
from ..report import checked_per_block
from ..tracking.segmenter import Clicks, MemoryBank, Outputs
from .encoder import Features
from .fast_steps import FastSteps
from .package_steps import PackageSteps

log = logging.getLogger(__name__)

_TOLERANCE = {"cpu": 1e-3}
_TOLERANCE_ON_GPU = 1e-2
"""Norm of a difference, as a part of the norm of what the package gives. In float32 on a CPU the two ways differ by less than a millionth,
and by a ten-thousandth in memories, which are stored in bfloat16; the TensorFloat-32 of a GPU rounds a thousand times as coarsely."""

_passed: WeakKeyDictionary[nn.Module, dict[torch.device, bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Ways:
    """The two ways of a model. `encode_alike`: both encode a picture by the same code, which need not be tried."""

    package: type[PackageSteps]
    fast: type[FastSteps]
    encode_alike: bool = False


SAM2_WAYS = Ways(PackageSteps, FastSteps)


def fast_steps_agree(model: nn.Module, name: str, check_cancelled: Callable[[], None] = lambda: None, ways: Ways = SAM2_WAYS) -> bool:
    """Tries it at the first call for the model on its device, and warns if the result is no. `name`: the model's, for people.
    `check_cancelled`: called all the while; may raise to stop.

    DecafError: the package's own steps do not work either. Memory that runs out, and a cancel, pass through; they decide nothing.
    """
    known = _passed.setdefault(model, {})
    if model.device not in known:
        problem = _problem(model, check_cancelled, ways)
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


def _problem(model: nn.Module, check_cancelled: Callable[[], None], ways: Ways) -> str:
    """What differs; empty if nothing does."""
    stopped: list[BaseException] = []

    def check() -> None:
        try:
            check_cancelled()
        except BaseException as error:
            stopped.append(error)
            raise

    small = min(model.image_size, max(64, model.image_size // 128 * 32))  # as a picture of full size takes half of a trial's time
    picture, _ = _scene(small)
    _, mask = _scene(model.image_size)
    tried: list[Tensor] = []  # of the image encoder
    with checked_per_block(model, check):
        try:
            theirs = ways.package(model, check_cancelled=check)
            if ways.encode_alike:
                features = _made_up(model)
            else:
                small_features = theirs.encode(picture)
                tried, features = _tensors(small_features), _enlarged(small_features, model)
            outputs = theirs.remember(features, [mask])
            bank = _bank(outputs)
            expected = theirs.track(features, [bank], [True], 3)
            # There is one way for these alone; they call what the package may change at any time.
            on_it = torch.tensor([[0.45, 0.55]])
            theirs.point_masks(features, on_it)
            theirs.remember_clicks(features, Clicks(on_it, torch.ones(1, dtype=torch.bool)), None)
        except Exception as error:
            if error in stopped or isinstance(error, DecafError) or is_out_of_memory(error) or is_device_failure(error):
                raise
            raise DecafError(
                f"The Python package sam2 {_version()} does not work in the way that this library expects ({reason(error)}). "
                "Install another version of it, for example 1.1.0."
            ) from error
        if not all(x.isfinite().all() for x in [*tried, *_tensors_of(outputs), *_tensors_of(expected)]):
            return ""  # a damaged checkpoint, which is told of by whoever looks at its scores
        try:
            ours = ways.fast(model, check_cancelled=check)
            if not ways.encode_alike:
                our_features = ways.fast(model, check_cancelled=check, image_size=small).encode(picture)
                if our_features.sizes != small_features.sizes or not _alike(_tensors(our_features), tried):
                    return "other image features"
            ours.remember_as(theirs)
            found = ours.track(features, [bank], [True], 3)
            return "" if _alike(_tensors_of(found), _tensors_of(expected)) else "other masks or memories"
        except Exception as error:
            if error in stopped or is_out_of_memory(error) or is_device_failure(error):
                raise
            return reason(error)


def _enlarged(features: Features, model: nn.Module) -> Features:
    """As of a picture of the model's own size, which is all that its decoder takes."""
    side = model.image_size // 16
    sizes = [tuple(n * side // features.sizes[-1][0] for n in size) for size in features.sizes]
    levels = []
    for level, old, new in zip(features.levels, features.sizes, sizes, strict=True):
        grid = level.permute(1, 2, 0).unflatten(2, old)
        levels.append(F.interpolate(grid, size=new, mode="nearest").flatten(2).permute(2, 0, 1))
    pos_enc = model.image_encoder.neck.position_encoding(levels[-1].permute(1, 2, 0).unflatten(2, sizes[-1]))
    return Features(tuple(levels), pos_enc.flatten(2).permute(2, 0, 1), tuple(sizes))


def _made_up(model: nn.Module) -> Features:
    """Features that are noise, where encoding a picture would take a hundred times as long as the rest of the trial."""
    side, channels, random = model.sam_image_embedding_size, model.hidden_dim, torch.Generator().manual_seed(0)
    shapes = [(4 * side, channels // 8), (2 * side, channels // 4), (side, channels)]
    levels = [torch.randn(edge**2, 1, width, generator=random).to(model.device) for edge, width in shapes]
    lowest = levels[-1].permute(1, 2, 0).unflatten(2, (side, side))
    pos_enc = model.image_encoder.position_encoding(lowest).flatten(2).permute(2, 0, 1)
    return Features(tuple(levels), pos_enc, tuple((edge, edge) for edge, _ in shapes))


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


def _tensors_of(outputs: Outputs) -> list[Tensor]:
    return [outputs.logits, outputs.memories[0], outputs.pointers[0]]


def _alike(found: list[Tensor], expected: list[Tensor]) -> bool:
    if [x.shape for x in found] != [x.shape for x in expected]:
        return False
    tolerance = _TOLERANCE.get(expected[0].device.type, _TOLERANCE_ON_GPU)
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    return all(float((a - b).norm()) <= tolerance * float(b.norm()) for a, b in pairs)


def _version() -> str:
    for name in ("sam2", "rf-sam-2"):  # the same package by two publishers
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return "of an unknown version"
