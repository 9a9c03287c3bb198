"""Video files as clips: each frame once, in display order, upright. Random access gives the same pixels as a linear decode."""

from __future__ import annotations

import logging
import struct
import threading
from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from ..errors import DecafError, reason
from ..report import Progress, silent
from .base import BUDGET, MAX_PIXELS, OPENING, Clip, FrameCache

log = logging.getLogger(__name__)

_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,flv,live_flv,kux,rm,ogg,nut,nuv,nsv,mxf,gxf,lxf,dv,wtv,ty,pva,dhav,vivo,swf,"
    "mpeg,mpegts,mpegvideo,m4v,h261,h263,h264,hevc,vvc,evc,vc1,vc1test,av1,obu,ivf,avs2,avs3,cavsvideo,dirac,dnxhd,apv,mjpeg,mjpeg_2000,"
    "yuv4mpegpipe,gif,apng,flic,roq,smk,bink,film_cpk,cine,jpegxl_anim,"
    "bmp_pipe,dds_pipe,dpx_pipe,exr_pipe,gif_pipe,hdr_pipe,j2k_pipe,jpeg_pipe,jpegls_pipe,jpegxl_pipe,jpegxs_pipe,pam_pipe,pbm_pipe,pcx_pipe,"
    "pgm_pipe,png_pipe,ppm_pipe,psd_pipe,qoi_pipe,sgi_pipe,sunrast_pipe,tiff_pipe,webp_pipe,"
    "aac,ac3,aiff,amr,ape,caf,dts,eac3,flac,mp3,w64,wav,wv"
)
"""FFmpeg demuxers that read one file and nothing else. FFmpeg chooses by content, whatever the file's name is. Others (playlists, SDP, concat)
follow addresses in the file, to other files and into the network. Audio formats are listed so that the message can say there is no picture."""

MEDIA_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
"""Of every container that is opened for reading."""


class VideoFile(Clip):
    """A video file.

    Opening decodes the whole file once: only that shows how many frames there are and that all can be decoded. The frames are cached if they
    fit `budget` bytes; otherwise the most recently used ones are. A step forward continues decoding. A step backward seeks to the nearest
    earlier frame where decoding can start, and decodes a run of frames that fills the budget.

    `seconds`: (start, stop), of which stop may be None. Only this part of the file is read, from the nearest frame at or before `start` where
    decoding can start: frames 0 .. `lead` - 1 lie before `start`, the others at or after it and before `stop`. `open_window` hides the lead.
    """

    def __init__(
        self, path: Path, *, budget: int = BUDGET, seconds: tuple[float, float | None] | None = None, progress: Progress = silent
    ):
        self.name, self._path = path.name, path
        self.lead = 0
        self._lock = threading.Lock()  # the stream has a single position: two threads would get each other's frames
        self._times: list[int | None] = []
        self._starts = [0]  # indices of frames where decoding can start: 0 after opening, the others after a seek
        self._begin: int | None = None  # the time to seek in a stream that was just opened, where it is not read from its beginning
        self._stream = _Stream(path)
        self._open(budget, seconds, progress)
        self.fps = self._rate()
        if _ascending(self._times):
            self.time_base = self._stream.time_base
        self._next, self._last = len(self), -1  # the frame that the stream decodes next, and the one requested last
        if len(self) - self.lead <= self._cache.capacity:
            self._stream.close()

    def __len__(self) -> int:
        return len(self._times)

    def ticks(self, index: int) -> int:
        return self._times[index]

    def close(self) -> None:
        with self._lock:
            self._stream.close()

    def _open(self, budget: int, seconds: tuple[float, float | None] | None, progress: Progress) -> None:
        try:
            self._index(budget, *self._times_of(seconds), progress)
        except BaseException:  # also a cancel: an open file could not be moved or deleted on Windows
            self._stream.close()
            raise

    def _times_of(self, seconds: tuple[float, float | None] | None) -> tuple[int | None, int | None]:
        """Start and stop in units of the stream's time, None for no limit; rounded as ComfyUI does. Leaves the stream at or before start."""
        if seconds is None:
            return None, None
        start, stop = (None if one is None else int(one / self._stream.time_base) for one in seconds)
        if start > 0:
            first = next(self._stream.seek(start), None)
            if first is not None and first.pts is not None and first.pts <= start:
                self._stream.put_back(first)
                self._begin = start
            else:  # the format cannot tell where it has led
                self._stream.close()
                self._stream = _Stream(self._path)
        return start, stop

    def _index(self, budget: int, start: int | None, stop: int | None, progress: Progress) -> None:
        expected = self._stream.frame_count if start is None else 0  # of the whole file; it may have more, or say nothing
        for frame in self._stream.frames():
            index = len(self._times)
            progress(index, max(expected, index + 1), OPENING)
            if start is not None:
                if frame.pts is None:
                    raise DecafError(f"The frames of {self._path} do not say when they are shown, so it cannot be trimmed; convert it.")
                if stop is not None and frame.pts >= stop:
                    break
                self.lead += index == self.lead and frame.pts < start
            if index == 0:
                self._turn, self._mirror = _orientation(frame)
            size = (frame.width, frame.height) if self._turn % 2 else (frame.height, frame.width)
            if index == 0:
                self.frame_size = size
                self._cache = FrameCache(size, budget)
            elif size != self.frame_size:
                raise DecafError(
                    f"The frames of {self._path} have different sizes: frame 0 is {self.frame_size[1]}x{self.frame_size[0]}, "
                    f"frame {index} is {size[1]}x{size[0]}; convert it to one size."
                )
            self._times.append(frame.pts)
            if frame.key_frame and index:
                self._starts.append(index)
            if self.lead <= index < self.lead + self._cache.capacity:
                self._cache.put(index, self._upright(frame))
        if start is not None and len(self) == self.lead:
            raise DecafError(
                f"{self._path} has no frame in the part that was cut out of it. Let the trim start before the end of the video, and last longer "
                "than a frame."
            )
        if not self._times:
            raise DecafError(f"No frame of {self._path} could be decoded; the file is damaged or cut off. Copy or convert it again.")
        self._stream.report(len(self._times), start is None)
        if not _ascending(self._times):
            self._starts = [0]  # without distinct timestamps, the frame after a seek cannot be identified

    def _rate(self) -> Fraction | None:
        rate = self._stream.rate
        if rate is None and len(self) > 1 and None not in (self._times[0], self._times[-1]) and self._times[-1] > self._times[0]:
            rate = (len(self) - 1) / ((self._times[-1] - self._times[0]) * self._stream.time_base)
        return rate

    def _read(self, index: int) -> Tensor:
        with self._lock:
            return self._frame(index)

    def _frame(self, index: int) -> Tensor:
        frame = self._cache.get(index)
        if frame is None:
            backward = index == self._last - 1
            first = max(index + 1 - self._cache.capacity, 0) if backward else index
            for decoded_index, decoded in self._decode(first, index + 1):
                frame = self._upright(decoded)
                self._cache.put(decoded_index, frame)
        self._last = index
        return frame

    def _upright(self, frame: av.VideoFrame) -> Tensor:
        """(H, W, 3) uint8 RGB; alpha is dropped, more than 8 bits are rounded."""
        try:
            pixels = frame.to_ndarray(format="rgb24")
        except (av.error.FFmpegError, ValueError) as error:
            raise DecafError(
                f"A frame of {self._path} cannot be turned into RGB ({frame.format.name}: {reason(error)}). "
                "The file is damaged, or has to be converted, for example to H.264."
            ) from error
        if self._mirror:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(np.rot90(pixels, self._turn)))

    def _decode(self, first: int, stop: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames first..stop-1 with their indices."""
        if self._stream.closed:
            self._open_again()
        start = self._starts[bisect_right(self._starts, first) - 1]
        if not start <= self._next <= first:
            self._seek(start)
        for frame in self._stream.frames():
            index, self._next = self._next, self._next + 1
            if index >= first:
                yield index, frame
            if self._next == stop:
                return
        raise DecafError(f"{self._path} had {len(self)} frames when it was opened but now ends at frame {self._next}; open it again.")

    def _seek(self, start: int) -> None:
        """Moves the stream to `start` or, in formats where seeking overshoots, to an earlier frame."""
        index_of = {self._times[index]: index for index in self._starts}
        for target in reversed([index for index in self._starts[1:] if index <= start]):
            for frame in self._stream.seek(self._times[target]):
                reached = index_of.get(frame.pts)
                if reached is not None:
                    if reached <= start:
                        self._stream.put_back(frame)
                        self._next = reached
                        return
                    break
        self._open_again()

    def _open_again(self) -> None:
        """Leaves the stream at frame 0."""
        self._stream.close()
        self._stream, self._next = _Stream(self._path), 0
        if self._begin is not None:
            self._stream.seek(self._begin)


def _ascending(times: list[int | None]) -> bool:
    return None not in times and all(a < b for a, b in zip(times, times[1:], strict=False))


class _Stream:
    """The video stream of an open file. Decoding errors are counted and skipped."""

    def __init__(self, path: Path):
        self._path, self.closed = path, False
        try:
            # Absolute, because FFmpeg takes text before a colon, as in "10:30.mp4", for a protocol, and http would use the network.
            # metadata_errors: titles may be in any encoding, and are not used.
            self._container = av.open(str(path.absolute()), container_options=MEDIA_OPTIONS, metadata_errors="replace")
        except av.error.FFmpegError as error:
            raise DecafError(
                f"{path} could not be opened as a video ({error.strerror}); it is empty, cut off, damaged, a playlist or of an unknown format."
            ) from error
        # Cover art of an audio file is a video stream of one picture.
        streams = [stream for stream in self._container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            kinds = sorted({stream.type for stream in self._container.streams})
            self._container.close()
            raise DecafError(
                f"{path} has no video stream ({', '.join(kinds) or 'no stream'} only); give a video, an image or a folder of images."
            )
        if streams[0].codec_context is None:
            self._container.close()
            raise DecafError(
                f"The pictures of {path} are in a format that is not known here, or the file is damaged; convert it, for example to H.264."
            )
        self._video = streams[0]
        width, height = self._video.codec_context.width, self._video.codec_context.height
        if width * height > MAX_PIXELS:
            self._container.close()
            raise DecafError(
                f"The frames of {path} are {width}x{height} by its header, more than {MAX_PIXELS // 1_000_000} million pixels; the file is damaged, "
                "or has to be made smaller."
            )
        self._video.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the size inside the stream may differ from the header's
        self._video.thread_type = "AUTO"
        self.rate, self.time_base = self._video.average_rate, self._video.time_base
        self.frame_count, self._errors = self._video.frames, 0  # as the header says; 0 if it does not
        self._frames = self._decoded()

    def frames(self) -> Iterator[av.VideoFrame]:
        """The frames not decoded yet. Iteration may stop and continue later."""
        return self._frames

    def put_back(self, frame: av.VideoFrame) -> None:
        self._frames = _first_then(frame, self._frames)

    def seek(self, time: int) -> Iterator[av.VideoFrame]:
        """The frames from a point at or before `time`, as far as the format can seek."""
        try:
            self._container.seek(time, stream=self._video)
        except av.error.FFmpegError:
            self._frames = iter(())
        else:
            self._frames = self._decoded()
        return self._frames

    def report(self, decoded: int, whole: bool) -> None:
        """Tells of errors so far. `whole`: the file was decoded to its end."""
        if self._errors:
            of_all = f" of {self.frame_count}" if whole and self.frame_count else ""
            log.warning("%s is damaged or cut off: %d%s frames could be decoded.", self._path, decoded, of_all)

    def close(self) -> None:
        self._frames, self.closed = iter(()), True
        self._container.close()

    def _decoded(self) -> Iterator[av.VideoFrame]:
        for packet in self._packets():
            self._errors += packet is not None and packet.is_corrupt  # true for the last packet of a cut-off file
            try:
                yield from self._video.decode(packet)
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                self._errors += 1

    def _packets(self) -> Iterator[av.Packet | None]:
        """Packets up to the end. If the end cannot be read, a final None, which makes the decoder return its buffered frames."""
        failed = False
        while True:
            try:
                for packet in self._container.demux(self._video):
                    failed = False
                    yield packet
                return
            except av.error.FFmpegError:
                self._errors += 1
                if failed:  # twice in a row: no progress
                    yield None
                    return
                failed = True


def _first_then(frame: av.VideoFrame, rest: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    yield frame
    yield from rest


def _orientation(frame: av.VideoFrame) -> tuple[int, bool]:
    """Display orientation: quarter turns counterclockwise, and whether to mirror left and right before turning.

    Called for the first frame only: reading a frame's side data puts it into a reference cycle, and such frames would pile up.
    """
    for side in frame.side_data:
        if side.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack("=9i", bytes(side))[:5]  # a pixel at (x, y) is shown at (a x + c y, b x + d y)
            mirror = a * d - b * c < 0
            if mirror:
                a, b = -a, -b
            # Where the x axis goes: right, up, left or down.
            turn = (0 if a > 0 else 2) if abs(a) >= abs(b) else (1 if b < 0 else 3)
            return turn, mirror
    return 0, False
