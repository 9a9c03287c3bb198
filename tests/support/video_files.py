"""Video files whose frames carry their own number, for tests of decoding."""

import struct
from fractions import Fraction

import av
import numpy as np

BITS = 8


def numbered(index, size=(48, 64), seed=0):
    """(H, W, 3) uint8: the upper half shows `index` in binary as bright and dark columns, the lower half moving texture."""
    height, width = size
    picture = np.full((height, width, 3), 30, dtype=np.uint8)
    edges = np.linspace(0, width, BITS + 1).astype(int)
    for bit in range(BITS):
        picture[: height // 2, edges[bit] : edges[bit + 1]] = 220 if index >> bit & 1 else 30
    texture = np.random.default_rng(seed).integers(40, 200, (height // 8 + 33, width // 8 + 33, 3), dtype=np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    picture[height // 2 :] = texture[index : index + height - height // 2, index : index + width]
    return picture


def number_of(frame):
    """The number that a decoded frame shows."""
    frame = np.asarray(frame)
    height, width = frame.shape[:2]
    edges = np.linspace(0, width, BITS + 1).astype(int)
    columns = (slice(left + 2, right - 2) for left, right in zip(edges, edges[1:], strict=False))
    return sum((frame[2 : height // 2 - 2, column].mean() > 125) << bit for bit, column in enumerate(columns))


def encode(path, frames=40, *, size=(48, 64), codec="libx264", pixels="yuv420p", rate=25, times=None, options=None, container=None):
    """Encodes frames 0.. `frames`; `times`: their time stamps in units of 1/1000 s, for a variable frame rate."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(index, size), format="rgb24").reformat(format=pixels)
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def linear(path):
    """All frames of a file, decoded from its start to its end: list of (H, W, 3) uint8 arrays, not turned."""
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def set_display_matrix(path, a, b, c, d):
    """Makes an mp4 file ask for (x, y) to be shown at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    offset = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    data[offset : offset + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def set_edit_start(path, skip):
    """Makes an mp4 file start `skip` ticks of its media time base later, by its edit list."""
    data = bytearray(path.read_bytes())
    offset = data.index(b"elst") + 4 + 4 + 4
    duration, start = struct.unpack(">ii", data[offset : offset + 8])
    data[offset : offset + 8] = struct.pack(">ii", duration, start + skip)
    path.write_bytes(data)
