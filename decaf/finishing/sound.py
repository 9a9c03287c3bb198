"""The sound of a clip, carried into the file that is made of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

from ..clips.video_file import MEDIA_OPTIONS
from ..errors import reason

_COPIED = {
    ".mp4": {"aac", "mp3", "ac3", "eac3", "alac", "opus"},
    ".mov": {"aac", "mp3", "ac3", "eac3", "alac", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_s16be", "pcm_s24be", "pcm_f32le"},
    ".webm": {"opus", "vorbis"},
}
"""Codecs that players and editing programs expect in such a file: their packets are copied. Other sound is encoded anew."""

_ENCODERS = {".mp4": "aac", ".mov": "pcm_s24le", ".webm": "libopus"}

_RATES = {"aac": (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350), "libopus": (48000,)}
"""Samples per second that an encoder takes; others take any."""

_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


@dataclass(frozen=True)
class SoundFile:
    """The sound of a file. `window`: the seconds of it, in the time of the file, that are taken; None takes all, as it is."""

    path: Path
    window: tuple[Fraction, Fraction] | None = None


@dataclass(frozen=True)
class SoundWave:
    """Sound in memory: (channels, samples) float -1..1, with `rate` samples per second. It begins with the first frame."""

    waveform: Tensor
    rate: int


class Sound(ABC):
    """Sound that goes into a file beside its pictures.

    Attributes:
        begin: second, in the time of its source, with which it begins.
        note: what there is to say of it when all is written, or nothing.
    """

    begin: Fraction = Fraction(0)
    note: str = ""

    @abstractmethod
    def add_to(self, output: av.container.OutputContainer, suffix: str, origin: Fraction) -> None:
        """Adds the stream, before anything is written. `origin`: the second, in the time of the source, with which the file begins."""

    @abstractmethod
    def write(self, until: Fraction | None) -> bool:
        """Writes what sounds before second `until` of the file, and says whether there is more; None: all the rest, and the end."""

    def close(self) -> None:  # noqa: B027, most hold nothing open
        """Lets go of the source."""


def open_sound(source: SoundFile | SoundWave | None) -> Sound | None:
    """The sound to be written, or None if there is none. One that cannot be read is a `Lost`, which only has its note."""
    if source is None:
        return None
    if isinstance(source, SoundWave):
        return _Encoded(_frames_of(source), source.rate, len(source.waveform), None) if source.waveform.shape[-1] else None
    try:
        container = av.open(str(source.path.absolute()), container_options=MEDIA_OPTIONS, metadata_errors="replace")
    except (av.error.FFmpegError, OSError):
        return None  # the pictures come from elsewhere, as images or in a format that holds no sound
    streams = container.streams.audio
    if not streams:
        container.close()
        return None
    # Without a codec context, FFmpeg has no decoder for it, and reading it could end the process.
    stream = next((one for one in streams if one.codec_context is not None and one.codec_context.sample_rate), None)
    if stream is None:
        container.close()
        return Lost(f"The sound of {source.path.name} is in a format that is not known here, so the result is silent.")
    return _OfFile(source, container, stream)


class Lost(Sound):
    """Sound that cannot be read."""

    def __init__(self, note: str):
        self.note = note

    def add_to(self, output, suffix, origin):
        """Nothing."""

    def write(self, until):
        return False


class _OfFile(Sound):
    """Copied packet by packet if all of it is wanted and the file can hold it, else encoded."""

    def __init__(self, source: SoundFile, container: av.container.InputContainer, stream: av.AudioStream):
        self._source, self._container, self._stream = source, container, stream
        self.begin = (stream.start_time or 0) * stream.time_base
        self._encoded: _Encoded | None = None
        self._waiting: av.Packet | None = None

    def add_to(self, output, suffix, origin):
        window = self._source.window
        if window is None and self._stream.codec.canonical_name in _COPIED[suffix]:
            self._output, self._origin = output, origin
            self._copy = output.add_stream_from_template(self._stream)
            self._packets = self._demuxed()
            return
        if window is not None:
            # A little early, because packets of some formats need the one before.
            self._container.seek(max(int((origin - 1) * av.time_base), 0), backward=True)
        frames = (frame for packet in self._demuxed() for frame in self._decoded(packet))
        context = self._stream.codec_context
        self._encoded = _Encoded(frames, context.sample_rate, context.layout.nb_channels, None if window is None else window[1])
        self._encoded.add_to(output, suffix, origin)

    def write(self, until):
        if self._encoded is not None:
            return self._encoded.write(until)
        while (packet := self._waiting or next(self._packets, None)) is not None:
            self._waiting = None
            if until is not None and packet.dts * packet.time_base - self._origin > until:
                self._waiting = packet
                return True
            shift = round(self._origin / packet.time_base)
            packet.dts -= shift
            if packet.pts is not None:
                packet.pts -= shift
            packet.stream = self._copy
            self._output.mux(packet)
        return False

    def close(self):
        self._container.close()

    def _demuxed(self) -> Iterator[av.Packet]:
        """The packets of the sound, up to where the file can no longer be read."""
        try:
            for packet in self._container.demux(self._stream):
                if packet.dts is not None:
                    yield packet
        except av.error.FFmpegError as error:
            self.note = f"The sound of {self._source.path.name} ends where the file is damaged ({reason(error)})."

    def _decoded(self, packet: av.Packet) -> list[av.AudioFrame]:
        try:
            return packet.decode()
        except av.error.FFmpegError as error:
            self.note = f"Parts of the sound of {self._source.path.name} are damaged ({reason(error)}) and left out."
            return []


class _Encoded(Sound):
    """Sound that is decoded, cut to the sample, and encoded.

    `frames`: decoded sound; each with its time. `end`: second of the source with which it ends, None for its own end.
    """

    def __init__(self, frames: Iterator[av.AudioFrame], rate: int, channels: int, end: Fraction | None):
        self._frames, self._rate, self._end = frames, rate, end
        self._layout = _LAYOUTS.get(channels, "stereo")
        self._done: int | None = None  # samples of the file that lie behind, sound or not

    def add_to(self, output, suffix, origin):
        codec = _ENCODERS[suffix]
        rates = _RATES.get(codec, (self._rate,))
        self._rate = self._rate if self._rate in rates else 48000
        if suffix == ".webm" and self._layout == "5.1":
            self._layout = "stereo"
        self._stream = output.add_stream(codec, rate=self._rate, layout=self._layout)
        if codec != "pcm_s24le":
            self._stream.bit_rate = 256_000
        self._output, self._origin = output, origin
        self._last = None if self._end is None else round((self._end - origin) * self._rate)
        self._pieces = self._resampled()

    def write(self, until):
        while until is None or self._done is None or Fraction(self._done, self._rate) <= until:
            piece = next(self._pieces, None)
            if piece is None:
                if until is None:
                    self._output.mux(self._stream.encode(None))
                return False
            self._encode(piece)
        return True

    def _encode(self, samples: np.ndarray) -> None:
        """`samples`: (channels, n) float32, which begin at sample `_done`."""
        begin = self._done
        self._done += samples.shape[1]
        stop = samples.shape[1] if self._last is None else min(samples.shape[1], self._last - begin)
        skipped = max(-begin, 0)
        if stop <= skipped:
            return
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, skipped:stop]), format="fltp", layout=self._layout)
        frame.sample_rate, frame.time_base, frame.pts = self._rate, Fraction(1, self._rate), begin + skipped
        self._output.mux(self._stream.encode(frame))

    def _resampled(self) -> Iterator[np.ndarray]:
        resampler = av.AudioResampler(format="fltp", layout=self._layout, rate=self._rate)
        for frame in self._frames:
            if self._done is None:
                begin = frame.pts * frame.time_base if frame.pts is not None else self._origin
                self._done = round((begin - self._origin) * self._rate)
            if self._last is not None and self._done >= self._last:
                return
            for piece in resampler.resample(frame):
                yield piece.to_ndarray()
        if self._done is not None:
            for piece in resampler.resample(None):
                yield piece.to_ndarray()


def _frames_of(sound: SoundWave) -> Iterator[av.AudioFrame]:
    """A few thousand samples at a time."""
    channels = len(sound.waveform)
    layout = _LAYOUTS.get(channels, "stereo")
    for start in range(0, sound.waveform.shape[-1], 4096):
        samples = sound.waveform[:, start : start + 4096].float().cpu().numpy()
        if channels not in _LAYOUTS:
            samples = np.repeat(samples.mean(0, keepdims=True), 2, axis=0)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = sound.rate, Fraction(1, sound.rate), start
        yield frame
