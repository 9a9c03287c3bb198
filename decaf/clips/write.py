"""Writes video files (PyAV)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from ..errors import DecafError
from ..files import atomic_write


def write_video(
    path: str | os.PathLike, frames: Iterable[Tensor], fps: Fraction | float, size: tuple[int, int], *, quick: bool = False
) -> None:
    """Writes an H.264 video in yuv420p, which plays everywhere, without sound. A failure leaves no file behind.

    The format needs even sides: an odd last row or column is repeated.

    Args:
        frames: (H, W, 3) uint8 RGB.
        fps: clamped to 0.001..1000, because some files claim rates that players refuse.
        size: (H, W) of every frame.
        quick: half the time for a larger file that looks the same: for what is only looked at once.

    Raises:
        DecafError: no frames, a frame of another size, sides over 16384 pixels, or a full disk.
    """
    height, width = size
    if max(size) > _LONGEST_SIDE:
        raise DecafError(
            f"{path} cannot be written: H.264 holds at most {_LONGEST_SIDE} pixels a side, and the frames are {width}x{height}. "
            "Leave the video out, or make the frames smaller."
        )
    rate = min(max(Fraction(fps), _SLOWEST), _FASTEST).limit_denominator(1001)
    # A file object of our own, because PyAV reports a full disk only on closing the file, or not at all.
    with atomic_write(path) as part, part.open("wb") as file:
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "18", "preset": "ultrafast" if quick else "veryfast"})
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = _BT709
            stream.codec_context.color_range = ColorRange.MPEG
            count = 0
            for count, frame in enumerate(frames, start=1):
                if tuple(frame.shape) != (height, width, 3):
                    raise DecafError(f"Frame {count - 1} for {path} has the shape {tuple(frame.shape)} instead of {(height, width, 3)}.")
                pixels = np.pad(frame.numpy(), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
                container.mux(stream.encode(picture))
            if not count:
                raise DecafError(f"There is no frame to write to {path}.")
            container.mux(stream.encode())


_LONGEST_SIDE = 16384
_SLOWEST, _FASTEST = Fraction(1, 1000), Fraction(1000)
_BT709 = 1  # FFmpeg's number for it as colour space, as primaries and as transfer function
