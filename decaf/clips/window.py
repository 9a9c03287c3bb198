"""A part of a clip as a clip of its own."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from ..devices import memory_for
from ..errors import DecafError, shown
from ..paths import look_at
from ..report import Progress, silent
from .base import BUDGET, CLIP_REMEDY, Clip
from .video_file import VideoFile


class Window(Clip):
    """Frames start..stop-1 of another clip, numbered from 0. Nothing is copied."""

    def __init__(self, clip: Clip, start: int, stop: int):
        if not 0 <= start < stop <= len(clip):
            raise DecafError(f"There are no frames {start} to {stop - 1} in {clip.name}, which has frames 0 to {len(clip) - 1}.")
        self.name, self.frame_size, self.fps, self.time_base = clip.name, clip.frame_size, clip.fps, clip.time_base
        self._clip, self._start, self._length = clip, start, stop - start

    def __len__(self) -> int:
        return self._length

    def _read(self, index: int) -> Tensor:
        return self._clip[self._start + index]

    def ticks(self, index: int) -> int:
        return self._clip.ticks(self._start + index)

    def close(self) -> None:
        self._clip.close()


def open_window(
    path: str | os.PathLike, start: float, stop: float | None, *, budget: int = BUDGET, progress: Progress = silent
) -> Clip:
    """The frames of a video file that are shown from second `start` (0 or more) on and before second `stop`, None for its end.

    The rest of the file is neither decoded nor cached.

    Args:
        budget: bytes of decoded frames to cache.
        progress: called for every frame that is decoded; may raise to stop.

    Raises:
        DecafError: as `open_clip`; no frame in the window; frames without times.
    """
    path = Path(path)
    if look_at(path, "The clip") != "file":
        raise DecafError(f"There is no video file {shown(path)}. Correct the path.")
    with memory_for(f"to decode {path}", CLIP_REMEDY):
        video = VideoFile(path, budget=budget, seconds=(start, stop), progress=progress)
    return Window(video, video.lead, len(video))
