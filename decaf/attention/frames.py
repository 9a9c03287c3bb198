"""Which frames of a clip the model is shown."""

from __future__ import annotations

import re

import numpy as np

from ..errors import DecafError, shown
from ..settings import MOST_KEY_FRAMES, AttentionSettings

LOOKED_AT = 6
"""Frames in which the query is looked for, for each key frame."""

PIECE = 8
"""Frames among these of one piece of a clip: the model is asked about each piece as about a video."""


def key_frames(length: int, most: int = AttentionSettings.max_key_frames) -> tuple[int, ...]:
    """Clip indices of min(length, most) frames, evenly spread from the first to the last one and rounded down."""
    if length < 1:
        raise DecafError("The clip has no frames. Load a clip with at least one.")
    if not 1 <= most <= MOST_KEY_FRAMES:
        raise DecafError(f"{most} key frames were asked for; ask for at least one and at most {MOST_KEY_FRAMES}.")
    count = min(length, most)
    return tuple(np.linspace(0, length - 1, count).astype(int).tolist())


def asked_frames(length: int, settings: AttentionSettings) -> range:
    """Clip indices of the part of a clip of `length` frames that is asked about. DecafError: it is empty, or not in the clip."""
    first, last = settings.first_frame, length - 1 if settings.last_frame is None else settings.last_frame
    for name, frame in (("first", first), ("last", last)):
        if not 0 <= frame < max(length, 1):
            raise DecafError(f"The {name} frame is {frame}, but the clip has frames 0 to {length - 1}. Give one of these.")
    if last < first:
        raise DecafError(f"The first frame is {first} and the last one {last}, so there is nothing between them. Exchange the two.")
    return range(first, last + 1)


def shown_frames(length: int, settings: AttentionSettings) -> tuple[int, ...]:
    """Clip indices, ascending, of the key frames of a clip of `length` frames: those chosen by hand, else evenly spread over the part that is
    asked about. DecafError: that part, or a frame chosen by hand, is not in the clip; or there are too many."""
    if length < 1:
        return key_frames(length)  # which says so
    part = asked_frames(length, settings)
    if not settings.key_frames:
        return tuple(part.start + index for index in key_frames(len(part), settings.shown_key_frames))
    chosen = sorted({*settings.key_frames})
    if len(chosen) > MOST_KEY_FRAMES:
        raise DecafError(f"{len(chosen)} key frames were chosen; choose at most {MOST_KEY_FRAMES}.")
    outside = [frame for frame in chosen if frame not in part]
    if outside:
        named = f"the clip has frames 0 to {length - 1}" if len(part) == length else f"the frames asked about are {part.start} to {part[-1]}"
        raise DecafError(f"Key frame {outside[0]} cannot be shown: {named}. Choose key frames among these.")
    return tuple(chosen)


def looked_at_frames(length: int, settings: AttentionSettings) -> tuple[int, ...]:
    """Clip indices of the frames in which the query is looked for before key frames are chosen; none where it is not, or where every frame is a key
    frame anyway."""
    part = asked_frames(length, settings)
    if settings.key_frames or not settings.looks_for_key_frames or len(part) <= settings.shown_key_frames:
        return ()
    return tuple(part.start + index for index in key_frames(len(part), min(LOOKED_AT * settings.shown_key_frames, MOST_KEY_FRAMES)))


def read_key_frames(text: str) -> tuple[int, ...]:
    """Numbers of frames with commas or spaces between them; none of an empty text. DecafError: something else is written."""
    words = text.replace(",", " ").split()
    for word in words:
        if not re.fullmatch(r"\d{1,9}", word, re.ASCII):
            raise DecafError(f"The key frames hold '{shown(word, 40)}', which is no number of a frame. Write for example 0, 12, 40; or nothing.")
    return tuple(map(int, words))
