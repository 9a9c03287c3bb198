"""Frames of a video with their alpha."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import numpy as np

from ..clips.video_file import MEDIA_OPTIONS
from ..errors import DecafError, reason, shown


def read_with_alpha(path: Path, *, deep: bool = False) -> Iterator[np.ndarray]:
    """The frames of a video file, as they are stored: (H, W, 4) uint8 RGB and straight alpha, or (H, W, 3) if it has no alpha. `deep`: uint16,
    for files of more than 8 bits.

    DecafError: it cannot be read.
    """
    try:
        with av.open(str(path.absolute()), container_options=MEDIA_OPTIONS, metadata_errors="replace") as container:
            if not container.streams.video:
                raise DecafError(f"{shown(path.name)} has no pictures. Give a video.")
            stream = container.streams.video[0]
            decoder = _alpha_decoder(stream)
            for packet in container.demux(stream):
                for frame in packet.decode() if decoder is None else decoder.decode(packet if packet.size else None):
                    has_alpha = any(part.is_alpha for part in frame.format.components)
                    yield frame.to_ndarray(format=_FORMATS[deep][has_alpha])
    except (av.error.FFmpegError, OSError) as error:
        raise DecafError(f"{shown(path.name)} cannot be read ({reason(error)}). Make it again.") from error


_FORMATS = {False: ("rgb24", "rgba"), True: ("rgb48le", "rgba64le")}


def _alpha_decoder(stream: av.VideoStream) -> av.VideoCodecContext | None:
    """FFmpeg's own VP8 and VP9 decoders leave alpha out; libvpx has it. None: the stream's own decoder will do."""
    name = stream.codec_context.name if stream.codec_context else ""
    transparent = {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") == "1"
    if transparent and name in ("vp8", "vp9"):
        with suppress(av.error.FFmpegError, ValueError):
            return av.CodecContext.create(f"libvpx-{name}" if name == "vp9" else "libvpx", "r")
    return None
