"""Frames to image features, each frame encoded as seldom as memory allows, and read while the model is at work on the one before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .segmenter import Features, Segmenter


def resized(frame: Tensor, size: int) -> Tensor:
    """(H, W, 3) uint8 -> (size, size, 3) uint8: bicubic, by Pillow, as SAM 2 was trained and evaluated."""
    return torch.from_numpy(np.array(Image.fromarray(frame.numpy()).resize((size, size))))


_CPU = torch.device("cpu")


class FeatureCache:
    """Image features by the clip index of their frame; what does not fit is encoded again when it is needed.

    `budget`: bytes for those that will be needed once more, and then go. `lasting`: bytes for those that stay, for other queries about the
    same clip; the first come. `aside`: these wait in the memory of the CPU, wherever the model computes.
    """

    def __init__(self, budget: int, lasting: int = 0, *, aside: bool = False):
        self._budget, self._lasting_budget = budget, lasting  # what is left of them
        self._aside = aside
        self._features: dict[int, Features] = {}
        self._lasting: dict[int, Features] = {}

    def put(self, index: int, features: Features, *, keep: bool) -> None:
        """`keep`: the frame will be needed once more."""
        if index in self._lasting:
            return
        if features.nbytes <= self._lasting_budget:
            self._lasting_budget -= features.nbytes
            self._lasting[index] = features.to(_CPU) if self._aside else features
        elif keep and features.nbytes <= self._budget:
            self._budget -= features.nbytes
            self._features[index] = features

    def take(self, index: int, device: torch.device | None = None) -> Features | None:
        """`device`: where those that wait aside are wanted."""
        if index in self._lasting:
            return self._lasting[index].to(device) if self._aside else self._lasting[index]
        features = self._features.pop(index, None)
        self._budget += features.nbytes if features else 0
        return features

    def __contains__(self, index: int) -> bool:
        return index in self._features or index in self._lasting

    def let_go(self) -> None:
        """Forgets what waits to be needed once more. What lasts, lasts."""
        self._budget += sum(features.nbytes for features in self._features.values())
        self._features.clear()

    @property
    def nbytes(self) -> int:
        """What is held."""
        return sum(features.nbytes for features in [*self._features.values(), *self._lasting.values()])

    def clear(self) -> None:
        """Forgets everything, and keeps nothing from now on."""
        self._features.clear()
        self._lasting.clear()
        self._budget = self._lasting_budget = 0


class SomeFrames(Sequence):
    """Frames of a clip as a clip of their own. `indices`: their clip indices."""

    def __init__(self, clip: Sequence[Tensor], indices: Sequence[int]):
        self._clip, self._indices = clip, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> Tensor:
        return self._clip[self._indices[place]]


class FrameEncoder:
    """Encodes frames of a sequence on demand, unless their features are in the cache.

    `frames`: (H, W, 3) uint8 tensors. `on_encode` is called before the image encoder runs; what it raises stops the work. `indices`: clip
    indices of the frames, if they are not the whole clip. `hold`: features stay for a later encoder of the clip.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        frames: Sequence[Tensor],
        cache: FeatureCache,
        on_encode: Callable[[], None],
        *,
        indices: Sequence[int] | None = None,
        hold: bool = False,
    ):
        self._segmenter, self._frames, self._cache, self._on_encode, self._indices = segmenter, frames, cache, on_encode, indices
        self._hold = hold
        # Reading and resizing a large frame takes as long as a GPU needs for it. Decode and resize only: PyTorch's operators would start a
        # pool of worker threads for this thread too.
        self._reader = ThreadPoolExecutor(1, "decaf-frames")
        self._coming: tuple[int, Future[Tensor]] | None = None

    def __len__(self) -> int:
        return len(self._frames)

    def encode(self, frame: int, *, keep: bool = False, then: int | None = None) -> Features:
        """Features of `frame`; with `keep` they stay, if the budget allows, until the frame is asked for again. `then`: the frame that will be
        asked for next, to be read meanwhile."""
        index = self._index(frame)
        features = self._cache.take(index, self._segmenter.device)
        picture = self._picture(frame) if features is None else None
        if then is not None and self._index(then) not in self._cache:
            self._coming = then, self._reader.submit(self._read, then)
        if picture is not None:
            self._on_encode()
            features = self._segmenter.encode(picture)
        self._cache.put(index, features, keep=keep or self._hold)
        return features

    def _index(self, frame: int) -> int:
        return frame if self._indices is None else self._indices[frame]

    def _picture(self, frame: int) -> Tensor:
        """(S, S, 3) uint8."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == frame:
            return coming[1].result()
        return self._read(frame)

    def _read(self, frame: int) -> Tensor:
        return resized(self._frames[frame], self._segmenter.image_size)
