"""What the command leaves behind: masks, pictures, a record of the run, and the attention maps that a later run can start from.

Every file appears under its name only when it is complete, and `result.json` is written last: a folder without it is not finished.
"""

from __future__ import annotations

import json
import platform
import re
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .data import Attention, ClipInfo, Tracks
from .errors import DecafError
from .files import atomic_write, write_image
from .progress import Progress, silent

RESULT = "result.json"
ATTENTION = "attention.safetensors"
SHEET = "attention.png"
OVERLAY = "overlay.mp4"
MASKS = "masks"
OBJECTS = "objects"


def prepare_folder(folder: Path) -> None:
    """Makes the folder and tries it, so that hours of work do not end at a folder that takes no files. DecafError if it does not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (FileExistsError, NotADirectoryError) as error:
        raise DecafError(f"--out {folder} is a file or lies in one. Give a folder.") from error
    except OSError as error:
        raise DecafError(f"--out {folder} cannot be written to ({error.strerror}). Give another folder.") from error


def replaced(folder: Path) -> set[Path]:
    """What a run may overwrite in the folder, resolved, and the folder itself: results among a clip's images would be frames of it."""
    places = {folder, *(folder / name for name in (MASKS, OBJECTS, OVERLAY, SHEET))}
    for masks in (folder / MASKS, *_object_folders(folder)):
        places |= {masks, *_numbered(masks)}
    return {place.resolve() for place in places}


def stamp(path: Path) -> dict:
    """How to recognise a file or folder later: absolute path, bytes, time of the last change; of a folder: of the files in it."""
    files = sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
    states = [entry.stat() for entry in files]
    changed = max((state.st_mtime_ns for state in states), default=0)
    return {"path": str(path.resolve()), "files": len(files), "bytes": sum(state.st_size for state in states), "modified_ns": changed}


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("comfyui-decaf", "torch", "transformers", "sam2")}


def save_attention(path: Path, attention: tuple[Attention, Attention], made_from: dict, record: dict) -> None:
    """Writes (object, background) attention with what it was `made_from`, and a `record` (JSON) to be given back by `load_attention`."""
    tensors = {"thumbnails": attention[0].clip.thumbnails}
    texts = {}
    for one in attention:
        tensors |= {f"{one.kind}.video": one.video.contiguous(), f"{one.kind}.frame": one.frame.contiguous()}
        texts[one.kind] = {"query": one.query, "question": one.question, "answers": one.answers, "presence": one.presence}
    clip = attention[0].clip
    about = {"length": clip.length, "frame_size": clip.frame_size, "key_frames": clip.key_frames}
    metadata = {"made_from": made_from, "clip": about, "texts": texts, "record": record}
    # Bytes first: the library's own file writer hides which error of the disk it met.
    content = save(tensors, metadata={key: json.dumps(value) for key, value in metadata.items()})
    with atomic_write(path) as part:
        part.write_bytes(content)


def load_attention(path: Path, made_from: dict) -> tuple[tuple[Attention, Attention], dict] | None:
    """(object, background) attention and the record saved with it; None when there is none or it was made from something else."""
    try:
        with safe_open(path, "pt") as file:
            kept = file.metadata() or {}
            # Compared as text: another program's file of that name may hold anything.
            if kept.get("made_from") != json.dumps(made_from):
                return None
            metadata = {key: json.loads(value) for key, value in kept.items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError):  # not there, unreadable or damaged
        return None
    about = metadata["clip"]
    clip = ClipInfo(about["length"], tuple(about["frame_size"]), tuple(about["key_frames"]), tensors["thumbnails"])
    one, other = (
        Attention(
            kind=kind,
            video=tensors[f"{kind}.video"],
            frame=tensors[f"{kind}.frame"],
            clip=clip,
            query=metadata["texts"][kind]["query"],
            question=metadata["texts"][kind]["question"],
            answers=tuple(metadata["texts"][kind]["answers"]),
            presence=metadata["texts"][kind]["presence"],
        )
        for kind in ("object", "background")
    )
    return (one, other), metadata["record"]


def is_finished(folder: Path, made_from: dict) -> bool:
    """Whether a run from the same clip, models and settings ended in `folder`, and its files are still there."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, unreadable or no JSON
        return False
    if not isinstance(result, dict) or result.get("made_from") != json.loads(json.dumps(made_from)):
        return False
    return all((folder / name).is_file() for name in result["files"]) and len(_numbered(folder / MASKS)) == result["clip"]["frames"]


def clear(folder: Path) -> None:
    """Takes an earlier run's result out of the folder, the record first, so that old masks never stand beside new ones.

    Takes away what a killed run left unfinished, too. Files of other names stay, and so does the attention.
    DecafError: something in it cannot be taken away.
    """
    try:
        _clear(folder)
    except OSError as error:
        raise DecafError(
            f"An earlier result, {error.filename}, cannot be replaced ({error.strerror}). Remove it, or give another folder as --out."
        ) from error


def query_folders(out: Path) -> list[Path]:
    """The folders that a run into `out` may have used: itself for one query, query-1, query-2, ... in it for several."""
    found = out.iterdir() if out.is_dir() else ()
    return [out, *sorted(entry for entry in found if entry.is_dir() and re.fullmatch(r"query-\d+", entry.name))]


def clear_others(out: Path, folders: list[Path]) -> None:
    """Takes results of earlier queries out of `out`, in all folders but these. Files of other names stay. DecafError as in `clear`."""
    for folder in query_folders(out):
        if folder not in folders and (folder / RESULT).exists():
            clear(folder)
            (folder / ATTENTION).unlink(missing_ok=True)
            for left in (folder / MASKS, folder / OBJECTS, folder):
                if left.is_dir() and left != out and not any(left.iterdir()):
                    left.rmdir()


def _clear(folder: Path) -> None:
    (folder / RESULT).unlink(missing_ok=True)
    numbered = _object_folders(folder)
    for place in (folder, folder / MASKS, *numbered):
        for entry in place.iterdir() if place.is_dir() else ():
            if _UNFINISHED.fullmatch(entry.name) or (place == folder and entry.name in (SHEET, OVERLAY)):
                entry.unlink()
    for masks in (folder / MASKS, *numbered):
        for file in _numbered(masks):
            file.unlink()
    for emptied in numbered:
        if not any(emptied.iterdir()):
            emptied.rmdir()


def _object_folders(folder: Path) -> list[Path]:
    objects = folder / OBJECTS
    return [entry for entry in objects.iterdir() if entry.is_dir() and entry.name.isdecimal()] if objects.is_dir() else []


def _numbered(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if re.fullmatch(r"\d{5,}\.png", entry.name)] if folder.is_dir() else []


_UNFINISHED = re.compile(r"\.(\d{5,}|attention|overlay|result)\.part\.(png|mp4|json|safetensors)")


def union_masks(tracks: Tracks) -> Iterator[Tensor]:
    """The mask of all objects, frame by frame: (H, W) bool."""
    return (tracks.union(frame, frame + 1)[0] for frame in range(tracks.length))


def object_masks(tracks: Tracks, index: int) -> Iterator[Tensor]:
    """The mask of the object at place `index`, frame by frame: (H, W) bool."""
    return (tracks.masks(index, frame, frame + 1)[0] for frame in range(tracks.length))


def write_masks(folder: Path, masks: Iterator[Tensor], total: int, progress: Progress = silent) -> int:
    """Writes `00000.png`, `00001.png`, ...: 8-bit, 255 inside. Returns how many of the masks are not empty."""
    filled = 0
    for index, mask in enumerate(masks):
        pixels = mask.numpy()
        # Runs suit masks: smaller and sooner than the usual search for repeats, which on thousands of frames takes longer than SAM 2.
        write_image(folder / f"{index:05d}.png", Image.fromarray(pixels.view(np.uint8) * np.uint8(255)), compress_type=zlib.Z_RLE)
        filled += bool(pixels.any())
        progress(index + 1, total, "Writing masks")
    return filled


def track_records(tracks: Tracks) -> list[dict]:
    """Scores and size of each object, for `result.json`. `area`: mean share of the frame that it covers, 0..1."""
    height, width = tracks.frame_size
    records = []
    for index, track in enumerate(tracks.tracks):
        pixels = frames = 0
        for mask in object_masks(tracks, index):
            count = int(np.count_nonzero(mask.numpy()))
            pixels += count
            frames += count > 0
        area = pixels / (height * width * tracks.length)
        records.append({**asdict(track), "score": track.score, "frames": frames, "area": area})
    return records
