"""Single frames cut to the region that the video attends: as fine as whole frames, with a quarter of their visual tokens.

The video's map says where to look, roughly: a window of half the frame's sides, on each key frame where it holds the most of that map. The window
is shown with as many tokens as the whole frame has in the video. Not in the paper. What the window leaves out is told by the video alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..mllm import Layout
from ..mllm.pictures import resize as resize_picture
from .fusion import VIDEO_KERNEL, attended_more, min_max, resize, slots_to_frames

HELD = 0.7
"""Share of the video's map, squared, that the windows must hold: else the frames are shown whole. Two objects far apart, or a map that is flat,
do not fit. Squared, since faint attention lies everywhere."""

_NEAR = 0.98
"""Share of the most that a window could hold, from which it is as good as the best: of these the one in their middle is taken, so that what is
attended has a margin on all sides."""


@dataclass(frozen=True)
class Windows:
    """Where K key frames are cut.

    `grid`: (rows, cols) of the whole frame's cells, even numbers; a window covers half of each. `tops`, `lefts`: (K,) first row and column.
    """

    grid: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    def cut(self, frames: Sequence[Tensor], keys: slice) -> list[Tensor]:
        """The windows of key frames (H, W, 3) uint8, enlarged to that size: for the model they are pictures as any. `frames`: those at `keys`."""
        found = []
        for frame, top, left in zip(frames, self.tops[keys], self.lefts[keys], strict=True):
            height, width = frame.shape[:2]
            y, x = round(top * height / self.grid[0]), round(left * width / self.grid[1])
            part = frame[y : y + max(1, height // 2), x : x + max(1, width // 2)].contiguous()
            found.append(torch.from_numpy(np.array(resize_picture(part, height, width))))
        return found

    def put_back(self, maps: Tensor, keys: slice) -> Tensor:
        """Maps (n, rows, cols) of windows, those at `keys`, where they lie on the whole frame: (n, 2 rows, 2 cols), 0 outside."""
        rows, cols = maps.shape[-2:]
        whole = maps.new_zeros(len(maps), *self.grid)
        for one, part, top, left in zip(whole, maps, self.tops[keys], self.lefts[keys], strict=True):
            one[top : top + rows, left : left + cols] = part
        return whole

    @property
    def seen(self) -> Tensor:
        """(K, rows, cols) bool: cells of whole frames that the windows show."""
        rows, cols = self.grid
        ones = torch.ones(len(self.tops), rows // 2, cols // 2)
        return self.put_back(ones, slice(None)) > 0


def find_windows(object: Tensor, others: Sequence[Tensor], frames: int, window: Layout) -> Windows | None:
    """Where `frames` key frames are cut; None where a quarter of each does not hold what is attended.

    Args:
        object: the video's map of the object question, (slots, rows, cols).
        others: its maps of the background question, and of what is not meant, if there is something.
        window: layout of the windows.
    """
    rows, cols = window.grid[1:]
    grid = 2 * rows, 2 * cols
    maps = min_max(attended_more(object.cpu().float(), [one.cpu().float() for one in others], VIDEO_KERNEL))
    mass = resize(slots_to_frames(maps, frames), grid).double() ** 2
    total = float(mass.sum())
    if total <= 0:
        return None
    held = avg_pool2d(mass[:, None], (rows, cols), stride=1)[:, 0] * (rows * cols)
    places = [_place(each) for each in held]
    if sum(float(each[place]) for each, place in zip(held, places, strict=True)) < HELD * total:
        return None
    return Windows(grid, *zip(*places, strict=True))


def share_of_whole(windows: Sequence[Windows | None], window: Layout, whole: Layout) -> list[Windows] | None:
    """The windows of each query if together they take no more tokens than whole frames, which all queries share; else None, as where one of
    them needs whole frames. Equal windows are shown once."""
    if any(one is None for one in windows) or len({*windows}) * window.tokens > whole.tokens:
        return None
    return [*windows]


def _place(held: Tensor) -> tuple[int, int]:
    """First row and column of the window in the middle of those that hold nearly the most. `held`: what each holds, by its first cell."""
    good = (held >= _NEAR * held.max()).nonzero().double()
    nearest = (good - good.mean(0)).square().sum(1).argmin()
    return tuple(good[nearest].long().tolist())
