"""Masks from elsewhere, as tracks of one object."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data import Track, Tracks
from ..errors import DecafError


class MaskTensor:
    """Masks of one object: (T, H, W) float 0..1 or bool, on any device, converted on access; the tensor is not copied."""

    finished = True

    def __init__(self, masks: Tensor):
        self.length, self.frame_size = len(masks), tuple(masks.shape[1:])
        self._masks = masks

    def union(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) bool: at least half."""
        return self.alpha(objects, frames) >= 128

    def alpha(self, objects: Sequence[int], frames: Sequence[int]) -> Tensor:
        """(len(frames), H, W) uint8 0..255."""
        if not len(objects):
            return torch.zeros(len(frames), *self.frame_size, dtype=torch.uint8)
        picked = torch.stack([self._masks[frame] for frame in frames]) if len(frames) else self._masks[:0]
        return picked.cpu().float().nan_to_num(0).clamp(0, 1).mul(255).round().to(torch.uint8)

    def any(self) -> bool:
        """Whether any mask has a pixel."""
        return any(bool((mask >= 0.5).any()) for mask in self._masks)


def tracks_from_masks(masks: Tensor) -> Tracks:
    """One object with number 0 from masks (T, H, W) float 0..1 or bool. DecafError: another shape."""
    if masks.ndim != 3 or 0 in masks.shape:
        raise DecafError(f"The mask has the shape {tuple(masks.shape)}; it needs (frames, height, width), with at least one pixel.")
    return Tracks(MaskTensor(masks), (Track(0, 0, (0.5, 0.5), 1.0, 1.0, 1.0),))
