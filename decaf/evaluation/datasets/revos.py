"""ReVOS (Yan et al., ECCV 2024): queries that refer, that need reasoning, and that mean nothing in the clip.

ROOT/JPEGImages/SOURCE/.../VIDEO/00000.jpg   ROOT/meta_expressions_valid_.json   ROOT/mask_dict.json   ROOT/mask_dict_foreground.json
"""

from __future__ import annotations

from pathlib import Path

from ...errors import shown
from ..truth import RunLengthMasks, Truth
from .base import Dataset, Frames, Item, NotThisDataset
from .layout import Layout, Video, item_of, meta_file, order_of, read_json, videos_of

NAME, TITLE = "revos", "ReVOS"
SPLITS = ("valid", "train", "test")

REFERRING, REASONING, HALLUCINATION = "referring", "reasoning", "hallucination"
_TYPES = {"0": REFERRING, "1": REASONING, "2": HALLUCINATION}

_FOREGROUND = ("mask_dict_foreground.json", "{split}/mask_dict_foreground.json")


def splits(root: Path) -> list[str]:
    return [split for split in SPLITS if meta_file(root, split)]


def read(root: Path, split: str | None = None) -> Dataset:
    """The items of a split, by default `valid`. Raises `NotThisDataset`, or DecafError for a file that is damaged."""
    split = split or next(iter(splits(root)), "valid")
    path = meta_file(root, split)
    if path is None:
        raise NotThisDataset(f"{shown(root)} has no meta_expressions_{split}_.json.")
    notes: list[str] = []
    videos = videos_of(path, notes)
    if not is_revos(videos):
        raise NotThisDataset(f"The expressions in {shown(path)} have no types, as those of ReVOS have (type_id).")
    layout = Layout(root, split)
    if layout.mask_dict_file is None:
        notes.append("There is no mask_dict.json: no figures can be computed. Unpack it beside the folder of frames.")
    file = next((found for pattern in _FOREGROUND if (found := root / pattern.format(split=split)).is_file()), None)
    foreground = read_json(file) if file else None
    if foreground is None and layout.mask_dict_file is not None:
        notes.append(
            "There is no mask_dict_foreground.json: for the score R all objects that a clip's expressions name are its foreground."
        )
    items = [item for video in videos for item in _items(layout, video, foreground)]
    return Dataset(NAME, TITLE, split, tuple(items), averaged=(REFERRING, REASONING), notes=tuple(notes))


def is_revos(videos: list[Video]) -> bool:
    return any("type_id" in one.fields for video in videos for one in video.expressions)


def _items(layout: Layout, video: Video, foreground: dict | None) -> list[Item]:
    frames, listed, problem = layout.frames(video)
    behind = _foreground(layout, video, frames, listed, foreground) if frames is not None and layout.mask_dict_file is not None else None
    items = []
    for expression in video.expressions:
        kind = _TYPES.get(str(expression.fields.get("type_id")))
        truth: Truth | str | None = "There is no mask_dict.json with its true masks."
        if layout.mask_dict_file is not None and frames is not None:
            ids = expression.ids("anno_id")
            truth = "Its true masks are not named (anno_id)." if ids is None else layout.run_lengths(ids, listed, frames)
        if isinstance(behind, str) and not isinstance(truth, str):
            truth = behind
        if kind is None:
            truth = f"Its type is {expression.fields.get('type_id')!r}, and known are 0, 1 and 2."
        tags = (kind,) if kind else ()
        items.append(item_of(video, expression, frames, problem, truth, tags, foreground=None if isinstance(behind, str) else behind))
    return items


def _foreground(layout: Layout, video: Video, frames: Frames, listed: list[str], stored: dict | None) -> Truth | str:
    """All objects of the clip, or why they are not known."""
    if stored is None:
        named = dict.fromkeys(one for expression in video.expressions for one in expression.ids("anno_id") or ())
        return layout.run_lengths([one for one in named if one in layout.mask_dict], listed, frames)
    entry = stored.get(video.name)
    masks = entry.get("masks_rle") if isinstance(entry, dict) else entry
    if not isinstance(masks, list) or len(masks) != len(listed):
        return f"mask_dict_foreground.json has no mask for each frame of {video.name}."
    return RunLengthMasks([masks], order_of(listed, frames))
