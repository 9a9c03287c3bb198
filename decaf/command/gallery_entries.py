"""What `decaf gallery` runs: made-up clips that training never saw, or clips of one's own from a list."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import DecafError, reason, shown
from ..paths import look_at
from ..settings import EFFECTS

_SHOWN = "spotlight"
LOOKS = (_SHOWN, *EFFECTS)
"""What can be made of an entry's clip: its objects in a spotlight, or one of `decaf.settings.EFFECTS`."""


@dataclass(frozen=True)
class Entry:
    """One run of the gallery.

    Attributes:
        title: what it shows, as a heading.
        query: what is masked.
        effect: one of LOOKS.
        note: a sentence that says what to look at; may be empty.
        not_this: what is left out, or None.
        clip: a video, a picture or a folder of pictures; None for a made-up clip.
        seed, frames: of the made-up clip.
        background: for "new background": a picture or a video; None for a plain one of our own.
        template: the workflow in ComfyUI that does the same, or nothing.
    """

    title: str
    query: str
    effect: str = _SHOWN
    note: str = ""
    not_this: str | None = None
    clip: Path | None = None
    seed: int = 0
    frames: int = 16
    background: Path | None = None
    template: str = ""


_CUT_OUT, _BLUR = "Cut Out by Text (Video)", "Blur by Text (Video)"

MADE_UP: tuple[Entry, ...] = (
    Entry(
        "Which one moves",
        "the shape moving left",
        note="No single frame can tell. A noun cannot, either.",
        seed=700014,
        template="Step by Step (Video)",
    ),
    Entry(
        "Which one comes last",
        "the shape that appears last",
        "cut out",
        note="The order of events decides.",
        seed=700040,
        template=_CUT_OUT,
    ),
    Entry("Where it is", "the one to the left of the red one", "grey rest", note="One object is named, another one is meant.", seed=700027),
    Entry("Cut out", "the largest thing", "cut out", seed=700004, template=_CUT_OUT),
    Entry("New background", "the leftmost thing", "new background", seed=700006, template=_BLUR),
    Entry("Made unrecognisable", "the yellow one", "pixelate", seed=700000, template=_BLUR),
    Entry("Several at once", "all crosses", note="The tiny bundled model counts badly.", seed=700026),
    Entry("Nothing to be found", "the purple star", note="It is not in the clip, so the mask is empty.", seed=700012),
)
"""Entries that need nothing but the package. The first three are what a noun cannot say."""


def read_list(path: Path) -> list[Entry]:
    """Entries from a JSON file: a list of objects with "clip" and "query", and any of "title", "effect", "note", "not" and "background". Paths
    are relative to the file. DecafError: it is no such list, or names a file that is not there."""
    named = f"--clips {shown(path)}"
    if look_at(path, "--clips") != "file":
        raise DecafError(f"{named} is no file. Give a JSON file with a list of clips and queries.")
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DecafError(f"{named} cannot be read ({reason(error)}). Change its permissions or give another file.") from error
    except (ValueError, RecursionError) as error:
        raise DecafError(
            f'{named} is not JSON ({reason(error)}). Write a list such as [{{"clip": "dog.mp4", "query": "the dog"}}].'
        ) from error
    if not isinstance(rows, list) or not rows:
        raise DecafError(f'{named} holds no list of entries. Write a list such as [{{"clip": "dog.mp4", "query": "the dog"}}].')
    return [_entry(row, number, named, path.parent) for number, row in enumerate(rows, 1)]


_KEYS = {
    "clip": "clip",
    "query": "query",
    "title": "title",
    "effect": "effect",
    "note": "note",
    "not": "not_this",
    "background": "background",
}


def _entry(row: object, number: int, named: str, folder: Path) -> Entry:
    where = f"{named}, entry {number},"
    if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
        raise DecafError(f"{where} is no object of texts. Give each entry at least a clip and a query.")
    if unknown := sorted(set(row) - set(_KEYS)):
        raise DecafError(f"{where} has '{shown(unknown[0], 40)}'; known are {', '.join(_KEYS)}.")
    if missing := [key for key in ("clip", "query") if not row.get(key, "").strip()]:
        raise DecafError(f"{where} has no {missing[0]}. Give it one.")
    given = {_KEYS[key]: value for key, value in row.items()}
    if given.get("effect", _SHOWN) not in LOOKS:
        raise DecafError(f"{where} has the effect '{shown(given['effect'], 40)}'. Choose one of {', '.join(LOOKS)}.")
    for key in ("clip", "background"):
        if key in given:
            given[key] = folder / given[key]
            if look_at(given[key], f"{key} of entry {number}") is None:
                raise DecafError(f"{where} names the {key} {shown(given[key])}, which does not exist. Check the path.")
    return Entry(**{"title": given["query"], **given})
