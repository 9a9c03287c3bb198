"""What a video segmenter must be able to do so that points become tracks with it. Nothing in this folder knows which one it is.

A loaded model (`SegmenterModel`) hands out a `Segmenter` for a while. Its owner may change weights or move them to another device in between,
but not meanwhile: so a segmenter may keep what it derives from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Memory = Any
"""What a segmenter remembers of one object on one frame: its own type, which is held and handed back, never looked into."""

Pointer = Any
"""A small summary of one object on one frame, which is remembered longer than its memory. None in a segmenter that has no such thing."""


class Features(Protocol):
    """Image features of one frame, of the segmenter's own type. `nbytes`: what they take, for the budget of the cache."""

    @property
    def nbytes(self) -> int: ...

    def to(self, device: torch.device) -> Features:
        """The same on another device."""


@dataclass(frozen=True)
class Clicks:
    """What a person marks on one frame for one object. `xy`: (n, 2) float32 in 0..1; `positive`: (n,) bool, whether a point is on the object
    or on what is not of it; `box`: (left, top, right, bottom) in 0..1, or None. At least one of points and box is there."""

    xy: Tensor
    positive: Tensor
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class MemoryReach:
    """On how many frames a segmenter looks back, the prompt's own included: `memories` >= 1, and `pointers` >= 1."""

    memories: int
    pointers: int


@dataclass(frozen=True)
class MemoryBank:
    """What is looked at when one object is tracked on a frame: memories and pointers, each with its distance from that frame in frames, > 0
    and against the direction of tracking. The prompts' come first, then the memories from the most distant to the nearest and the pointers
    from the nearest to the most distant. There is always a prompt's.

    `prompts`: how many of the memories are of prompts. Those of frames that are still to come are among them, with distances < 0; pointers
    of such frames are not.
    """

    memories: Sequence[tuple[int, Memory]]
    pointers: Sequence[tuple[int, Pointer]]
    prompts: int = 1


@dataclass(frozen=True)
class Outputs:
    """Of n objects on one frame. `logits`: (n, 1, h, w) float32 at any size; > 0 is the object. `memories`: None for those that were not to
    be remembered."""

    logits: Tensor
    memories: list[Memory | None]
    pointers: list[Pointer]


class Segmenter(Protocol):
    """Tensors are on `device`, or come from the CPU where it says so. Any of the five steps may call the `check_cancelled` that the
    segmenter was made with, which may raise to stop."""

    image_size: int
    reach: MemoryReach
    device: torch.device

    def encode(self, picture: Tensor) -> Features:
        """`picture`: (S, S, 3) uint8 on the CPU, S the `image_size`."""

    def point_masks(self, features: Features, xy: Tensor) -> tuple[Tensor, Tensor]:
        """One mask per point. `xy`: (n, 2) in 0..1, on the CPU. Returns logits (n, 1, h, w) and predicted IoUs (n,) float32."""

    def remember(self, features: Features, masks: Sequence[Tensor]) -> Outputs:
        """Makes (H, W) bool masks of any size, on the CPU, the first memories of as many objects. The logits are the masks as the segmenter
        sees them."""

    def remember_clicks(self, features: Features, clicks: Clicks, mask: Tensor | None) -> tuple[Outputs, float]:
        """Makes what the clicks mean the first memory of one object. `mask`: (H, W) bool of any size, on the CPU: the object as it was held
        to be so far, which the clicks correct; None if there was none. Returns the predicted IoU as well."""

    def track(self, features: Features, banks: Sequence[MemoryBank], remember: Sequence[bool], length: int) -> Outputs:
        """Finds one object per memory bank. `remember`: whether a memory is wanted of it. `length`: frames of the whole sequence."""


class SegmenterModel(Protocol):
    """A loaded model. `title`: of its kind, for example "SAM 2", and `name`: its own; both for people. `image_size`: side in pixels of the
    square that frames are resized to. `dtype`: that it computes in."""

    title: str
    name: str
    image_size: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device: ...

    def segmenter(self, check_cancelled: Callable[[], None] = ...) -> AbstractContextManager[Segmenter]:
        """Within it weights stay as and where they are. `check_cancelled`: called at least every second of work."""

    def feature_bytes(self) -> int:
        """Of one frame's image features."""

    def working_bytes(self, at_once: int, objects: int) -> int:
        """Bytes that one step takes with `at_once` objects or points, beside weights and features, and those of what is remembered of `objects`
        of them."""
