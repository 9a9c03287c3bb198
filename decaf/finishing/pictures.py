"""Numbered pictures in a folder: PNG, and EXR for compositing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import DecafError, reason, shown
from ..files import atomic_write, write_image
from ..paths import look_at
from ..report import Progress, silent

PICTURES = {"png": "8 bits, straight alpha", "exr": "half floats in linear light, premultiplied alpha"}
"""Kinds of pictures, by their ending."""

_EXR = {"format": "half", "compression": "zip16"}


def write_pictures(
    folder: Path,
    frames: Iterable[np.ndarray],
    total: int,
    progress: Progress = silent,
    *,
    kind: str = "png",
    tags: Mapping[str, str] | None = None,
) -> None:
    """Writes `00000.png`, `00001.png`, ... of (H, W, 3) or (H, W, 4) uint8 with straight alpha, or for EXR also uint16. `kind`: one of PICTURES.
    `tags`: texts for the first picture, if it is a PNG.

    DecafError: see `check_folder`, or the disk is full.
    """
    check_folder(folder)
    for index, pixels in enumerate(frames):
        path = folder / f"{index:05d}.{kind}"
        if kind == "exr":
            with atomic_write(path) as part:
                part.write_bytes(exr_bytes(pixels))
        else:
            texts = PngInfo()
            for name, text in (tags or {}).items() if index == 0 else ():
                texts.add_text(name, text)
            write_image(path, Image.fromarray(pixels), compress_level=3, pnginfo=texts)
        progress(index + 1, total, "Writing pictures")


def check_folder(folder: Path) -> None:
    """DecafError: pictures cannot be written into the folder, or would mix with others that are in it."""
    if look_at(folder, "The folder") == "file":
        raise DecafError(f"{shown(folder)} is a file. Give a folder for the pictures, or a name that ends in .mov or .webm.")
    try:
        others = folder.is_dir() and any(entry.suffix.lower().removeprefix(".") in PICTURES for entry in folder.iterdir())
    except OSError as error:
        raise DecafError(f"{shown(folder)} cannot be looked into ({reason(error)}). Give another folder.") from error
    if others:
        raise DecafError(f"{shown(folder)} holds pictures already, with which new ones would mix. Give another folder, or empty this one.")


def exr_bytes(pixels: np.ndarray) -> bytes:
    """An OpenEXR file of (H, W, 3) or (H, W, 4) uint8 or uint16 sRGB with straight alpha.

    As the format wants it: linear light, the colours multiplied by alpha (associated alpha), each number a half float. Eight bits come back
    exactly where alpha is whole.
    """
    height, width, channels = pixels.shape
    linear = _linear(np.iinfo(pixels.dtype).bits)
    values = np.empty(pixels.shape, np.float32)
    values[..., :3] = linear[pixels[..., :3]]
    if channels == 4:
        values[..., 3] = pixels[..., 3] / np.float32(np.iinfo(pixels.dtype).max)
        values[..., :3] *= values[..., 3:]
    encoder = av.CodecContext.create("exr", "w")
    encoder.width, encoder.height, encoder.time_base, encoder.options = width, height, Fraction(1, 1), dict(_EXR)
    encoder.pix_fmt = "gbrapf32le" if channels == 4 else "gbrpf32le"
    frame = av.VideoFrame.from_ndarray(values, format=encoder.pix_fmt)
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


@cache
def _linear(bits: int) -> np.ndarray:
    """(2 ** bits,) float32: the share of light that each value of sRGB stands for (IEC 61966-2-1)."""
    values = np.linspace(0, 1, 1 << bits)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4).astype(np.float32)
