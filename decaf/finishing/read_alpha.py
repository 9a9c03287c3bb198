"""Frames of a video with their alpha."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import av
import numpy as np

from ..clips.video_file import MEDIA_OPTIONS
from ..errors import DecafError, reason, shown
from ..report import Progress, silent

_SAMPLES = 12
"""Frames among which the one that stands for a video is chosen."""


def read_with_alpha(path: Path, *, deep: bool = False) -> Iterator[np.ndarray]:
    """The frames of a video file, as they are stored: (H, W, 4) uint8 RGB and straight alpha, or (H, W, 3) if it has no alpha. `deep`: uint16,
    for files of more than 8 bits.

    DecafError: it cannot be read.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        for frame in _decoded(container, stream, _alpha_decoder(stream)):
            yield _pixels(frame, deep)


def fullest_frame(path: Path, progress: Progress = silent) -> np.ndarray:
    """The frame that stands for a video, as `read_with_alpha` gives it: of at most 12 that are spread evenly the one with the most alpha, the
    earliest if equal; without alpha the one in the middle.

    DecafError: the video cannot be read.
    """
    best, most = None, -1
    with _opened(path) as container:
        for frame in _spread(container, container.streams.video[0], progress):
            pixels = _pixels(frame)
            alpha = int(pixels[..., 3].sum(dtype=np.int64)) if pixels.shape[-1] == 4 else 0
            if alpha > most:
                best, most = pixels, alpha
    return next(read_with_alpha(path)) if best is None else best  # a file that does not say how long it is


def _spread(container: av.container.InputContainer, stream: av.VideoStream, progress: Progress) -> Iterator[av.VideoFrame]:
    """Frames that are spread evenly over a video, one if it has no alpha. Where each frame stands for itself, nothing else is decoded."""
    decoder = _alpha_decoder(stream)
    transparent = decoder is not None or _has_alpha(stream)
    count = _SAMPLES if transparent else 1
    length = stream.duration
    if length is None:  # WebM knows that of the whole file alone
        length = int((container.duration or 0) / av.time_base / stream.time_base)
    wanted = [(stream.start_time or 0) + length * (2 * number + 1) // (2 * count) for number in range(count)]
    jumps = not transparent or stream.codec_context.codec.intra_only
    frames = None if jumps else _decoded(container, stream, decoder)
    frame = None
    for number, time in enumerate(wanted):
        progress(number, count, "Choosing the picture")
        if frame is not None and not jumps and frame.pts is not None and frame.pts >= time:
            continue
        if jumps:
            with suppress(av.error.FFmpegError):  # of a file that nobody can move in, the frames come as they are
                container.seek(time, stream=stream)
            frames = _decoded(container, stream, decoder)
        for frame in frames:
            progress(number, count, "Choosing the picture")
            if frame.pts is None or frame.pts >= time or (jumps and transparent):
                break
        if frame is None:
            return
        yield frame
    progress(count, count, "Choosing the picture")


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    """A video file that is open for reading, with one stream of pictures at least. DecafError: it cannot be read, then or in the block."""
    try:
        with av.open(str(path.absolute()), container_options=MEDIA_OPTIONS, metadata_errors="replace") as container:
            if not container.streams.video:
                raise DecafError(f"{shown(path.name)} has no pictures. Give a video.")
            yield container
    except (av.error.FFmpegError, OSError) as error:
        raise DecafError(f"{shown(path.name)} cannot be read ({reason(error)}). Make it again.") from error


def _decoded(container: av.container.InputContainer, stream: av.VideoStream, decoder: av.VideoCodecContext | None) -> Iterator[av.VideoFrame]:
    for packet in container.demux(stream):
        yield from packet.decode() if decoder is None else decoder.decode(packet if packet.size else None)


def _has_alpha(pictures: av.VideoFrame | av.VideoStream) -> bool:
    return pictures.format is not None and any(part.is_alpha for part in pictures.format.components)


def _pixels(frame: av.VideoFrame, deep: bool = False) -> np.ndarray:
    return frame.to_ndarray(format=_FORMATS[deep][_has_alpha(frame)])


_FORMATS = {False: ("rgb24", "rgba"), True: ("rgb48le", "rgba64le")}


def _alpha_decoder(stream: av.VideoStream) -> av.VideoCodecContext | None:
    """FFmpeg's own VP8 and VP9 decoders leave alpha out; libvpx has it. None: the stream's own decoder will do."""
    name = stream.codec_context.name if stream.codec_context else ""
    transparent = {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") == "1"
    if transparent and name in ("vp8", "vp9"):
        with suppress(av.error.FFmpegError, ValueError):
            return av.CodecContext.create(f"libvpx-{name}" if name == "vp9" else "libvpx", "r")
    return None
