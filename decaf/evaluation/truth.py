"""True masks of a clip as datasets store them. They are read when a clip is scored, and are small enough to travel to another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..clips.base import MAX_PIXELS
from ..errors import DecafError, reason, shown
from . import run_lengths


class Truth(Protocol):
    """What is true of one query."""

    def read(self, length: int, size: tuple[int, int]) -> tuple[list[int], Tensor]:
        """The clip indices of the frames that have a true mask, ascending, and those masks (n, H, W) bool.

        Args:
            length, size: frames of the clip, and their (H, W).

        Raises DecafError if the truth is damaged or does not fit the clip.
        """

    def problem(self, length: int, size: tuple[int, int]) -> str:
        """What is wrong with it, as far as that can be told without reading the masks; empty for nothing."""


@dataclass(frozen=True)
class GivenMasks:
    """A mask for every frame, (T, H, W) bool or numbers, of which those above 0 (of fractions: from a half on) are the object."""

    masks: Tensor | np.ndarray

    def read(self, length: int, size: tuple[int, int]) -> tuple[list[int], Tensor]:
        problem = self.problem(length, size)
        if problem:
            raise DecafError(problem)
        masks = torch.as_tensor(self.masks)
        return list(range(length)), masks >= 0.5 if masks.is_floating_point() else masks > 0

    def problem(self, length: int, size: tuple[int, int]) -> str:
        wanted = (length, *size)
        shape = tuple(self.masks.shape)
        return "" if shape == wanted else f"The true masks have the shape {shape}; a clip of this length and size needs {wanted}."


@dataclass(frozen=True)
class MaskPictures:
    """A picture file for each frame that has a true mask.

    Attributes:
        files: clip index -> file. Frames without one are not scored.
        values: indices of the palette that are the object; None for all but 0. Index 255 is nobody's: DAVIS marks with it what does not count as
            any object.
    """

    files: Mapping[int, Path]
    values: tuple[int, ...] | None = None

    def read(self, length: int, size: tuple[int, int]) -> tuple[list[int], Tensor]:
        indices = sorted(index for index in self.files if 0 <= index < length)
        masks = np.zeros((len(indices), *size), bool)
        for place, index in enumerate(indices):
            picture = palette_indices(self.files[index])
            if picture.shape != size:
                raise DecafError(_other_size(shown(self.files[index]), picture.shape, size))
            masks[place] = picture != 0 if self.values is None else np.isin(picture, self.values)
        return indices, torch.from_numpy(masks)

    def problem(self, length: int, size: tuple[int, int]) -> str:
        if not any(0 <= index < length for index in self.files):
            return "No frame of it has a true mask."
        for file in self.files.values():
            try:
                with Image.open(file) as image:
                    found = image.height, image.width
            except (OSError, ValueError, SyntaxError) as error:
                return f"{shown(file)} cannot be read ({reason(error)})."
            if found != size:
                return _other_size(shown(file), found, size)
        return ""


@dataclass(frozen=True)
class RunLengthMasks:
    """Run lengths of each object of a query, as in a `mask_dict.json`.

    Attributes:
        objects: per object, per frame: run lengths, or None where it is not seen. None at all: the query means nothing in the clip, and every frame
            has an empty mask.
        order: clip index of each entry, where the dictionary's frames stand in another order than the clip's.
    """

    objects: Sequence[Sequence[object]]
    order: Sequence[int] | None = None

    def read(self, length: int, size: tuple[int, int]) -> tuple[list[int], Tensor]:
        masks = np.zeros((length, *size), bool)
        for frames in self.objects:
            if len(frames) != length:
                raise DecafError(_other_length(len(frames), length))
            for place, stored in enumerate(frames):
                if not stored:
                    continue
                mask = run_lengths.decode(stored)
                if mask.shape != size:
                    raise DecafError(_other_size(f"The true mask of frame {place}", mask.shape, size))
                masks[self.order[place] if self.order is not None else place] |= mask
        return list(range(length)), torch.from_numpy(masks)

    def problem(self, length: int, size: tuple[int, int]) -> str:
        for frames in self.objects:
            if len(frames) != length:
                return _other_length(len(frames), length)
            for place, stored in enumerate(frames):
                try:
                    found = run_lengths.size_of(stored) if stored else size
                except DecafError as error:
                    return str(error)
                if found != size:
                    return _other_size(f"The true mask of frame {place}", found, size)
        return ""


def palette_indices(file: Path) -> np.ndarray:
    """(H, W) uint8: the numbers of the objects in a picture of true masks. Of a picture in colours they are those of the palette that DAVIS and
    YouTube-VOS have. DecafError: it cannot be read."""
    try:
        with Image.open(file, formats=["PNG", "JPEG", "BMP", "TIFF", "WEBP"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DecafError(f"{shown(file)} is {image.width}x{image.height} pixels; it is damaged.")
            if image.mode in ("P", "L"):
                return np.asarray(image)
            if image.mode == "1":
                return np.asarray(image).astype(np.uint8)
            if image.mode.startswith("I"):
                return np.asarray(image).clip(0, 255).astype(np.uint8)
            return _of_colours(np.asarray(image.convert("RGB")))
    except DecafError:
        raise
    except Exception as error:  # damaged files raise errors of any class
        raise DecafError(f"{shown(file)} could not be read as a mask ({reason(error)}). Unpack the dataset again.") from error


def _of_colours(picture: np.ndarray) -> np.ndarray:
    """Colour number n of that palette has bits 0, 3 and 6 of n in the highest bits of red, bits 1, 4 and 7 in those of green, 2 and 5 in blue's."""
    number = np.zeros(picture.shape[:2], np.uint8)
    for group in range(3):
        for channel in range(3):
            bit = 3 * group + channel
            if bit < 8:
                number |= (picture[..., channel] >> (7 - group) & 1) << bit
    return number


def _other_size(what: str, found: tuple[int, ...], size: tuple[int, int]) -> str:
    return f"{what} has {found[1]}x{found[0]} pixels, the clip's frames {size[1]}x{size[0]}."


def _other_length(found: int, length: int) -> str:
    return f"The truth has {found} frames, the clip {length}."
