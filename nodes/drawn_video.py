"""A VIDEO that is drawn when somebody reads it, and not before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from comfy_api.latest import Input, InputImpl


class DrawnVideo(Input.Video):
    """To whoever reads it, the VIDEO of a file. `draw` writes that file to `path` at the first use, and again should it have gone; what it
    raises comes to who reads."""

    def __init__(self, path: Path, draw: Callable[[Path], None]):
        self._path, self._draw, self._lock = path, draw, threading.Lock()

    def file(self):
        with self._lock:
            if not self._path.is_file():
                self._draw(self._path)
        return InputImpl.VideoFromFile(str(self._path))

    # ComfyUI's own answers of the base class would read the whole video into memory.

    def get_components(self):
        return self.file().get_components()

    def save_to(self, *args, **kwargs):
        return self.file().save_to(*args, **kwargs)

    def as_trimmed(self, *args, **kwargs):
        return self.file().as_trimmed(*args, **kwargs)

    def get_stream_source(self):
        return self.file().get_stream_source()

    def get_dimensions(self):
        return self.file().get_dimensions()

    def get_duration(self):
        return self.file().get_duration()

    def get_frame_count(self):
        return self.file().get_frame_count()

    def get_frame_rate(self):
        return self.file().get_frame_rate()
