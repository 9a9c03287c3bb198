"""An object of a made-up scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Thing:
    """An object of a scene. `radius` in pixels; `centres` (T, 2) float32, x and y in pixels, also where it is not shown;
    `motion`: one of MOTIONS; it is shown in frames `first` to `last`, both included."""

    shape: str
    colour: str
    radius: float
    centres: np.ndarray
    motion: str
    first: int
    last: int
