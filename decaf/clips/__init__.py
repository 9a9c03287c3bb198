"""Frames in, video out: clips from files, folders and tensors, read a few frames at a time, and video files written."""

from .base import Clip, clip_from_images
from .identity import check_same_clip, check_tracks, clip_info, thumbnails
from .open import open_clip
from .window import Window, open_window
from .write import write_video

__all__ = [
    "Clip", "Window", "check_same_clip", "check_tracks", "clip_from_images", "clip_info", "open_clip", "open_window", "thumbnails", "write_video",
]  # fmt: skip
