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


class FeatureCache:
    """Image features by the clip index of their frame, up to `budget` bytes; what does not fit is encoded again when it is needed."""

    def __init__(self, budget: int):
        self._budget, self._held = budget, 0
        self._features: dict[int, Features] = {}

    def put(self, index: int, features: Features) -> None:
        if self._held + features.nbytes <= self._budget:
            self._features[index] = features
            self._held += features.nbytes

    def take(self, index: int) -> Features | None:
        features = self._features.pop(index, None)
        self._held -= features.nbytes if features else 0
        return features

    def clear(self) -> None:
        self._features.clear()
        self._held = 0


class FrameEncoder:
    """Encodes frames of a sequence on demand, unless their features are in the cache.

    `frames`: (H, W, 3) uint8 tensors. `on_encode` is called before the image encoder runs; what it raises stops the work. `indices`: clip
    indices of the frames, if they are not the whole clip: their features then stay for a later encoder of the clip.
    """

    def __init__(
        self,
        sam2: SAM2,
        frames: Sequence[Tensor],
        cache: FeatureCache,
        on_encode: Callable[[], None],
        *,
        indices: Sequence[int] | None = None,
    ):
        self._sam2, self._frames, self._cache, self._on_encode, self._indices = sam2, frames, cache, on_encode, indices
        self._position: Tensor | None = None

    def __len__(self) -> int:
        return len(self._frames)

    def encode(self, frame: int, *, keep: bool = False) -> Features:
        """Features of `frame`; with `keep` they stay, if there is room, until the frame is asked for again."""
        index = frame if self._indices is None else self._indices[frame]
        features = self._cache.take(index) or self._encode(frame)
        if keep or self._indices is not None:
            self._cache.put(index, features)
        return features

    def _encode(self, frame: int) -> Features:
        model = self._sam2.model
        self._on_encode()
        with inference(self._sam2):
            image = model_input(self._frames[frame], self._sam2.image_size).to(self._sam2.device)
            _, levels, positions, sizes = model._prepare_backbone_features(model.forward_image(image[None]))
            if self._position is None:
                # The same for every frame, and larger than the features: one copy serves all.
                self._position = positions[-1].clone()
        return Features(tuple(levels), self._position, tuple(sizes))
