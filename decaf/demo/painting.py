"""Draws the synthetic scenes: textured backgrounds, and shapes that each have their own outline and fill pattern."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import interpolate

BACKGROUNDS = ("grass", "sand", "water", "brick", "sky", "snow", "wood", "night")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = {
    "red": (214, 38, 38),
    "orange": (247, 140, 22),
    "yellow": (244, 222, 42),
    "green": (24, 168, 62),
    "blue": (36, 62, 220),
    "purple": (132, 34, 172),
    "pink": (248, 128, 190),
    "white": (246, 246, 246),
}


def ground(rng: np.random.Generator, name: str, height: int, width: int) -> np.ndarray:
    """The background `name`, one of BACKGROUNDS, as (height, width, 3) float32 in 0..255."""
    rows, cols = np.mgrid[:height, :width].astype(np.float32)
    unit = 280 / min(height, width)  # textures scale with the picture
    rows, cols = rows * unit, cols * unit
    grain = rng.standard_normal((height, width), dtype=np.float32)

    def clouds(cell: float, across: float | None = None) -> np.ndarray:
        """Smooth noise with one value every `cell` units down and `across` units to the right."""
        size = (int(height * unit / cell) + 3, int(width * unit / (across or cell)) + 3)
        coarse = torch.from_numpy(rng.standard_normal((1, 1, *size), dtype=np.float32))
        return interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0, 0].numpy()

    if name == "grass":
        value = 15 * clouds(10, 3) + 10 * grain + 10 * clouds(40)
        picture = _tinted((84, 126, 58), value, (0.9, 1.1, 0.7))
    elif name == "sand":
        picture = _tinted((206, 180, 134), 8 * grain + 9 * clouds(28) + 5 * np.sin(rows * 0.35 + 2 * clouds(50)), (1, 0.95, 0.8))
    elif name == "water":
        waves = np.sin(rows * rng.uniform(0.18, 0.3) + 2.2 * clouds(34) + rng.uniform(0, 6.3))
        picture = _tinted((66, 128, 166), 17 * waves + 4 * grain, (0.7, 1, 1))
    elif name == "brick":
        tall, wide = rng.uniform(16, 24), rng.uniform(36, 50)
        course = np.floor(rows / tall)
        along = cols + course % 2 * wide / 2
        joint = (rows % tall < 3) | (along % wide < 3)
        tone = np.sin(12.9 * course + 78.2 * np.floor(along / wide)) * 10
        picture = np.where(joint[..., None], np.float32((176, 169, 160)), _tinted((150, 82, 64), tone, (1, 0.7, 0.6)))
        picture = picture + (6 * grain + 6 * clouds(30))[..., None]
    elif name == "sky":
        picture = (
            _tinted((104, 158, 216), 60 * rows / rows.max(), (1, 0.7, 0.3)) + (np.clip(clouds(36, 60), 0, 3) * 26 + 2 * grain)[..., None]
        )
    elif name == "snow":
        picture = _tinted((216, 221, 230), 3 * grain + 8 * clouds(44), (1, 1, 0.9))
    elif name == "wood":
        value = 17 * np.sin(cols * rng.uniform(0.1, 0.2) + 1.6 * clouds(70, 20)) + 5 * grain + 5 * clouds(60, 3)
        picture = _tinted((142, 99, 60), value, (1, 0.85, 0.6))
    else:
        stars = np.clip(clouds(5) - 2.1, 0, 1) * 400
        picture = _tinted((26, 28, 52), 3 * grain + 7 * clouds(60), (0.8, 0.8, 1)) + np.clip(stars, 0, 190)[..., None]
    light = rng.uniform(0.88, 1.1)
    return np.clip(picture * light, 0, 255).astype(np.float32)


def _tinted(base: tuple, value: np.ndarray, tint: tuple) -> np.ndarray:
    return np.float32(base) + value[..., None] * np.float32(tint)


def sprite(rng: np.random.Generator, shape: str, colour: str, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """A shape, centred in a square of odd side n: colours (n, n, 3) float32 in 0..255, and coverage (n, n) float32 in 0..1."""
    half = int(np.ceil(radius)) + 1
    axis = np.arange(-half, half + 1, dtype=np.float32) / radius
    x, y = np.meshgrid(axis, axis)
    depth = -_distance(shape, x, y) * radius  # pixels inside the outline
    paint = np.float32(COLOURS[colour]) * rng.uniform(0.92, 1.04) + rng.uniform(-8, 8, 3).astype(np.float32)
    dark = paint * 0.5
    share = _pattern(shape, x, y, rng.uniform(0.9, 1.1))[..., None]
    slope = rng.uniform(-0.1, 0.1, 2)
    filled = (paint * (1 - share) + dark * share) * (1 + slope[0] * x + slope[1] * y)[..., None]
    rim = np.clip((max(1.5, 0.07 * radius) - depth) + 0.5, 0, 1)[..., None]
    return np.clip(filled * (1 - rim) + paint * 0.3 * rim, 0, 255).astype(np.float32), np.clip(depth + 0.5, 0, 1)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Approximate signed distance to the outline of a shape of radius 1, negative inside. y points down."""
    across, down = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - 0.95
    if shape == "square":
        return np.maximum(across, down) - 0.82
    if shape == "triangle":
        return np.maximum(0.894 * across - 0.447 * (y + 0.95), y - 0.8)
    if shape == "star":
        sector = 2 * np.pi / 5
        angle = np.mod(np.arctan2(x, -y), sector)
        angle = np.minimum(angle, sector - angle)
        inner = 0.46 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
        normal = np.array([inner[1], 1 - inner[0]])
        normal = normal / np.hypot(*normal)
        reach = np.hypot(x, y)
        return (reach * np.cos(angle) - 1) * normal[0] + reach * np.sin(angle) * normal[1]
    if shape == "cross":
        return np.minimum(np.maximum(across - 0.95, down - 0.36), np.maximum(across - 0.36, down - 0.95))
    return (across + down) * 0.7071 - 0.7


def _pattern(shape: str, x: np.ndarray, y: np.ndarray, pace: float) -> np.ndarray:
    """Share of the darker paint, 0..1: none on circles; stripes, checks or diagonals on the other shapes."""
    turn = pace * 2 * np.pi / 0.5  # two stripes per radius
    wave = {
        "circle": lambda: np.full_like(x, -1),
        "square": lambda: np.sin(turn * y),
        "triangle": lambda: np.sin(turn * x),
        "star": lambda: 1.4 * np.sin(0.8 * turn * x) * np.sin(0.8 * turn * y),
        "cross": lambda: np.sin(turn * (x + y) * 0.7071),
        "diamond": lambda: np.sin(turn * (x - y) * 0.7071),
    }[shape]()
    return np.clip(0.5 + 1.2 * wave, 0, 1).astype(np.float32)
