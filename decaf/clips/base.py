"""A clip: frames by index from any source. Decoded frames are cached within a budget of bytes."""

from __future__ import annotations

import logging
import re
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..devices import is_out_of_memory, memory_for
from ..errors import DecafError, reason, shown
from ..paths import look_at
from ..report import Progress, silent

log = logging.getLogger(__name__)

OPENING = "Opening the clip"
"""Name of the step that opening reports."""

BUDGET = 384 << 20
"""Bytes of decoded frames that a clip of files caches: 64 full HD frames."""

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".tga"}

MAX_PIXELS = 2 * 89_478_485
"""Largest frame, the same limit as PIL's: a small file may unpack to any size."""

CLIP_REMEDY = "Close other programs, or make the frames smaller."

_IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "PPM", "TGA", "GIF", "AVIF", "JPEG2000")
"""Readers that only decode pixels. PIL detects formats by content and has more readers: it would pass an EPS file of any name to Ghostscript."""


class Clip(ABC):
    """Frames 0..T-1 of one size. `clip[i]` is (H, W, 3) uint8 RGB on the CPU; treat it as read-only.

    Every order of access, from any thread, gives the same pixels; stepping forward or backward is cheap. `fps` is None for images, which
    have no frame rate. `time_base` is None where the frames do not say when they are shown; else frame i is shown at
    `ticks(i) * time_base` seconds, in the time of the file, which rises from frame to frame.
    """

    name: str
    frame_size: tuple[int, int]
    fps: Fraction | None = None
    time_base: Fraction | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, index: int) -> Tensor: ...

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"Frame {index} of {self.name}, which has frames 0 to {len(self) - 1}.")
        with memory_for(f"to decode frame {index} of {self.name}", CLIP_REMEDY):
            return self._read(index)

    def ticks(self, index: int) -> int:
        """When frame `index` is shown, in units of `time_base`."""
        raise ValueError(f"The frames of {self.name} have no times.")

    def close(self) -> None:  # noqa: B027, most clips hold nothing open
        """Let go of the file, so that it can be replaced or deleted. A frame that is asked for later opens it again."""


class FrameCache:
    """Least-recently-used cache of a clip's frames: as many as fit `budget` bytes, at least one."""

    def __init__(self, frame_size: tuple[int, int], budget: int):
        self.capacity = max(budget // (frame_size[0] * frame_size[1] * 3), 1)
        self._frames: OrderedDict[int, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, index: int) -> Tensor | None:
        """The frame, (H, W, 3) uint8, if it is held. Of any thread."""
        with self._lock:
            frame = self._frames.get(index)
            if frame is not None:
                self._frames.move_to_end(index)
            return frame

    def put(self, index: int, frame: Tensor) -> None:
        """Holds the frame, and lets those go that were asked for longest ago. Of any thread."""
        with self._lock:
            self._frames[index] = frame
            self._frames.move_to_end(index)
            while len(self._frames) > self.capacity:
                self._frames.popitem(last=False)


class ImageFiles(Clip):
    """Image files of one size, in the given order. Opening decodes each once, so that a damaged file is reported before hours of work."""

    def __init__(self, name: str, paths: Sequence[Path], *, budget: int = BUDGET, progress: Progress = silent):
        self.name, self._paths = name, list(paths)
        first = read_image(self._paths[0])
        self.frame_size = tuple(first.shape[:2])
        self._cache = FrameCache(self.frame_size, budget)
        self._cache.put(0, first)
        for index, path in enumerate(self._paths[1:], start=1):
            progress(index, len(self._paths), OPENING)
            frame = read_image(path)
            if frame.shape != first.shape:
                raise DecafError(
                    f"The frames in {name} have different sizes: {self._paths[0].name} is {_size(first)}, {path.name} is {_size(frame)}; "
                    "resize them to one size, or move the files of another clip away."
                )
            if index < self._cache.capacity:
                self._cache.put(index, frame)

    def __len__(self) -> int:
        return len(self._paths)

    def _read(self, index: int) -> Tensor:
        frame = self._cache.get(index)
        if frame is None:
            frame = read_image(self._paths[index])
            if tuple(frame.shape[:2]) != self.frame_size:
                raise DecafError(f"{self._paths[index]} has changed its size since the clip was opened; open it again.")
            self._cache.put(index, frame)
        return frame


class ImageTensor(Clip):
    """Frames of a (T, H, W, C) tensor, converted on access; the tensor is not copied."""

    def __init__(self, name: str, images: Tensor, fps: Fraction | None = None):
        self.name, self._images, self.frame_size, self.fps = name, images, tuple(images.shape[1:3]), fps

    def __len__(self) -> int:
        return len(self._images)

    def _read(self, index: int) -> Tensor:
        frame = self._images[index, ..., :3].cpu()  # alpha is dropped, as ComfyUI's own nodes do
        if frame.dtype != torch.uint8:
            # NumPy, not PyTorch: torch ops would create a pool of worker threads for each thread that reads, beside those of a running model.
            pixels = frame.detach().float().numpy() * np.float32(255)
            frame = torch.from_numpy(np.clip(np.rint(pixels, out=pixels), 0, 255, out=pixels).astype(np.uint8))
        return frame.expand(-1, -1, 3)


def clip_from_images(images: Tensor, *, name: str = "images", fps: Fraction | None = None) -> Clip:
    """A clip from a tensor.

    Args:
        images: (T, H, W, C) on any device, C in 1, 3, 4, uint8 or float in 0..1. Values outside are clipped.
        name: for messages.
        fps: frames per second, where they come from a video.

    Raises:
        DecafError: no frames, another shape or dtype, or values that are not finite.
    """
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[3] not in (1, 3, 4):
        raise DecafError(
            f"The {name} have the shape {shape}; a clip needs (frames, height, width, channels) with 1, 3 or 4 channels"
            + (": add a leading dimension for the single frame." if images.ndim == 3 else ".")
        )
    if 0 in shape:
        raise DecafError(f"The {name} have the shape {shape}, which holds no pixels; give at least one frame.")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise DecafError(f"The {name} are {images.dtype} numbers; give float in 0..1 or uint8.")
        _check_values(images, name)
    return ImageTensor(name, images, fps)


def _check_values(images: Tensor, name: str) -> None:
    low, high = 0.0, 1.0
    for index, frame in enumerate(images):  # frame by frame: a mask of the whole clip would take a quarter of the clip's memory
        frame_low, frame_high = (float(value) for value in torch.aminmax(frame))  # aminmax propagates NaN
        if not (frame_low > float("-inf") and frame_high < float("inf")):
            raise DecafError(
                f"Frame {index} of the {name} has values that are not finite numbers (NaN or infinity); look at the step that made it."
            )
        low, high = min(low, frame_low), max(high, frame_high)
    if low < -0.05 or high > 1.05:
        log.warning("The %s range from %.3g to %.3g; values outside 0..1 are clipped.", name, low, high)


def folder_images(folder: Path) -> list[Path]:
    """The image files in a folder in natural order (frame2 before frame10).

    Raises:
        DecafError: the folder has no image or cannot be read, or an image is a broken link (skipping it would shift all frames after it).
    """
    try:
        entries = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=_natural)
    except OSError as error:
        raise DecafError(f"The folder {shown(folder)} cannot be read ({reason(error)}); change its permissions.") from error
    for path in entries:
        if path.suffix.lower() in IMAGE_SUFFIXES and look_at(path, "The frame") is None:
            raise DecafError(f"{shown(path)} is a link to a file that is not there; repair or remove it.")
    files = [path for path in entries if path.is_file()]
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    others = [path.name for path in files if path not in images]
    if not images:
        raise DecafError(
            f"The folder {folder} holds no image ({len(others)} other files); give a folder of "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} files, or a video file."
        )
    if others:
        log.info("%d files in %s are not images and are ignored: %s", len(others), folder, ", ".join(others[:5]))
    return images


def read_image(path: Path) -> Tensor:
    """An image file as (H, W, 3) uint8 RGB: rotated as its EXIF says, alpha dropped, 16 bits scaled to 8, grey repeated.

    Raises:
        DecafError: not an image, damaged, too large, or with floating-point pixels.
    """
    Image.init()  # registers all readers; before that Image.OPEN lacks some of them
    try:
        with Image.open(path, formats=[name for name in _IMAGE_FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > MAX_PIXELS:  # PIL's own limit is global and may be switched off
                raise DecafError(
                    f"{path} is {image.width}x{image.height}, more than {MAX_PIXELS // 1_000_000} million pixels; it is damaged, or has to be made "
                    "smaller."
                )
            if getattr(image, "n_frames", 1) > 1:
                log.warning("%s holds %d pictures; only the first is used.", path, image.n_frames)
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would clip it at 255
                grey = np.asarray(image).astype(np.float32) / 257
                image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
            if image.mode == "F":
                raise DecafError(f"{path} has floating-point pixels of unknown range; save it with 8 or 16 bits per channel.")
            return torch.from_numpy(np.array(image.convert("RGB")))
    except DecafError:
        raise
    except Exception as error:  # damaged files raise errors of any class
        if is_out_of_memory(error):
            raise
        raise DecafError(f"{path} could not be read as an image ({reason(error)}); replace or remove it.") from error


def _natural(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part.lower()) for part in re.split(r"(\d+)", path.name)] + [(1, path.name)]


def _size(frame: Tensor) -> str:
    return f"{frame.shape[1]}x{frame.shape[0]}"
