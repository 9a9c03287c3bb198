"""Readers of the public benchmarks, as they are unpacked. They know nothing of the method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from ...errors import DecafError, shown
from . import mevis, reasonvos, ref_davis17, ref_youtube_vos, revos
from .base import Dataset, Frames, Item, NotThisDataset, part
from .layout import root_folder

READERS: dict[str, ModuleType] = {one.NAME: one for one in (ref_davis17, mevis, revos, reasonvos, ref_youtube_vos)}

__all__ = ["READERS", "Dataset", "Frames", "Item", "NotThisDataset", "part", "read_dataset"]


def read_dataset(name: str, root: Path, split: str | None = None) -> Dataset:
    """A split of a benchmark from the folder that it was unpacked into, or the folder around that.

    Args:
        name: one of READERS.
        split: as the benchmark calls it; None for the usual one.

    Raises DecafError if the folder does not hold it, with what it looks like instead; or for a file that is damaged.
    """
    root_folder(root)
    reader = READERS[name]
    refusals: list[NotThisDataset] = []
    for folder in _roots(root):
        try:
            return reader.read(folder, split)
        except NotThisDataset as refused:
            refusals.append(refused)
    other = next((found for found in (_looks_like(folder, name) for folder in _roots(root)) if found), None)
    there = reader.splits(root)
    if split is not None and there and split not in there:
        advice = f"Of its splits there are {', '.join(there)}."
    elif other:
        advice = f"It looks like {READERS[other].TITLE}: give --dataset {other}, or another root."
    else:
        advice = f"Give the folder that {reader.TITLE} was unpacked into; docs/evaluation.md says what has to be in it."
    raise DecafError(f"--root {shown(root)} does not hold {reader.TITLE}. {refusals[0]} {advice}")


def _roots(root: Path) -> Iterator[Path]:
    """The folder itself, then those in it: archives differ in whether they have a folder around all."""
    yield root
    yield from sorted(
        (entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")), key=lambda entry: entry.name
    )[:20]


def _looks_like(root: Path, name: str) -> str | None:
    """Another benchmark that the folder holds."""
    for other in (revos, reasonvos, mevis, ref_davis17, ref_youtube_vos):
        if other.NAME == name:
            continue
        try:
            if other.read(root).items:
                return other.NAME
        except DecafError:
            continue
    return None
