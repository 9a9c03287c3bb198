"""Frames to image features, each frame encoded as seldom as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .build import SAM2

_MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
_STD = torch.tensor((0.229, 0.224, 0.225))[:, None, None]


@contextmanager
def inference(sam2: SAM2) -> Iterator[None]:
    """No gradients, and half precision where the model asks for it. Not to be held across a `yield` of a generator."""
    half = sam2.dtype != torch.float32
    with torch.inference_mode(), torch.autocast(sam2.device.type, dtype=sam2.dtype if half else None, enabled=half):
        yield


def model_input(frame: Tensor, size: int) -> Tensor:
    """(H, W, 3) uint8 -> (3, size, size) float32, equal to the package's own loader of JPEG frames (bicubic resize by Pillow, then
    normalised)."""
    resized = np.asarray(Image.fromarray(frame.numpy()).resize((size, size)))
    return (torch.from_numpy(resized / 255.0).permute(2, 0, 1).float() - _MEAN) / _STD


@dataclass(frozen=True)
class Features:
    """Image features of one frame as `SAM2Base` wants them. `levels`: per level (h * w, 1, channels), the finest first. `position`:
    (h * w, 1, channels), position codes of the last level, the only ones in use. `sizes`: (h, w) per level."""

    levels: tuple[Tensor, ...]
    position: Tensor
    sizes: tuple[tuple[int, int], ...]

    def flat(self, n: int) -> tuple[list[Tensor], list[Tensor]]:
        """Features and position codes for a batch of n objects, as arguments of `track_step`."""
        position = self.position.expand(-1, n, -1)
        return [level.expand(-1, n, -1) for level in self.levels], [position] * len(self.levels)

    def maps(self, n: int) -> tuple[list[Tensor] | None, Tensor]:
        """(n, channels, h, w) views: the high-resolution maps (None if the model has none), and the lowest one."""
        maps = [
            level.permute(1, 2, 0).unflatten(2, size).expand(n, -1, -1, -1) for level, size in zip(self.levels, self.sizes, strict=True)
        ]
        return maps[:-1] or None, maps[-1]

    @property
    def nbytes(self) -> int:
        return sum(level.numel() * level.element_size() for level in self.levels)


class FrameEncoder:
    """Encodes frames of a sequence on demand and keeps features that it is told to keep, up to `budget` bytes.

    `frames`: (H, W, 3) uint8 tensors. `on_encode` is called before the image encoder runs; what it raises stops the work.
    """

    def __init__(self, sam2: SAM2, frames: Sequence[Tensor], budget: int, on_encode: Callable[[], None]):
        self._sam2, self._frames, self._budget, self._on_encode = sam2, frames, budget, on_encode
        self._kept: dict[int, Features] = {}
        self._kept_bytes = 0
        self._position: Tensor | None = None

    def __len__(self) -> int:
        return len(self._frames)

    def encode(self, frame: int, *, keep: bool = False) -> Features:
        """Features of `frame`; with `keep` they stay, if there is room, until the frame is asked for again."""
        if frame in self._kept:
            features = self._kept.pop(frame)
            self._kept_bytes -= features.nbytes
            return features
        model = self._sam2.model
        self._on_encode()
        with inference(self._sam2):
            image = model_input(self._frames[frame], self._sam2.image_size).to(self._sam2.device)
            _, levels, positions, sizes = model._prepare_backbone_features(model.forward_image(image[None]))
            if self._position is None:
                # The same for every frame, and larger than the features: one copy serves all.
                self._position = positions[-1].clone()
        features = Features(tuple(levels), self._position, tuple(sizes))
        if keep and self._kept_bytes + features.nbytes <= self._budget:
            self._kept[frame] = features
            self._kept_bytes += features.nbytes
        return features
