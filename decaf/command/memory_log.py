"""What memory a run holds, over time."""

from __future__ import annotations

import logging
import os
import threading
import time

from ..report import Progress, silent

log = logging.getLogger(__name__)

_BETWEEN_SAMPLES = 0.2


def resident_bytes() -> int | None:
    """Bytes of RAM that this process holds now. None anywhere but on Linux."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


class MemoryLog:
    """Watches the memory of this process in a thread while it is entered, and passes on the progress that it is called with.

    `peaks`: step -> most resident bytes seen during it, five times a second and when it began. `every`: seconds between two lines in the
    log, which say what is being done and, on Linux, how much is held.
    """

    def __init__(self, progress: Progress = silent, *, every: float = 10.0):
        self.peaks: dict[str, int] = {}
        self._progress, self._every = progress, every
        self._now = (0, 0, "start")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryLog:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    def __call__(self, done: int, total: int, what: str) -> None:
        begins = what != self._now[2]
        self._now = (done, total, what)
        if begins:
            self._sample()
        self._progress(done, total, what)

    def step(self, name: str) -> None:
        """A step begins that reports no progress."""
        self._now = (0, 0, name)
        self._sample()

    def _sample(self) -> int | None:
        held, step = resident_bytes(), self._now[2]
        if held is not None:
            self.peaks[step] = max(held, self.peaks.get(step, 0))
        return held

    def _watch(self) -> None:
        start, lines = time.monotonic(), 0
        while not self._ended.wait(_BETWEEN_SAMPLES):
            held, (done, total, what) = self._sample(), self._now
            if time.monotonic() - start >= lines * self._every:
                lines += 1
                memory = "" if held is None else f"{held / 1e6:6.0f} MB held  "
                log.info("%6.0f s  %s%s%s", time.monotonic() - start, memory, what, f" {done}/{total}" if total else "")
