"""Ref-YouTube-VOS (Seo et al., ECCV 2020). The masks of `valid` are with a server; those of `train` are pictures.

ROOT/meta_expressions/valid/meta_expressions.json   ROOT/valid/JPEGImages/VIDEO/00000.jpg   ROOT/meta_expressions/test/meta_expressions.json
ROOT/train/JPEGImages, ROOT/train/Annotations/VIDEO/00000.png
"""

from __future__ import annotations

from pathlib import Path

from ...errors import shown
from . import ref_davis17
from .base import Dataset, Item, NotThisDataset
from .layout import Layout, Video, item_of, meta_file, videos_of

NAME, TITLE = "ref-youtube-vos", "Ref-YouTube-VOS"
SPLITS = ("valid", "test", "train")

# Not all places that are looked in elsewhere: `valid/meta_expressions.json` is MeViS.
_META = ("meta_expressions/{split}/meta_expressions.json", "meta_expressions/{split}.json", "meta_expressions_{split}.json")


def splits(root: Path) -> list[str]:
    return [split for split in SPLITS if meta_file(root, split, _META)]


def read(root: Path, split: str | None = None) -> Dataset:
    """The items of a split, by default `valid`. Raises `NotThisDataset`, or DecafError for a file that is damaged."""
    split = split or "valid"
    path = meta_file(root, split, _META)
    if path is None:
        raise NotThisDataset(f"{shown(root)} has no meta_expressions/{split}/meta_expressions.json.")
    notes: list[str] = []
    videos = videos_of(path, notes)
    layout = Layout(root, split)
    if not is_ref_youtube_vos(videos) or ref_davis17.marks(root) or (split == "valid" and ref_davis17.in_fours(videos)):
        raise NotThisDataset(f"The expressions in {shown(path)} are not those of Ref-YouTube-VOS.")
    if split == "valid":
        videos = _without_test(root, videos, notes)
    hidden = split != "train"
    items = [item for video in videos for item in _items(layout, video, hidden)]
    return Dataset(NAME, TITLE, split, tuple(items), hidden, notes=tuple(notes), submission=submission_name)


def is_ref_youtube_vos(videos: list[Video]) -> bool:
    fields = [one.fields for video in videos for one in video.expressions]
    others = any("type_id" in one or "anno_id" in one or "exp_text" in one for one in fields) or any(
        "source" in video.fields for video in videos
    )
    return bool(fields) and not others


def _without_test(root: Path, videos: list[Video], notes: list[str]) -> list[Video]:
    """The file of the split `valid` lists the clips of the split `test`, too, which the server of `valid` does not score."""
    path = root / "meta_expressions/test/meta_expressions.json"
    if not path.is_file():
        return videos
    test = {video.name for video in videos_of(path, notes)}
    left = [video for video in videos if video.name not in test]
    if len(left) < len(videos):
        notes.append(f"Of the clips that are listed with valid, {len(videos) - len(left)} of the split test are left out.")
    return left


def _items(layout: Layout, video: Video, hidden: bool) -> list[Item]:
    frames, _, problem = layout.frames(video)
    items = []
    for expression in video.expressions:
        truth = None
        if not hidden and frames is not None:
            truth = ref_davis17.object_truth(layout, video, expression, frames)
        items.append(item_of(video, expression, frames, problem, truth))
    return items


def submission_name(item: Item, frame: str) -> str:
    """In the zip file that the server takes: all in a folder Annotations."""
    return f"Annotations/{item.name}/{frame}.png"
