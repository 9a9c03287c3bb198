"""Scenes rendered once to memory-mapped files, and random views of them: `python cache.py FOLDER --count 1000 --first-seed 5000000`."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from model import IMAGE_SIZE
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from decaf.demo.scenes import make_scene
from decaf.sam2.encoder import normalised

log = logging.getLogger(__name__)

LENGTH = 12
MAX_OBJECTS = 8


def render(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A scene of the demo, of any size and shape of frame, as SAM 2 sees it: squeezed into its square."""
    rng = np.random.default_rng((3, seed))
    height = int(rng.choice([224, 280, 280, 280, 336]))
    width = int(rng.choice([height, 308, 364, 364, 364, 392]))
    scene = make_scene(seed, size=(height, width), length=LENGTH, count=(1, 5), radius=(0.09, 0.26), lively=bool(rng.random() < 0.8))
    frames = [np.asarray(Image.fromarray(frame).resize((IMAGE_SIZE, IMAGE_SIZE))) for frame in scene.frames]
    # Objects do not overlap in the truth, so one picture of numbers holds them all.
    labels = (scene.masks * np.arange(1, len(scene.masks) + 1, dtype=np.uint8)[:, None, None, None]).sum(0).astype(np.uint8)
    labels = [np.asarray(Image.fromarray(frame).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST)) for frame in labels]
    return np.stack(frames), np.stack(labels)


def write(folder: Path, count: int, first_seed: int, workers: int) -> None:
    """`count` clips as three files: frames (N, T, S, S, 3) uint8, labels (N, T, S, S) uint8, areas (N, T, objects) int32 in pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (count, LENGTH, IMAGE_SIZE, IMAGE_SIZE)
    frames = np.lib.format.open_memmap(folder / "frames.npy", "w+", np.uint8, (*shape, 3))
    labels = np.lib.format.open_memmap(folder / "labels.npy", "w+", np.uint8, shape)
    areas = np.zeros((count, LENGTH, MAX_OBJECTS), np.int32)
    started = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver")) as pool:
        for i, (clip, truth) in enumerate(pool.map(render, range(first_seed, first_seed + count), chunksize=4)):
            frames[i], labels[i] = clip, truth
            areas[i] = [np.bincount(frame.ravel(), minlength=MAX_OBJECTS + 1)[1:] for frame in truth]
            if (i + 1) % 100 == 0:
                log.info("%d of %d clips, %.0f s", i + 1, count, time.monotonic() - started)
    frames.flush()
    labels.flush()
    np.save(folder / "areas.npy", areas)


def render_still(seed: int) -> tuple[Tensor, np.ndarray] | tuple[None, None]:
    """A single crowded picture (1, 3, S, S), normalised, and its labels (S, S). Most of those in which no objects touch are left out."""
    rng = np.random.default_rng((7, seed))
    height = int(rng.choice([224, 280, 280, 280, 336]))
    width = int(rng.choice([height, 308, 364, 364, 364, 392]))
    scene = make_scene(seed, size=(height, width), length=1, count=(2, 5), radius=(0.1, 0.26))
    labels = (scene.masks[:, 0] * np.arange(1, len(scene.masks) + 1, dtype=np.uint8)[:, None, None]).sum(0).astype(np.uint8)
    labels = np.asarray(Image.fromarray(labels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST))
    pairs = ((labels[:, 1:], labels[:, :-1]), (labels[1:], labels[:-1]))
    met = sum(int(((one != other) & (one > 0) & (other > 0)).sum()) for one, other in pairs)
    if met < 12 and rng.random() < 0.85:
        return None, None
    frame = np.array(Image.fromarray(scene.frames[0]).resize((IMAGE_SIZE, IMAGE_SIZE)))
    if rng.random() < 0.4:
        frame = frame[..., rng.permutation(3)]
    return normalised(torch.from_numpy(np.ascontiguousarray(frame)))[None], labels


@dataclass(frozen=True)
class View:
    """A part of a clip. `images`: (T, 3, S, S) float32 in 0..1; `labels`: (T, S, S) uint8."""

    images: Tensor
    labels: Tensor


class Cache:
    """Random access to one or several rendered folders, drawn from in proportion to `shares`."""

    def __init__(self, folders: list[Path], shares: list[float]):
        names = ("frames", "labels", "areas")
        self._parts = [[np.load(folder / f"{name}.npy", mmap_mode="r") for name in names] for folder in folders]
        self._shares = np.array(shares) / sum(shares)
        self._vanishing = [self._find_vanishing(areas) for _, _, areas in self._parts]

    @staticmethod
    def _find_vanishing(areas: np.ndarray) -> np.ndarray:
        """Clips in which an object is well visible on one frame and not at all on another."""
        return np.flatnonzero(((areas > 300).any(1) & (areas == 0).any(1)).any(1))

    def view(self, rng: np.random.Generator, length: int, size: int, *, vanishing: bool = False) -> View:
        """`length` frames at equal steps, forward or backward in time, cropped, mirrored and recoloured at random. `vanishing`: of a clip
        with an object that is not always there."""
        part = rng.choice(len(self._parts), p=self._shares)
        frames, labels, _ = self._parts[part]
        clip = int(rng.choice(self._vanishing[part])) if vanishing else int(rng.integers(len(frames)))
        step = int(rng.integers(1, max(1, (LENGTH - 1) // max(1, length - 1)) + 1)) if length > 1 else 1
        first = int(rng.integers(0, LENGTH - step * (length - 1)))
        times = slice(first, first + step * (length - 1) + 1, step)
        side = int(round(IMAGE_SIZE * rng.uniform(0.6, 1.0))) if rng.random() < 0.6 else IMAGE_SIZE
        y, x = rng.integers(0, IMAGE_SIZE - side + 1, 2)
        image = torch.from_numpy(np.array(frames[clip, times, y : y + side, x : x + side])).permute(0, 3, 1, 2).float() / 255
        label = torch.from_numpy(np.array(labels[clip, times, y : y + side, x : x + side]))
        if side != size:
            image = F.interpolate(image, size=(size, size), mode="bilinear", align_corners=False, antialias=side > size)
            label = F.interpolate(label[:, None].float(), size=(size, size), mode="nearest-exact")[:, 0].to(torch.uint8)
        flips = [axis for axis, yes in zip((0, -1, -2), rng.random(3) < 0.5, strict=True) if yes]
        # The labels have one axis less, but its place is counted from the same end.
        image, label = image.flip(flips), label.flip(flips)
        return View(_recolour(rng, image), label)


def _recolour(rng: np.random.Generator, image: Tensor) -> Tensor:
    if rng.random() < 0.4:
        image = image[:, torch.from_numpy(rng.permutation(3))]
    if rng.random() < 0.4:
        image = ((image - 0.5) * rng.uniform(0.7, 1.2) + 0.5 + rng.uniform(-0.1, 0.1)).clamp(0, 1)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first-seed", type=int, default=5_000_000)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    write(options.folder, options.count, options.first_seed, options.workers)


if __name__ == "__main__":
    main()
