"""Writes the masks of a clip, and what is made of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from ..clips import Clip, write_video
from ..data import Tracks
from ..files import write_image
from ..finishing import PICTURES, SoundFile, apply_mask, apply_mask_each
from ..pictures.contact_sheet import contact_sheet
from ..pictures.styles import show_objects
from ..pipeline import Result
from ..report import Progress
from ..settings import EffectSettings
from . import files

log = logging.getLogger(__name__)

DEFAULT_FPS = Fraction(24)
"""Of the overlay video of a clip without a frame rate: a folder of images."""


@dataclass(frozen=True)
class Wanted:
    """What is written beside the masks.

    Attributes:
        objects: the masks of each object by itself.
        sheet: `attention.png`.
        overlay: `overlay.mp4`.
        style: of the overlay, one of `decaf.settings.STYLES`.
        cut_out: one of `decaf.settings.CUT_OUTS`; None for no cut-out.
    """

    objects: bool = False
    sheet: bool = True
    overlay: bool = True
    style: str = "spotlight"
    cut_out: str | None = None


def write_result(folder: Path, source: Path, clip: Clip, result: Result, wanted: Wanted, progress: Progress) -> tuple[int, list[str]]:
    """Writes masks, pictures and cut-outs; earlier ones must be gone (`files.clear`).

    `source`: the file or folder of the clip, which has the sound. Returns in how many frames something is masked, and the names of the files
    beside the masks.
    """
    tracks, written = result.tracks, []
    filled = files.write_masks(folder / files.MASKS, files.union_masks(tracks), tracks.length, progress)
    if wanted.objects:
        for index, track in enumerate(tracks.tracks):
            files.write_masks(folder / files.OBJECTS / str(track.id), files.object_masks(tracks, index), tracks.length, progress)
    if wanted.sheet:
        write_image(folder / files.SHEET, contact_sheet(clip, result.fused, result.prompts, tracks))
        written.append(files.SHEET)
    if wanted.overlay:
        overlay = _overlay(clip, tracks, wanted.style, progress)
        write_video(folder / files.OVERLAY, overlay, clip.fps or DEFAULT_FPS, clip.frame_size)
        written.append(files.OVERLAY)
    return filled, written + _write_cut_out(folder, source, clip, tracks, wanted, progress)


def _write_cut_out(folder: Path, source: Path, clip: Clip, tracks: Tracks, wanted: Wanted, progress: Progress) -> list[str]:
    """The files that are to be there, if some were asked for; with `objects` also one of each object. What there is to say of the sound goes to
    the log."""
    kind = wanted.cut_out
    if kind is None:
        return []
    sound = SoundFile(source) if source.is_file() and kind not in PICTURES else None
    given = {"sound": sound, "fps": DEFAULT_FPS, "pictures": kind, "progress": progress}
    path, settings = files.cut_out_path(folder, kind), EffectSettings("cut out")
    written = {path: apply_mask(path, clip, tracks, settings, **given)}
    if wanted.objects:
        written |= apply_mask_each(path, clip, tracks, settings, **given)
    if written[path]:
        log.warning("%s", written[path])
    return [one.name if one.suffix else f"{one.name}/{len(clip) - 1:05d}.{kind}" for one in written]


def _overlay(clip: Clip, tracks: Tracks, style: str, progress: Progress) -> Iterator[Tensor]:
    ids = [track.id for track in tracks.tracks]
    for index in range(len(clip)):
        masks = [tracks.alpha(index, index + 1, [place])[0] for place in range(len(tracks.tracks))]
        yield show_objects(clip[index], masks, style, ids=ids, numbers=len(ids) > 1)  # one object needs no number
        progress(index + 1, len(clip), "Writing the overlay")
