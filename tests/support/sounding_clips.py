"""Clips with sound: numbered frames, and two tones that rise, so that every moment sounds different from every other."""

from fractions import Fraction

import av
import numpy as np
import torch
from video_files import numbered

from decaf.finishing import tracks_from_masks


def tones(seconds, rate):
    """(2, n) float32: the left tone rises, the right one rises otherwise."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([np.sin(2 * np.pi * (200 * time + 150 * time**2)), np.sin(2 * np.pi * (500 * time + 90 * time**2))]).astype(np.float32) * 0.4


def write_clip(
    path, frames=30, *, size=(48, 64), rate=Fraction(24000, 1001), codec="libx264", times=None, sound="aac", samples=44100, seconds=None
):
    """`frames`: how many numbered ones, or (T, H, W, 3) uint8. `times`: time stamps in units of 1/1000 s. `sound`: the encoder, or None."""
    pictures = [numbered(index % 200, size) for index in range(frames)] if isinstance(frames, int) else frames
    size, frames = pictures[0].shape[:2], len(pictures)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        audio = file.add_stream(sound, rate=samples, layout="stereo") if sound else None
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(pictures[index], format="rgb24").reformat(format="yuv420p")
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if audio:
            wave = tones(seconds or frames / rate, samples)
            for start in range(0, wave.shape[1], 1024):
                piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, start : start + 1024]), format="fltp", layout="stereo")
                piece.sample_rate, piece.pts, piece.time_base = samples, start, Fraction(1, samples)
                file.mux(audio.encode(piece))
            file.mux(audio.encode())
    return path


def times_of(path):
    """When each frame is shown, and the end of the last where the file says it, in seconds."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        times = [frame.pts * stream.time_base for frame in file.decode(stream)]
        end = None if stream.duration is None else ((stream.start_time or 0) + stream.duration) * stream.time_base
        return times, end


def heard(path):
    """(second at which the sound begins, (2, n) float32 samples, samples per second)."""
    with av.open(str(path)) as file:
        resampler = av.AudioResampler(format="fltp")
        frames = [piece for frame in file.decode(audio=0) for piece in resampler.resample(frame)]
    return frames[0].pts * frames[0].time_base, np.concatenate([frame.to_ndarray() for frame in frames], axis=1), frames[0].sample_rate


def soft_masks(frames, size=(48, 64)):
    """Tracks of a slanted band with a soft edge, which moves."""
    xs = torch.arange(size[1])[None, None] - torch.arange(frames)[:, None, None] - torch.arange(size[0])[None, :, None] / 4
    return tracks_from_masks(((xs - 8) / 6).clamp(0, 1) * ((40 - xs) / 6).clamp(0, 1))
