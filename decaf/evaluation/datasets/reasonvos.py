"""ReasonVOS (Bai et al., NeurIPS 2024, with VideoLISA): queries that need reasoning, about clips of four other sets.

    ROOT/JPEGImages/VIDEO/00000.jpg   ROOT/Annotations/SOURCE_VIDEO_OBJECT/00000.png   ROOT/meta_expressions.json

A picture of masks is of one object: all that is not 0.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import shown
from .base import Dataset, Item, NotThisDataset
from .layout import Layout, Video, item_of, meta_file, videos_of

NAME, TITLE = "reasonvos", "ReasonVOS"
SPLIT = "test"

_META = (
    "meta_expressions.json",
    "meta_expressions_v2.json",
    "{split}/meta_expressions.json",
    "meta_expressions/{split}/meta_expressions.json",
)


def splits(root: Path) -> list[str]:
    return [SPLIT] if meta_file(root, SPLIT, _META) else []


def read(root: Path, split: str | None = None) -> Dataset:
    """All items: the set is one split. Raises `NotThisDataset`, or DecafError for a file that is damaged."""
    split = split or SPLIT
    path = meta_file(root, split, _META)
    if path is None:
        raise NotThisDataset(f"{shown(root)} has no meta_expressions.json.")
    notes: list[str] = []
    videos = videos_of(path, notes)
    if not is_reasonvos(videos):
        raise NotThisDataset(f"The clips in {shown(path)} have no source, as those of ReasonVOS have.")
    layout = Layout(root, split)
    items = [item for video in videos for item in _items(layout, video)]
    # Its own script leaves out what is missing; all others count it as 0.
    return Dataset(NAME, TITLE, split, tuple(items), counts_missing=False, notes=tuple(notes))


def is_reasonvos(videos: list[Video]) -> bool:
    return any("source" in video.fields for video in videos)


def _items(layout: Layout, video: Video) -> list[Item]:
    frames, _, problem = layout.frames(video)
    source = str(video.fields.get("source", ""))
    items = []
    for expression in video.expressions:
        truth = None
        if frames is not None:
            ids = expression.ids("obj_id") or []
            truth = (
                layout.pictures(f"{source}_{video.name}_{ids[0]}", frames, None) if len(ids) == 1 else "It names no single object (obj_id)."
            )
        sentence = expression.fields.get("is_sent")
        form = () if sentence is None else ("sentence" if str(sentence).lower() in ("1", "true", "yes") else "phrase",)
        items.append(item_of(video, expression, frames, problem, truth, (f"from {source}", *form)))
    return items
