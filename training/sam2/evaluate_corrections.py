"""Measures corrections on pictures that training never saw: `python evaluate_corrections.py sam2.safetensors --scenes 300 --json figures.json`.

What is clicked goes through `remember_clicks`, as *Correct Objects* does it. J is the IoU with the object that is wanted.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from corrections import inside, neighbours, objects_of, wobble
from evaluate import FIRST_SEED, iou

from decaf.demo.scenes import make_scene
from decaf.sam2 import load_sam2
from decaf.tracking.frames import FeatureCache, FrameEncoder
from decaf.tracking.masks import video_masks
from decaf.tracking.segmenter import Clicks, Segmenter

WRONG = 0.8
"""J of the masks that are corrected is below this."""


class Picture:
    """A picture that is clicked at."""

    def __init__(self, segmenter: Segmenter, frame: np.ndarray):
        self._segmenter, self.size = segmenter, frame.shape[:2]
        self._seen = FrameEncoder(segmenter, [torch.from_numpy(frame)], FeatureCache(0), lambda: None).encode(0)

    def point(self, x: float, y: float) -> np.ndarray:
        logits, _ = self._segmenter.point_masks(self._seen, self._scaled([(x, y)]))
        return self._mask(logits)

    def clicked(self, before: np.ndarray | None = None, positive=(), negative=(), box=None) -> np.ndarray:
        labels = torch.arange(len(positive) + len(negative)) < len(positive)
        corners = None if box is None else tuple(self._scaled([box[:2], box[2:]]).flatten().tolist())
        clicks = Clicks(self._scaled([*positive, *negative]), labels, corners)
        outputs, _ = self._segmenter.remember_clicks(self._seen, clicks, None if before is None else torch.from_numpy(before))
        return self._mask(outputs.logits)

    def _scaled(self, points) -> torch.Tensor:
        height, width = self.size
        return torch.tensor(points, dtype=torch.float32).view(-1, 2) / torch.tensor([width, height])

    def _mask(self, logits: torch.Tensor) -> np.ndarray:
        return torch.cat([masks for _, masks in video_masks(logits, self.size)])[0].numpy()


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    ys, xs = np.nonzero(mask)
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def corrections(picture: Picture, labels: np.ndarray, rng: np.random.Generator, rows: dict[str, list[float]]) -> None:
    def note(kind: str, mask: np.ndarray) -> float:
        rows[kind].append(iou(torch.from_numpy(mask), torch.from_numpy(wanted)))
        return rows[kind][-1]

    for k in objects_of(labels):
        wanted = labels == k
        note("box alone", picture.clicked(box=box_of(wanted)))
        ys, xs = np.nonzero(wanted)
        i = rng.integers(len(ys))
        own = picture.point(xs[i] + 0.5, ys[i] + 0.5)
        extra, missing = own & ~wanted, wanted & ~own
        if (own & wanted).sum() > 200 and extra.sum() > missing.sum() and iou(torch.from_numpy(own), torch.from_numpy(wanted)) < WRONG:
            _correct(picture, "own mask", own, wanted, extra, rng, note)
    for k, other in neighbours(labels):
        wanted = labels == k
        _correct(picture, "two objects", wobble(rng, wanted | (labels == other)), wanted, labels == other, rng, note)
    for k in objects_of(labels):
        wanted = labels == k
        left = wanted & (np.arange(labels.shape[1]) < np.median(np.nonzero(wanted)[1]))
        if left.any() and (wanted & ~left).any():
            note("half: before", left)
            note("half: positive point on the rest", picture.clicked(left, positive=[inside(rng, wanted & ~left)]))


def _correct(picture: Picture, kind: str, before: np.ndarray, wanted: np.ndarray, extra: np.ndarray, rng, note) -> None:
    """A mask that takes in too much."""
    on, off = inside(rng, wanted), inside(rng, extra)
    note(f"{kind}: before", before)
    note(f"{kind}: positive point", picture.clicked(before, positive=[on]))
    note(f"{kind}: negative point", picture.clicked(before, negative=[off]))
    note(f"{kind}: one of each", picture.clicked(before, positive=[on], negative=[off]))
    note(f"{kind}: box", picture.clicked(before, box=box_of(wanted)))


def evaluate(path: Path, scenes: int, first_seed: int) -> dict[str, dict[str, float]]:
    """Of pictures in which objects touch, out of so many scenes."""
    rows: dict[str, list[float]] = defaultdict(list)
    with load_sam2(path).segmenter() as segmenter:
        for seed in range(first_seed, first_seed + scenes):
            scene = make_scene(seed, length=1, count=(2, 5), radius=(0.1, 0.26))
            labels = (scene.masks[:, 0] * np.arange(1, len(scene.masks) + 1, dtype=np.uint8)[:, None, None]).sum(0)
            if neighbours(labels):
                corrections(Picture(segmenter, scene.frames[0]), labels, np.random.default_rng((8, seed)), rows)
    return {
        kind: {
            "n": len(values),
            "mean": round(float(np.mean(values)), 3),
            "median": round(float(np.median(values)), 3),
            "empty": round(float((np.array(values) == 0).mean()), 3),
        }
        for kind, values in sorted(rows.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = evaluate(options.checkpoint, options.scenes, options.first_seed)
    text = "\n".join(f"{kind:40s} {row}" for kind, row in figures.items())
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
