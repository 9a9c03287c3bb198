"""What the commands leave behind: masks, pictures, a record of the run, and the attention maps that a later run can start from (see
`decaf.command.attention_file`).

Every file appears under its name only when it is complete, and `result.json` is written last: a folder without it is not finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from .. import __version__
from ..data import Tracks
from ..errors import DecafError, OutputError, reason, shown
from ..files import write_image
from ..finishing import PICTURES
from ..paths import real_path
from ..report import Progress, silent
from ..settings import CUT_OUTS

RESULT = "result.json"
ATTENTION = "attention.safetensors"
SHEET = "attention.png"
OVERLAY = "overlay.mp4"
CUT_OUT = "cut-out"
"""Without its ending; a folder for pictures."""
MASKS = "masks"
OBJECTS = "objects"


_CUT_OUT_FILES = tuple(f"{CUT_OUT}.{kind}" for kind in CUT_OUTS if kind not in PICTURES)


def cut_out_path(folder: Path, kind: str) -> Path:
    """Where a cut-out of one of `decaf.settings.CUT_OUTS` is written: a file, or a folder."""
    return folder / CUT_OUT if kind in PICTURES else folder / f"{CUT_OUT}.{kind}"


def _cut_outs(folder: Path, *, folders: bool) -> list[Path]:
    """Cut-outs that are there, of all objects and of single ones: files, or folders of pictures."""
    names = _CUT_OUT_FOLDER if folders else _CUT_OUT_FILE
    found = [entry for entry in folder.iterdir() if names.fullmatch(entry.name)] if folder.is_dir() else []
    return [entry for entry in found if os.path.isdir(entry) == folders]


_CUT_OUT_FOLDER = re.compile(rf"{CUT_OUT}(-\d+)?")
_CUT_OUT_FILE = re.compile(rf"{CUT_OUT}(-\d+)?\.(mov|webm)")


def prepare_folder(folder: Path, name: str = "--out") -> None:
    """Makes the folder and tries it, so that hours of work do not end at a folder that takes no files. DecafError if it does not, or if
    something that is no result lies where one belongs. `name`: the option that it is given with."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        with contextlib.suppress(FileNotFoundError):
            os.lstat(folder / f".{ATTENTION}.00000000.part")  # whether a path of that length is taken
    except (FileExistsError, NotADirectoryError) as error:
        raise DecafError(f"{name} {shown(folder)} is a file or lies in one. Give a folder.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise OutputError(f"{name} {shown(folder)} cannot be written to ({reason(error)}). Give another folder.") from error
    for file in (RESULT, ATTENTION, SHEET, OVERLAY, *_CUT_OUT_FILES):
        if os.path.isdir(folder / file):
            raise DecafError(f"{name} {shown(folder)} has a folder {file}, where a file belongs. Move it away, or give another folder.")
    for file in (MASKS, OBJECTS, CUT_OUT):
        if os.path.lexists(folder / file) and not os.path.isdir(folder / file):
            raise DecafError(f"In {name} {shown(folder)}, {file} is not a folder. Move it away, or give another folder.")


def replaced(folder: Path) -> set[Path]:
    """What a run may overwrite in the folder, resolved, and the folder itself: results among a clip's images would be frames of it."""
    paths = {folder, *(folder / name for name in (MASKS, OBJECTS, CUT_OUT, OVERLAY, SHEET, *_CUT_OUT_FILES))}
    paths |= {*_cut_outs(folder, folders=False)}
    for masks in (folder / MASKS, *_cut_outs(folder, folders=True), *_object_folders(folder)):
        paths |= {masks, *_numbered(masks)}
    return {real_path(path) for path in paths}


def stamp(path: Path) -> dict:
    """How to recognise a file or folder later: absolute path, bytes, time of the last change; of a folder: of the files in it.

    DecafError: it cannot be looked into.
    """
    try:
        files = sorted(entry for entry in path.iterdir() if os.path.isfile(entry)) if path.is_dir() else [path]
        states = [entry.stat() for entry in files]
    except OSError as error:
        raise DecafError(f"{shown(path)} cannot be read ({reason(error)}). Change its permissions or give another.") from error
    changed = max((state.st_mtime_ns for state in states), default=0)
    return {"path": str(real_path(path)), "files": len(files), "bytes": sum(state.st_size for state in states), "modified_ns": changed}


def versions() -> dict[str, str | None]:
    """Of this package and of what the figures depend on; None for one that is not installed but merely lies on the path."""
    found = {"python": platform.python_version(), "comfyui-decaf": __version__}
    for name in ("torch", "transformers", "sam2"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = getattr(sys.modules.get(name), "__version__", None)
    return found


def finished(folder: Path, made_from: dict) -> dict | None:
    """The result of a run from the same clip, models and settings that ended in `folder` and whose files are still there, else None."""
    try:
        result = _result(folder)
        if result["made_from"] != json.loads(json.dumps(made_from)):
            return None
        whole = (
            all(os.path.isfile(folder / name) for name in result["files"]) and len(_numbered(folder / MASKS)) == result["clip"]["frames"]
        )
        return result if whole and isinstance(result["message"], str) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # unreadable, no JSON, or another program's
        return None


_LARGEST_RESULT = 64 << 20


def clear(folder: Path) -> None:
    """Takes an earlier run's result out of the folder, the record first, so that old masks never stand beside new ones.

    Takes away what a killed run left unfinished, too. Files of other names stay, and so does the attention.
    DecafError: something in it cannot be taken away.
    """
    try:
        _clear(folder)
    except OSError as error:
        raise _kept(error) from error


def query_folder(out: Path, name: str) -> Path:
    """Where the results of one of several queries go. `name`: see `decaf.attention.questions.names_of`."""
    return out / f"query-{name}"


def query_folders(out: Path) -> list[Path]:
    """The folders that a run into `out` may have used: itself for one query; for several, query-1, query-2, ... in it, and those of queries with a
    name. The latter only if they hold results of that name: one that the user has renamed is the user's own."""
    found = out.iterdir() if out.is_dir() else ()
    return [out, *sorted(entry for entry in found if entry.is_dir() and (re.fullmatch(r"query-\d+", entry.name) or _of_its_name(entry)))]


def _of_its_name(folder: Path) -> bool:
    try:
        return folder.name.startswith("query-") and query_folder(folder.parent, _result(folder)["name"]) == folder
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _result(folder: Path) -> dict:
    """What is written in its record. ValueError: it is no file, or too large to be one of ours."""
    path = folder / RESULT
    if not os.path.isfile(path) or path.stat().st_size > _LARGEST_RESULT:
        raise ValueError
    return json.loads(path.read_text(encoding="utf-8"))


def earlier_results(out: Path, folders: list[Path]) -> list[Path]:
    """The folders in which earlier queries into `out` have left results, but for `folders`."""
    return [folder for folder in query_folders(out) if folder not in folders and (folder / RESULT).exists()]


def clear_earlier(folder: Path) -> None:
    """Takes an earlier query's result and attention out of `folder`. Files of other names stay. DecafError as in `clear`."""
    try:
        _clear(folder)
        (folder / ATTENTION).unlink(missing_ok=True)
        for left in (folder / MASKS, folder / OBJECTS):
            if left.is_dir() and not any(left.iterdir()):
                left.rmdir()
    except OSError as error:
        raise _kept(error) from error


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def clear_images(folder: Path) -> None:
    """Takes the numbered images out of a folder, and what a killed run left unfinished there. DecafError as in `clear`."""
    try:
        _clear_images(folder)
    except OSError as error:
        raise _kept(error) from error


def _kept(error: OSError) -> DecafError:
    return DecafError(
        f"An earlier result, {shown(error.filename)}, cannot be replaced ({reason(error)}). Remove it, or give another folder as --out."
    )


def _clear_images(folder: Path) -> None:
    for entry in [*folder.iterdir()] if folder.is_dir() else ():
        if _UNFINISHED.fullmatch(entry.name) or _NUMBERED.fullmatch(entry.name):
            entry.unlink()


def _clear(folder: Path) -> None:
    (folder / RESULT).unlink(missing_ok=True)
    for entry in [*folder.iterdir()] if folder.is_dir() else ():
        if _UNFINISHED.fullmatch(entry.name) or entry.name in (SHEET, OVERLAY):
            entry.unlink()
    for entry in _cut_outs(folder, folders=False):
        entry.unlink()
    numbered = [*_object_folders(folder), *_cut_outs(folder, folders=True)]
    for images in (folder / MASKS, *numbered):
        _clear_images(images)
    for emptied in numbered:
        if not any(emptied.iterdir()):
            emptied.rmdir()


def _object_folders(folder: Path) -> list[Path]:
    objects = folder / OBJECTS
    return [entry for entry in objects.iterdir() if entry.is_dir() and entry.name.isdecimal()] if objects.is_dir() else []


def _numbered(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if _NUMBERED.fullmatch(entry.name)] if folder.is_dir() else []


_NUMBERED = re.compile(r"\d{5,}\.(png|exr)")
_UNFINISHED = re.compile(
    r"\.(\d{5,}|attention|overlay|result|cut-out(-\d+)?)(\.[0-9a-f]{8})?\.part\.(png|exr|mp4|mov|webm|json|safetensors)"
)
"""Names of `atomic_write` for what is written here."""


def union_masks(tracks: Tracks) -> Iterator[Tensor]:
    """The mask of all objects, frame by frame: (H, W) uint8 0..255."""
    return (tracks.levels(frame, frame + 1)[0] for frame in range(tracks.length))


def object_masks(tracks: Tracks, index: int) -> Iterator[Tensor]:
    """The mask of the object of that index, frame by frame: (H, W) uint8 0..255."""
    return (tracks.levels(frame, frame + 1, [index])[0] for frame in range(tracks.length))


def write_masks(
    folder: Path, masks: Iterator[Tensor], total: int, progress: Progress = silent, *, numbers: Sequence[int] | None = None
) -> int:
    """Writes `00000.png`, `00001.png`, ...: 8-bit, 255 inside. Returns how many of the masks, bool or uint8 0..255, are not empty. `numbers`: of the
    files, if they are not 0, 1, 2, ..."""
    filled = 0
    for index, mask in enumerate(masks):
        pixels = mask.numpy()
        if pixels.dtype == bool:
            pixels = pixels.view(np.uint8) * np.uint8(255)
        number = index if numbers is None else numbers[index]
        # Runs suit masks: smaller and sooner than the usual search for repeats, which on thousands of frames takes longer than SAM 2.
        write_image(folder / f"{number:05d}.png", Image.fromarray(pixels), compress_type=zlib.Z_RLE)
        filled += bool(pixels.any())
        progress(index + 1, total, "Writing masks")
    return filled
