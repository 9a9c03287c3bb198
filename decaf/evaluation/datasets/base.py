"""What a reader returns: the items of a benchmark, and what is wrong with its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ...clips import Clip
from ...clips.base import ImageFiles
from ...errors import DecafError
from ...report import Report
from ..truth import Truth


class Source(Protocol):
    """Where a clip comes from. It is picklable, and equal to another one of the same clip, so that queries about it are asked together."""

    def open(self, report: Report) -> Clip:
        """Raises DecafError if it cannot be opened."""

    def frame_names(self, length: int) -> Sequence[str]:
        """What the frames are called, and their masks."""


@dataclass(frozen=True)
class Frames:
    """A clip as picture files.

    Attributes:
        name: of the clip.
        files: one per frame, in the order of time; their names without ending are those of the frames.
    """

    name: str
    files: tuple[Path, ...]

    def open(self, report: Report) -> Clip:
        """Decodes each frame once. DecafError: a frame is damaged, or of another size."""
        return ImageFiles(self.name, self.files, progress=report.progress)

    def frame_names(self, length: int) -> Sequence[str]:
        return self.names

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(file.stem for file in self.files)


@dataclass(frozen=True)
class Item:
    """A query about a clip, and what is true.

    Attributes:
        name: of the item, unique in its set: the clip's and the query's, parted by a slash. It is a path below the folder of results.
        clip: None if it cannot be asked about.
        query: the sentence.
        truth: None if it is hidden or damaged.
        tags: names of the groups that it counts in.
        foreground: of ReVOS: all objects of the clip.
        answer: of made-up scenes: what the model should call the object (see `decaf.demo.asking.says`).
        problem: why it cannot be asked about or scored; empty if it can. It is then counted as its benchmark counts it.
    """

    name: str
    clip: Source | None
    query: str
    truth: Truth | None = None
    tags: tuple[str, ...] = ()
    foreground: Truth | None = None
    answer: str = ""
    problem: str = ""

    @property
    def video(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def expression(self) -> str:
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class Dataset:
    """A split of a benchmark, read.

    Attributes:
        name, title: of the benchmark, as an option and as it is written.
        split: which part of it.
        items: in the order of its file.
        hidden: whether a server has the truth; then there is a submission instead of figures.
        averaged: the groups whose figures are averaged for those of the whole; empty: all items count alike.
        counts_missing: whether an item that could not be asked or scored counts as 0, as its benchmark's own script counts it; else it is left out.
        notes: sentences about its files that change no figure, or none that can be named.
        submission: name of the mask of an item's frame in the zip file that a server takes; None if there is no server.
    """

    name: str
    title: str
    split: str
    items: tuple[Item, ...]
    hidden: bool = False
    averaged: tuple[str, ...] = ()
    counts_missing: bool = True
    notes: tuple[str, ...] = ()
    submission: Callable[[Item, str], str] | None = field(default=None, compare=False)

    @property
    def problems(self) -> list[str]:
        """What is wrong with single items, as far as their files were looked at when they were read."""
        return [f"{item.name}: {item.problem}" for item in self.items if item.problem]


class NotThisDataset(DecafError):
    """The folder does not hold what the reader reads."""


def part(items: Sequence[Item], limit: int | None, shard: tuple[int, int] | None) -> list[Item]:
    """The items of one of several runs that share a set: every n-th clip from the i-th on, of these the first `limit` items.

    Clips stay whole, so that no picture is looked at twice; over all shards each item comes once.
    """
    if shard is not None:
        number, count = shard
        place = {video: index for index, video in enumerate(dict.fromkeys(item.video for item in items))}
        items = [item for item in items if place[item.video] % count == number]
    return list(items[:limit] if limit is not None else items)
