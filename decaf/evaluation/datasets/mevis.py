"""MeViS (Ding et al., ICCV 2023): expressions about motion. `valid_u` has its masks as run lengths; those of `valid` are with a server.

ROOT/valid_u/JPEGImages/VIDEO/00000.jpg   ROOT/valid_u/meta_expressions.json   ROOT/valid_u/mask_dict.json
ROOT/valid/JPEGImages/VIDEO/00000.jpg     ROOT/valid/meta_expressions.json
"""

from __future__ import annotations

from pathlib import Path

from ...errors import shown
from .base import Dataset, Item, NotThisDataset
from .layout import Layout, Video, item_of, meta_file, videos_of

NAME, TITLE = "mevis", "MeViS"
SPLITS = ("valid_u", "valid", "train", "test")

NO_TARGET = "no target"


def splits(root: Path) -> list[str]:
    return [split for split in SPLITS if _meta(root, split)]


def _meta(root: Path, split: str) -> Path | None:
    """A root may be the split's own folder, as it comes out of its archive."""
    if (root / split).is_dir() or (root / "meta_expressions" / split).is_dir():
        found = meta_file(root, split)
        return None if found == root / "meta_expressions.json" else found
    own = root / "meta_expressions.json"
    if own.is_file() and (root / "JPEGImages").is_dir():
        return (
            own if split == (root.name if root.name in SPLITS else "valid_u" if (root / "mask_dict.json").is_file() else "valid") else None
        )
    return None


def read(root: Path, split: str | None = None) -> Dataset:
    """The items of a split; by default of one whose masks are there. Raises `NotThisDataset`, or DecafError for a file that is damaged."""
    there = splits(root)
    split = split or next(iter(there), None)
    path = _meta(root, split) if split else None
    if path is None:
        raise NotThisDataset(f"{shown(root)} has no {split or 'valid_u'}/meta_expressions.json.")
    notes: list[str] = []
    videos = videos_of(path, notes)
    if not is_mevis(videos, hidden=(root / "valid_u").is_dir() or path.parent.parent.name != "meta_expressions"):
        raise NotThisDataset(f"The expressions in {shown(path)} are not those of MeViS.")
    layout = Layout(root, split)
    masked = layout.mask_dict_file is not None
    hidden = not masked and split in ("valid", "test")
    items = [item for video in videos for item in _items(layout, video, masked, hidden)]
    if not masked and not hidden:
        notes.append(f"There is no mask_dict.json for {split}: no figures can be computed. Unpack it beside meta_expressions.json.")
    return Dataset(NAME, TITLE, split, tuple(items), hidden, notes=tuple(notes), submission=submission_name)


def is_mevis(videos: list[Video], *, hidden: bool) -> bool:
    """Whether these are its expressions: with numbers of annotations and no type; in a hidden split with nothing but the sentence."""
    expressions = [one for video in videos for one in video.expressions]
    if (
        not expressions
        or any("type_id" in one.fields or "exp_text" in one.fields for one in expressions)
        or any("source" in v.fields for v in videos)
    ):
        return False
    return any("anno_id" in one.fields for one in expressions) or (hidden and not any("obj_id" in one.fields for one in expressions))


def _items(layout: Layout, video: Video, masked: bool, hidden: bool) -> list[Item]:
    frames, listed, problem = layout.frames(video)
    items = []
    for expression in video.expressions:
        truth, tags = None, ()
        if masked:
            ids = expression.ids("anno_id")
            if ids is None:
                truth = "Its true masks are not named (anno_id)."
            elif frames is not None:
                truth = layout.run_lengths(ids, listed, frames)
                tags = () if ids else (NO_TARGET,)
        elif not hidden:
            truth = "There is no mask_dict.json with its true masks."
        items.append(item_of(video, expression, frames, problem, truth, tags))
    return items


def submission_name(item: Item, frame: str) -> str:
    """In the zip file that the server takes: the clips' folders at the top."""
    return f"{item.name}/{frame}.png"
