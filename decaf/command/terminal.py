"""What the command shows: lines and progress bars."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..report import Progress, silent


def say(stream, text: str) -> None:
    """Writes lines, whatever they hold: what the stream's encoding lacks, and what would command a terminal, is escaped."""
    text = "".join(letter if letter == "\n" or not unicodedata.category(letter) == "Cc" else f"\\x{ord(letter):02x}" for letter in text)
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


class _Bars:
    """One bar per step. Reports go to whichever step they name; a step that is left behind keeps its last state on the screen."""

    def __init__(self):
        self.bar = None

    def __call__(self, done: int, total: int, what: str) -> None:
        from tqdm import tqdm

        if self.bar is None or self.bar.desc != what:
            self.close()
            self.bar = tqdm(total=total, leave=True, dynamic_ncols=True, file=sys.stderr)
            self.bar.set_description_str(what)
        if (self.bar.n, self.bar.total) != (done, total):  # most reports only ask whether to go on
            self.bar.n, self.bar.total = done, total
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress]:
    """Where work is reported to: bars, if somebody is there to watch them."""
    bars = _Bars() if sys.stderr.isatty() and not quiet else None
    with suppress(Exception):  # a transformers that cannot be imported is explained by whoever needs it
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # there is one of our own
    try:
        yield bars or silent
    finally:
        if bars:
            bars.close()
