"""Video files with or without alpha, written frame by frame, each with its own time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from ..errors import DecafError
from ..files import atomic_write


@dataclass(frozen=True)
class VideoFormat:
    """A kind of video file.

    Attributes:
        name: for messages.
        container, encoder, options: FFmpeg's names.
        opaque, transparent: pixel formats; `transparent` is empty if there is no alpha.
        even: both sides have to be even; an odd last row or column is repeated.
        longest: the longest side in pixels.
    """

    name: str
    container: str
    encoder: str
    options: dict[str, str]
    opaque: str
    transparent: str = ""
    even: bool = False
    longest: int = 16384


_PRORES = {"profile": "4444", "vendor": "apl0", "alpha_bits": "16", "qscale": "4"}
_VP9 = {"crf": "14", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1", "auto-alt-ref": "0"}

FORMATS = {
    ".mp4": VideoFormat("H.264", "mp4", "libx264", {"crf": "16", "preset": "veryfast"}, "yuv420p", even=True),
    ".mov": VideoFormat("ProRes 4444", "mov", "prores_ks", _PRORES, "yuv444p10le", "yuva444p10le"),
    ".webm": VideoFormat("VP9", "webm", "libvpx-vp9", _VP9, "yuv420p", "yuva420p"),
}
"""By the ending of the file's name."""

_BT709 = 1  # FFmpeg's number for it as colour space, as primaries and as transfer function
_FINEST = 1_000_000
"""Ticks a second that every format can count in."""


def format_of(path: Path, alpha: bool, size: tuple[int, int]) -> VideoFormat:
    """The format that the ending of `path` names. DecafError: it names none, has no alpha, or holds no frames of that size (H, W)."""
    found = FORMATS.get(path.suffix.lower())
    with_alpha = [f"{suffix} ({one.name})" for suffix, one in FORMATS.items() if one.transparent]
    if found is None:
        known = ", ".join(f"{suffix} ({one.name})" for suffix, one in FORMATS.items())
        raise DecafError(f"{path.name} does not say which kind of video it is. Let the name end in {known}.")
    if alpha and not found.transparent:
        raise DecafError(
            f"{path.name} cannot hold a cut-out: {found.name} has no alpha. Choose {' or '.join(with_alpha)} or a folder of PNG pictures."
        )
    if max(size) > found.longest:
        raise DecafError(
            f"{path.name} cannot be written: {found.name} holds at most {found.longest} pixels a side, and the frames are {size[1]}x{size[0]}. "
            "Make the frames smaller, or choose a folder of PNG pictures."
        )
    return found


class VideoWriter:
    """A video file that is open for writing. `output`: its container, to which sound can be added before the first frame."""

    def __init__(
        self, output: av.container.OutputContainer, kind: VideoFormat, alpha: bool, size: tuple[int, int], rate: Fraction, time_base: Fraction
    ):
        self.output, self._size, self._alpha, self._kind = output, size, alpha, kind
        height, width = size
        self._stream = output.add_stream(kind.encoder, rate=rate, options=dict(kind.options))
        self._stream.width, self._stream.height = (width + width % 2, height + height % 2) if kind.even else (width, height)
        self._stream.pix_fmt = kind.transparent if alpha else kind.opaque
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        self._time_base = time_base if time_base.denominator <= _FINEST else Fraction(1, 90_000)
        self._ticks_per = time_base / self._time_base
        self._stream.time_base = context.time_base = self._time_base

    def write(self, pixels: np.ndarray, tick: int, duration: int) -> None:
        """One frame, (H, W, 3) uint8, or (H, W, 4) with straight alpha: when it is shown and for how long, in units of `time_base`."""
        height, width = self._size
        if self._kind.even and (height % 2 or width % 2):
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = _converted(pixels, self._stream.pix_fmt)
        picture.pts, picture.time_base = round(tick * self._ticks_per), self._time_base
        picture.duration = round(duration * self._ticks_per)
        self.output.mux(self._stream.encode(picture))

    def finish(self) -> None:
        self.output.mux(self._stream.encode())


@contextmanager
def video_writer(
    path: Path, kind: VideoFormat, alpha: bool, size: tuple[int, int], rate: Fraction, time_base: Fraction
) -> Iterator[VideoWriter]:
    """A writer for `path`, which is there when the block ends without an error, whole. DecafError: it cannot be written, the disk is full."""
    # A file object of our own, because PyAV reports a full disk only on closing the file, or not at all.
    with atomic_write(path) as part, part.open("wb") as file, av.open(file, "w", format=kind.container) as output:
        writer = VideoWriter(output, kind, alpha, size, rate, time_base)
        yield writer
        writer.finish()


def _converted(pixels: np.ndarray, pix_fmt: str) -> av.VideoFrame:
    """A frame of the encoder's pixel format, BT.709."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgba" if pixels.shape[-1] == 4 else "rgb24")
    return frame.reformat(format=pix_fmt, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
