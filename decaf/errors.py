"""Errors that a user can act on."""

from __future__ import annotations

import os


class DecafError(ValueError):
    """Names the input, the state it is in, and what to do about it. Shown to users as it is."""


class OutputError(DecafError):
    """Results cannot be written: the disk is full, or a folder takes no files. Other clips and queries would fare no better."""


def shown(text: object, longest: int = 160) -> str:
    """A name or a value from outside, for a message: on one line, without its middle where it is long."""
    text = os.fsdecode(text) if isinstance(text, os.PathLike | bytes) else str(text)
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]}...{text[-longest // 4 :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def reason(error: BaseException) -> str:
    """Why the system refused, or the first sentence of what a library says, or the kind of error where it says nothing."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines() or [type(error).__name__]
    return shown(lines[0].split(". ")[0].rstrip("."))
