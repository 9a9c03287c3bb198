"""Opens a path as a clip."""

from __future__ import annotations

import os
from pathlib import Path

from ..devices import memory_for
from ..errors import DecafError, shown
from ..paths import look_at
from ..report import Progress, Report, silent
from .base import BUDGET, CLIP_REMEDY, IMAGE_SUFFIXES, Clip, ImageFiles, folder_images
from .video_file import VideoFile


def open_clip(path: str | os.PathLike, *, budget: int = BUDGET, progress: Progress | Report = silent) -> Clip:
    """Opens a clip.

    A damaged or cut-off video gives the frames that can be decoded, and a warning in the log. Only this file or folder is read: a playlist is
    refused.

    Args:
        path: a video file, a folder of images (natural order), or one image.
        budget: bytes of decoded frames to cache. A clip that fits is decoded once.
        progress: called for every frame; may raise to stop. Or a `Report`.

    Raises:
        DecafError: nothing at the path, no picture in it, frames of different sizes, or a damaged image.
    """
    path, progress = Path(path), Report.of(progress).progress
    kind = look_at(path, "The clip")
    if kind is None:
        raise DecafError(f"There is no file or folder {shown(path)}. Correct the path.")
    with memory_for(f"to decode {path}", CLIP_REMEDY):
        if kind == "folder":
            return ImageFiles(path.name, folder_images(path), budget=budget, progress=progress)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return ImageFiles(path.name, [path], budget=budget, progress=progress)
        return VideoFile(path, budget=budget, progress=progress)
