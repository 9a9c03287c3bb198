"""Finding files where the public copies of the benchmarks have them, and reading expressions of any of their forms."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from ...clips.base import IMAGE_SUFFIXES
from ...errors import DecafError, reason, shown
from ...paths import look_at
from ..truth import MaskPictures, RunLengthMasks, Truth
from .base import Frames, Item, NotThisDataset

_FRAMES = ("{split}/JPEGImages", "JPEGImages/{split}", "JPEGImages", "{split}/JPEGImages/480p", "JPEGImages/480p", "JPEGImages/Full-Resolution",
           "DAVIS/JPEGImages/480p", "DAVIS/JPEGImages/Full-Resolution", "{split}_all_frames/JPEGImages", "{split}", "")  # fmt: skip
_MASKS = ("{split}/Annotations", "Annotations/{split}", "Annotations", "{split}/Annotations/480p", "Annotations_unsupervised/480p",
          "Annotations/480p", "DAVIS/Annotations_unsupervised/480p", "DAVIS/Annotations/480p", "DAVIS/Annotations_unsupervised/Full-Resolution",
          "DAVIS/Annotations/Full-Resolution")  # fmt: skip
_META = ("meta_expressions/{split}/meta_expressions.json", "{split}/meta_expressions.json", "meta_expressions_{split}_.json",
         "meta_expressions_{split}.json", "meta_expressions/{split}.json", "{split}/meta_expressions/meta_expressions.json",
         "meta_expressions_v2.json", "meta_expressions.json")  # fmt: skip
_MASK_DICT = ("{split}/mask_dict.json", "mask_dict.json", "meta_expressions/{split}/mask_dict.json", "mask_dict/{split}/mask_dict.json",
              "mask_dict_{split}.json", "mask_dict_v2.json")  # fmt: skip

_LARGEST_JSON = 16 << 30


def first_of(root: Path, patterns: Iterable[str], split: str) -> Path | None:
    """The first of these files that is there."""
    return next((path for pattern in patterns if (path := root / pattern.format(split=split)).is_file()), None)


def meta_file(root: Path, split: str, patterns: Sequence[str] = _META) -> Path | None:
    return first_of(root, patterns, split)


def folders(root: Path, split: str, *, masks: bool = False) -> list[Path]:
    """The folders in which there may be a folder for each clip, those that are there, the likeliest first."""
    found = [root / pattern.format(split=split) for pattern in (_MASKS if masks else _FRAMES)]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def read_json(path: Path, *, repeated: list[str] | None = None) -> dict:
    """A JSON object. `repeated` takes the names that stand twice in an object of the file; of those the last one counts, as in Python's reader.

    DecafError: it cannot be read, or is no JSON object: cut off while it was unpacked, for example.
    """

    def pairs(found: list[tuple[str, object]]) -> dict:
        made = dict(found)
        if len(made) < len(found):
            names = [name for name, _ in found]
            repeated.extend(sorted({name for name in names if names.count(name) > 1}))
        return made

    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise DecafError(f"{shown(path)} is larger than {_LARGEST_JSON >> 30} GB; it is no file of this dataset.")
        with path.open(encoding="utf-8-sig") as file:
            read = json.load(file, object_pairs_hook=None if repeated is None else pairs)
    except OSError as error:
        raise DecafError(f"{shown(path)} cannot be read ({reason(error)}). Change its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise DecafError(f"{shown(path)} is not whole JSON ({reason(error)}). Download or unpack it again.") from error
    if not isinstance(read, dict):
        raise DecafError(f"{shown(path)} holds no JSON object. Download or unpack it again.")
    return read


@dataclass(frozen=True)
class Expression:
    """A sentence about a clip, of any of the forms in which the sets write it.

    Attributes:
        id: unique in its clip.
        text: the sentence; None if there is none.
        fields: all that the file has of it.
    """

    id: str
    text: str | None
    fields: dict

    def ids(self, name: str) -> list[str] | None:
        """The numbers in a field that may be a list, a number or a text, as text; None if it is not there."""
        given = self.fields.get(name)
        if given is None:
            return None
        given = given if isinstance(given, list) else [given]
        return [str(int(one)) if isinstance(one, float) and one.is_integer() else str(one) for one in given]


@dataclass(frozen=True)
class Video:
    """A clip of a `meta_expressions.json`. `frames`: names as listed; None if the file lists none."""

    name: str
    frames: list[str] | None
    expressions: list[Expression]
    fields: dict


_TEXT = ("exp", "exp_text", "expression", "sentence")


def videos_of(path: Path, notes: list[str]) -> list[Video]:
    """The clips of a `meta_expressions.json` in the file's order. `notes` takes what is odd about it. DecafError: it holds no clips."""
    repeated: list[str] = []
    read = read_json(path, repeated=repeated)
    listed = read.get("videos", read)
    if not isinstance(listed, dict) or not listed or not all(isinstance(one, dict) and "expressions" in one for one in listed.values()):
        raise NotThisDataset(f"{shown(path)} lists no clips with expressions. Give a root of the dataset.")
    if repeated:
        notes.append(
            f"{path.name} has {_some(sorted(set(repeated)))} twice where a name must be unique; of each the last one counts, as in the benchmark's "
            "own script."
        )
    return [
        Video(str(name), _frame_names(one.get("frames")), list(_expressions(name, one["expressions"], notes)), one)
        for name, one in listed.items()
    ]


def _frame_names(frames: object) -> list[str] | None:
    if not isinstance(frames, list):
        return None
    names = (str(frame) for frame in frames)
    return [PurePosixPath(name).stem if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES else name for name in names]


def _expressions(video: str, given: object, notes: list[str]) -> Iterator[Expression]:
    """A mapping of ids, or a list with the id in each. Of a list, several may have the same id: all but the last get the next free numbers, as in
    the authors' evaluation, so that none is lost."""
    if isinstance(given, dict):
        pairs = [(str(name), one if isinstance(one, dict) else {"exp": one}) for name, one in given.items()]
    elif isinstance(given, list):
        pairs = [(str(one.get("exp_id", place)), one) for place, one in enumerate(given) if isinstance(one, dict)]
    else:
        pairs = []
    names = [name for name, _ in pairs]
    last = {name: place for place, name in enumerate(names)}
    free = max((int(name) for name in names if name.isdecimal()), default=-1) + 1
    for place, (name, one) in enumerate(pairs):
        if last[name] != place:
            notes.append(f"{video} has several expressions with the id {name}; the earlier one is called {free}.")
            name, free = str(free), free + 1
        text = next((one[key] for key in _TEXT if isinstance(one.get(key), str)), None)
        yield Expression(name, text, one)


class Layout:
    """Where a split's clips and true masks are.

    Args:
        root: of the dataset.
        split: folder or ending of the split.
    """

    def __init__(self, root: Path, split: str):
        self.root, self.split = root, split
        self._listed: dict[Path, dict[str, Path]] = {}

    @cached_property
    def mask_dict_file(self) -> Path | None:
        return first_of(self.root, _MASK_DICT, self.split)

    @cached_property
    def mask_dict(self) -> dict | None:
        return read_json(self.mask_dict_file) if self.mask_dict_file else None

    @cached_property
    def _frame_folders(self) -> list[Path]:
        return folders(self.root, self.split)

    @cached_property
    def _mask_folders(self) -> list[Path]:
        return folders(self.root, self.split, masks=True)

    def frames(self, video: Video) -> tuple[Frames | None, list[str], str]:
        """The clip, the names of its frames in the order in which the file lists them, and why it is not whole, if it is not."""
        problem = _unsafe(video.name)
        if problem:
            return None, [], problem
        folder = next((folder / video.name for folder in self._frame_folders if (folder / video.name).is_dir()), None)
        if folder is None:
            return None, [], f"There is no folder {video.name} of its frames."
        files = self._pictures(folder)
        named = video.frames if video.frames is not None else [*files]
        if not named:
            return None, [], f"{shown(folder)} holds no frames."
        found = [_by_name(files, name) for name in named]
        missing = [name for name, file in zip(named, found, strict=True) if file is None]
        if missing:
            return None, [], f"{len(missing)} of its {len(named)} frames are missing from {shown(folder)}: {_some(missing)}."
        empty = [file.name for file in found if file.stat().st_size == 0]
        if empty:
            return None, [], f"{len(empty)} of its {len(named)} frames are empty files: {_some(empty)}."
        if len({*found}) < len(found):
            return None, [], "Its list of frames has a frame twice."
        ordered = sorted(found, key=lambda file: natural(file.name))
        return Frames(video.name, tuple(ordered)), [file.stem for file in found], ""

    def pictures(self, folder_name: str, frames: Frames, values: tuple[int, ...] | None) -> MaskPictures | str:
        """The true masks in a folder of Annotations, or what is wrong with them."""
        problem = _unsafe(folder_name)
        if problem:
            return problem
        folder = next((folder / folder_name for folder in self._mask_folders if (folder / folder_name).is_dir()), None)
        if folder is None:
            return f"There is no folder {folder_name} of its true masks."
        files = self._pictures(folder)
        found = {index: file for index, name in enumerate(frames.names) if (file := _by_name(files, name)) is not None}
        return MaskPictures(found, values) if found else f"{shown(folder)} has no true mask for any of its frames."

    def run_lengths(self, ids: Sequence[str], listed: list[str], frames: Frames) -> Truth | str:
        """The true masks of these entries of the dictionary, or what is wrong with them. `listed`: the frames in the file's order."""
        missing = [one for one in ids if one not in self.mask_dict]
        if missing:
            return f"{self.mask_dict_file.name} has no {_some(missing)}."
        objects = [self.mask_dict[one] for one in ids]
        if not all(isinstance(one, list) for one in objects):
            return f"{self.mask_dict_file.name} has no list of masks for {_some(ids)}."
        other = next((len(one) for one in objects if len(one) != len(listed)), None)
        if other is not None:
            return f"Its true masks are of {other} frames, the clip has {len(listed)}."
        return RunLengthMasks(objects, order_of(listed, frames))

    def _pictures(self, folder: Path) -> dict[str, Path]:
        """Name without ending -> picture, in natural order."""
        if folder not in self._listed:
            files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")]
            self._listed[folder] = {file.stem: file for file in sorted(files, key=lambda file: natural(file.name))}
        return self._listed[folder]


def order_of(listed: Sequence[str], frames: Frames) -> tuple[int, ...] | None:
    """Clip index of each frame in the order in which a file lists them; None if that is the clip's."""
    place = {name: index for index, name in enumerate(frames.names)}
    order = tuple(place[name] for name in listed)
    return None if order == tuple(sorted(order)) else order


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts names as people do: frame2 before frame10."""
    return [(0, int(word)) if word.isdecimal() else (1, word) for word in re.split(r"(\d+)", name)]


def _by_name(files: dict[str, Path], name: str) -> Path | None:
    """The file of a frame: by its name, or by its number where one has more leading zeros than the other."""
    if name in files:
        return files[name]
    if name.isdecimal():
        return next((file for stem, file in files.items() if stem.isdecimal() and int(stem) == int(name)), None)
    return None


def _unsafe(name: str) -> str:
    """Names come from a file and become paths: none may lead out of the folder."""
    steps = name.split("/")
    if (
        name.startswith("/")
        or "\\" in name
        or "\0" in name
        or any(step in ("", ".", "..") for step in steps)
        or any(len(step) > 200 for step in steps)
    ):
        return "Its name is no path in the dataset."
    return ""


def item_of(
    video: Video, expression: Expression, frames: Frames | None, problem: str, truth: Truth | str | None, tags: tuple[str, ...] = (), **rest
) -> Item:
    """The item of an expression; its truth, or a sentence that says why there is none."""
    if not problem and (expression.text is None or not expression.text.strip()):
        problem = "It has no sentence."
    if not problem and isinstance(truth, str):
        problem = truth
    safe = not _unsafe(expression.id) and "/" not in expression.id
    name = f"{video.name}/{expression.id}"
    if not safe and not problem:
        problem = "Its id is no name of a folder."
    known = truth if not isinstance(truth, str) else None
    return Item(name, frames if safe else None, expression.text or "", known, tags, problem=problem, **rest)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def root_folder(root: Path) -> Path:
    """DecafError: it is no folder."""
    kind = look_at(root, "--root")
    if kind != "folder":
        raise DecafError(
            f"--root {shown(root)} " + ("is a file. Give the folder that was unpacked." if kind else "does not exist. Check the path.")
        )
    return root
