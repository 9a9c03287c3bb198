"""An object of a made-up scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Thing:
    """An object of a scene.

    Attributes:
        radius: in pixels.
        centres: (T, 2) float32, x and y in pixels, for frames without the object too.
        motion: one of `decaf.demo.scenes.MOTIONS`, or "bounces".
        first, last: the frames that show it, both included.
    """

    shape: str
    colour: str
    radius: float
    centres: np.ndarray
    motion: str
    first: int
    last: int
