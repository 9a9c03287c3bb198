"""Ref-DAVIS17 (Khoreva et al., ACCV 2018): every object of DAVIS 2017 described four times. Its files are public in two arrangements:

As Ref-YouTube-VOS has them:

    ROOT/meta_expressions/valid/meta_expressions.json   ROOT/valid/JPEGImages/VIDEO/00000.jpg   ROOT/valid/Annotations/VIDEO/00000.png

As they come:

    ROOT/DAVIS/JPEGImages/480p/VIDEO/00000.jpg   ROOT/DAVIS/Annotations_unsupervised/480p/VIDEO/00000.png   ROOT/DAVIS/ImageSets/2017/val.txt
    ROOT/davis_text_annotations/Davis17_annot1.txt, Davis17_annot1_full_video.txt, Davis17_annot2.txt, Davis17_annot2_full_video.txt

Expressions come in fours: two people, each of whom had seen the first frame, then the whole clip. A picture of masks has the number of the object at
each pixel; 255 is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import DecafError, reason, shown
from ..truth import Truth
from .base import Dataset, Frames, Item, NotThisDataset
from .layout import Expression, Layout, Video, item_of, meta_file, natural, videos_of

NAME, TITLE = "ref-davis17", "Ref-DAVIS17"
SPLITS = ("valid", "train")
ANNOTATORS = ("annotator 1", "annotator 2", "annotator 3", "annotator 4")

_TEXTS = ("Davis17_annot1.txt", "Davis17_annot1_full_video.txt", "Davis17_annot2.txt", "Davis17_annot2_full_video.txt")
_LISTS = {"valid": "val", "train": "train"}
_MISSPELT = {"clasic-car": "classic-car", "dog-scale": "dogs-scale", "motor-bike": "motorbike"}


def splits(root: Path) -> list[str]:
    return [split for split in SPLITS if meta_file(root, split) or _texts(root)]


def marks(root: Path) -> bool:
    """Whether it is plainly a folder of DAVIS."""
    return (root / "DAVIS").is_dir() or _texts(root) is not None or (root / "ImageSets/2017").is_dir()


def in_fours(videos: list[Video]) -> bool:
    """Whether every object is described four times in a row."""
    for video in videos:
        ids = [tuple(one.ids("obj_id") or ()) for one in video.expressions]
        if not ids or len(ids) % 4 or any(len({*ids[first : first + 4]}) > 1 or not ids[first] for first in range(0, len(ids), 4)):
            return False
    return True


def read(root: Path, split: str | None = None) -> Dataset:
    """The items of a split, by default `valid`. Raises `NotThisDataset`, or DecafError for a file that is damaged."""
    split = split or "valid"
    path, texts, notes = meta_file(root, split), _texts(root), []
    if path is not None:
        videos = videos_of(path, notes)
        if not _is_ref_davis(videos):
            raise NotThisDataset(f"The expressions in {shown(path)} are not those of Ref-DAVIS17.")
    elif texts is not None:
        videos = list(_of_texts(root, texts, split))
    else:
        raise NotThisDataset(f"{shown(root)} has neither meta_expressions/{split}/meta_expressions.json nor davis_text_annotations.")
    layout = Layout(root, split)
    _number(videos)
    if not _has_masks(layout, videos):
        stored = next((file for file in (root / split / "mask_dict.pkl", root / "mask_dict.pkl") if file.is_file()), None)
        if stored is None:
            raise NotThisDataset(f"The clips in {shown(root)} have no true masks: there is no folder {split}/Annotations.")
        notes.append(
            f"{shown(stored)} is a pickle file, which is a program that would be run, and is not read. Unpack the masks of DAVIS 2017 as "
            f"{split}/Annotations/VIDEO/00000.png."
        )
    items = [item for video in videos for item in _items(layout, video)]
    return Dataset(NAME, TITLE, split, tuple(items), averaged=ANNOTATORS, notes=tuple(notes))


def _is_ref_davis(videos: list[Video]) -> bool:
    fields = [one.fields for video in videos for one in video.expressions]
    others = any("type_id" in one or "exp_text" in one for one in fields) or any("source" in video.fields for video in videos)
    others = others or (any("anno_id" in one for one in fields) and not in_fours(videos))
    return bool(fields) and not others and any("obj_id" in one for one in fields)


def _has_masks(layout: Layout, videos: list[Video]) -> bool:
    if layout.mask_dict_file is not None:
        return True
    for video in videos:
        frames, *_ = layout.frames(video)
        if frames is not None and not isinstance(layout.pictures(video.name, frames, None), str):
            return True
    return False


def _number(videos: list[Video]) -> None:
    """Where masks are run lengths, their numbers are nowhere written: all expressions are counted, the clips and ids in the order of their names."""
    count = 0
    for video in sorted(videos, key=lambda video: video.name):
        for expression in sorted(video.expressions, key=lambda one: one.id):
            expression.fields.setdefault("anno_id", [str(count)])
            count += 1


def _items(layout: Layout, video: Video) -> list[Item]:
    frames, listed, problem = layout.frames(video)
    items = []
    for place, expression in enumerate(video.expressions):
        truth: Truth | str | None = None
        if frames is not None:
            if layout.mask_dict_file is not None:
                truth = layout.run_lengths(expression.ids("anno_id"), listed, frames)
            else:
                truth = object_truth(layout, video, expression, frames)
        number = int(expression.id) if expression.id.isdecimal() else place
        items.append(item_of(video, expression, frames, problem, truth, (ANNOTATORS[number % 4],)))
    return items


def object_truth(layout: Layout, video: Video, expression: Expression, frames: Frames) -> Truth | str:
    """The true masks of the objects that an expression names, in pictures with the number of each."""
    ids = expression.ids("obj_id")
    if ids is None or not all(one.isdecimal() for one in ids):
        return "It names no object (obj_id)."
    return layout.pictures(video.name, frames, tuple(map(int, ids)))


def _texts(root: Path) -> list[Path] | None:
    """The four files of expressions, as they come."""
    for folder in (root / "davis_text_annotations", root):
        files = [folder / name for name in _TEXTS]
        if all(file.is_file() for file in files):
            return files
    return None


def _of_texts(root: Path, texts: list[Path], split: str) -> Iterator[Video]:
    """The clips of the split's list, with their expressions in fours: object by object, in the order of the four files."""
    lists = [root / place / f"{_LISTS.get(split, split)}.txt" for place in ("DAVIS/ImageSets/2017", "ImageSets/2017")]
    path = next((path for path in lists if path.is_file()), None)
    if path is None:
        raise NotThisDataset(f"There is no {lists[0]}, which lists the clips of the split.")
    names = _lines(path, "utf-8")
    told = [_told(file) for file in texts]
    for name in names:
        each = [sorted(lines.get(name, []), key=lambda line: natural(line[0])) for lines in told]
        fours = [line for group in zip(*each, strict=False) for line in group]
        yield Video(name, None, [Expression(str(n), text, {"exp": text, "obj_id": number}) for n, (number, text) in enumerate(fours)], {})


def _told(file: Path) -> dict[str, list[tuple[str, str]]]:
    """Clip -> (object, sentence), of lines such as `bear 1 "a brown bear"`."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in _lines(file, "latin-1" if "annot2" in file.name else "utf-8"):
        words = line.split(maxsplit=2)
        if len(words) == 3:
            found.setdefault(_MISSPELT.get(words[0], words[0]), []).append((words[1], words[2].strip().strip('"').strip()))
    return found


def _lines(file: Path, encoding: str) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding=encoding, errors="replace").splitlines() if line.strip()]
    except OSError as error:
        raise DecafError(f"{shown(file)} cannot be read ({reason(error)}). Change its permissions.") from error
