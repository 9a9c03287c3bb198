"""A loaded SAM 2 as the segmenter that `decaf.tracking` asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..report import checked_per_block
from .encoder import encoder_bytes
from .half_weights import half_bytes, half_weights
from .heads import decoder_bytes
from .memory_attention import attention_bytes, remembered_bytes
from .package_steps import PackageSteps
from .trial import SAM2_WAYS, Ways, fast_steps_agree

_LIBRARY_BYTES = 256 << 20
"""Workspaces of a GPU's libraries, and what their allocator does not get filled."""


@dataclass(frozen=True)
class SAM2:
    """A SAM 2 video model: a `decaf.tracking.segmenter.SegmenterModel`. `model`: a `SAM2Base` in evaluation mode with float32 weights, which
    its owner may move between devices. `image_size`: side of its input in pixels. `dtype`: float32, or the half precision that it computes in
    under autocast."""

    title: ClassVar[str] = "SAM 2"
    ways: ClassVar[Ways] = SAM2_WAYS

    model: nn.Module
    image_size: int
    name: str
    dtype: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        """Where it computes: where its loose parameters are, which are not `streamable`."""
        return self.model.device

    @property
    def streamable(self) -> list[nn.Module]:
        """Modules whose weights are read by their own forward pass alone, so that they may be brought to the device for just that: the
        blocks of the image encoder, which are nine tenths of the weights. Weights of the others are read in many places."""
        return [module for block in self.model.image_encoder.trunk.blocks for module in block.modules()]

    @contextmanager
    def segmenter(self, check_cancelled: Callable[[], None] = lambda: None) -> Iterator[PackageSteps]:
        """This library's way, or the package's own if a trial at the model's first use says that they differ."""
        steps = self.ways.fast if fast_steps_agree(self.model, self.name, check_cancelled, self.ways) else self.ways.package
        with checked_per_block(self.model, check_cancelled), half_weights(self.model, self.dtype):
            yield steps(self.model, self.dtype, check_cancelled)

    def feature_bytes(self) -> int:
        """Of one frame, in float32. Each fine level has four times the tokens of the one below, and a quarter or half of its channels."""
        return 4 * 4 * self.model.sam_image_embedding_size**2 * self.model.hidden_dim

    def working_bytes(self, at_once: int, objects: int) -> int:
        """As `SegmenterModel` has it. Float32 is assumed: under autocast a part of it is."""
        step = at_once * max(attention_bytes(self.model), decoder_bytes(self.model))
        lasting = half_bytes(self.model, self.dtype) + objects * remembered_bytes(self.model)
        return _LIBRARY_BYTES + max(self._encoder_bytes(), step) + lasting

    def _encoder_bytes(self) -> int:
        return encoder_bytes(self.model)
