"""What is written and measured of an item's masks, in the process that has made them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..bulk.clip_worker import Ask, Masked
from ..clips import Clip
from ..data import Tracks
from ..demo.asking import says
from ..errors import DecafError
from ..files import write_image
from ..finishing import refine
from ..report import Report
from ..settings import RefineSettings
from .datasets.base import Item
from .maps import compare_maps
from .metrics import contour_accuracy, region_similarity

MASKS, COARSE = "masks", "coarse"
"""Folders of the masks of all frames, and of those that attention gives without tracking, of the key frames. In them `ITEM/FRAME.png`: 255 inside, 0
outside."""

_TINY = 1e-6
"""Of pixels, as in the benchmark's own script, so that a clip without foreground has a robustness, too."""


@dataclass(frozen=True)
class ItemWriter:
    """Writes masks of an item, and returns its figures; see `decaf.bulk.clip_worker.Writer`.

    Attributes:
        folder: for the masks; None writes none.
        compare: also measures the maps before fusion (see `decaf.evaluation.maps`).
        refine: finishes the tracked masks first; see `decaf.refine`.
    """

    folder: Path | None
    compare: bool = False
    refine: RefineSettings = RefineSettings()

    def __call__(self, ask: Ask, clip: Clip, masked: Masked, report: Report) -> dict:
        item: Item = ask.data
        names = item.clip.frame_names(len(clip))
        keys = list(masked.fused.clip.key_frames)
        final = self._finished(masked.tracks) if masked.tracks is not None else None
        if self.folder is not None:
            _write(self.folder / COARSE / item.name, [names[key] for key in keys], masked.coarse)
            if final is not None:
                _write(self.folder / MASKS / item.name, names, final)
        object = masked.attention[0]
        record = {"presence": object.presence}
        if item.answer and object.answers:
            record["answered"] = says(object.answers[0], item.answer)
        if masked.tracks is not None:
            record |= {"empty": not bool(final.any()), "tracks": len(masked.tracks.tracks), "message": masked.tracks.message}
        if item.truth is None:
            return record
        frames, truth = item.truth.read(len(clip), clip.frame_size)
        if not frames:
            raise DecafError("No frame of it has a true mask.")
        record |= {"no_target": not bool(truth.any()), "frames": len(frames)}
        if final is not None:
            record |= figures(final[frames], truth)
            if item.foreground is not None:
                record["r"] = _robustness(item, clip, frames, final[frames], truth)
        record["coarse"] = _of_key_frames(masked.coarse, keys, frames, truth)
        if masked.compared is not None:
            other = self._finished(masked.compared.tracks)
            record["published"] = figures(other[frames], truth) | {"empty": not bool(other.any())}
        if self.compare:
            record["maps"] = compare_maps(masked.attention, keys, frames, truth)
        return record

    def _finished(self, tracks: Tracks) -> Tensor:
        return (refine(tracks, self.refine) if self.refine != RefineSettings() else tracks).union()


def figures(masks: Tensor, truth: Tensor) -> dict[str, float]:
    """J and F, 0..1, of masks (T, H, W) bool: means over the frames."""
    return {"j": float(region_similarity(masks, truth).mean()), "f": float(contour_accuracy(masks, truth).mean())}


def _of_key_frames(coarse: Tensor, keys: Sequence[int], frames: Sequence[int], truth: Tensor) -> dict[str, float] | None:
    """J and F of the coarse masks on those key frames that have a true mask; None if none has."""
    place = {frame: index for index, frame in enumerate(frames)}
    both = [(index, place[key]) for index, key in enumerate(keys) if key in place]
    if not both:
        return None
    ours, theirs = map(list, zip(*both, strict=True))
    return figures(coarse[ours], truth[theirs])


def _robustness(item: Item, clip: Clip, frames: Sequence[int], masks: Tensor, truth: Tensor) -> float:
    """ReVOS's R: 1 less what is masked beside the target, as a share of all objects, at least 0; the mean over the frames."""
    behind = item.foreground.read(len(clip), clip.frame_size)[1][frames]
    return robustness(masks, truth, behind)


def robustness(masks: Tensor, truth: Tensor, foreground: Tensor) -> float:
    """The same of masks (T, H, W) bool."""
    beside = (masks & ~truth).flatten(1).sum(1).double()
    return float((1 - beside / (foreground.flatten(1).sum(1).double() + _TINY)).clamp(min=0).mean())


def _write(folder: Path, names: Iterable[str], masks: Tensor) -> None:
    for name, mask in zip(names, masks.to(torch.uint8).numpy(), strict=True):
        write_image(folder / f"{name}.png", Image.fromarray(mask * np.uint8(255)), compress_type=zlib.Z_RLE)
