"""Measures a checkpoint on scenes that training never saw: `python evaluate.py sam2.safetensors --scenes 100 --json figures.json`."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from decaf.attention.frames import key_frames
from decaf.attention.points import attention_points
from decaf.clips.base import clip_from_images
from decaf.clips.identity import clip_info
from decaf.data import FusedAttention
from decaf.demo.scenes import Scene, make_scene
from decaf.evaluation.metrics import contour_accuracy, region_similarity
from decaf.masks import pack_bits
from decaf.sam2 import SAM2, load_sam2
from decaf.tracking import segment
from decaf.tracking.frames import FeatureCache, FrameEncoder
from decaf.tracking.masks import video_masks
from decaf.tracking.sweep import FixedPrompts, Sweep

FIRST_SEED = 90_000_000
SMALLEST = 100
"""Pixels of an object below which it is not asked for."""
PATCH = 28
"""Pixels a side of a cell of the attention that is imitated."""

Rows = dict[str, list[float]]


def iou(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum() / (one | other).sum().clamp(min=1))


def points(sam2: SAM2, scene: Scene, rng: np.random.Generator, rows: Rows) -> None:
    """On one frame: every object from a point anywhere on it, from one near its edge and from one that may be a little beside it; and
    points on no object."""
    frame = int(rng.integers(len(scene.frames)))
    masks = torch.from_numpy(scene.masks[:, frame])
    height, width = masks.shape[1:]
    xy, wanted, kinds = [], [], []
    for index, mask in enumerate(masks):
        if mask.sum() < SMALLEST:
            continue
        inner = ~(F.max_pool2d((~mask)[None].float(), 7, 1, 3)[0] > 0)
        for kind, place in (("anywhere", mask), ("edge", mask & ~inner), ("blurred", mask)):
            y, x = place.nonzero()[rng.integers(int(place.sum()))].numpy() + rng.random(2)
            if kind == "blurred":
                y, x = rng.normal((y, x), 0.02 * height)
            xy.append((x / width, y / height))
            wanted.append(index)
            kinds.append(kind)
    free = (F.max_pool2d(masks.any(0)[None].float(), 33, 1, 16)[0] == 0).nonzero()
    for y, x in free[rng.integers(len(free), size=3)].numpy() + rng.random((3, 2)) if len(free) else ():
        xy.append((x / width, y / height))
        wanted.append(-1)
        kinds.append("none")
    with sam2.segmenter() as segmenter:
        encoder = FrameEncoder(segmenter, [torch.from_numpy(scene.frames[frame])], FeatureCache(0), lambda: None)
        logits, predicted = segmenter.point_masks(encoder.encode(0), torch.tensor(xy, dtype=torch.float32))
    found = torch.cat([m for _, m in video_masks(logits, (height, width))])
    for mask, score, index, kind in zip(found, predicted.tolist(), wanted, kinds, strict=True):
        if index < 0:
            rows["background_empty"].append(float(not mask.any()))
            rows["background_predicted"].append(score)
            continue
        true = iou(mask, masks[index])
        rows[f"point_{kind}"].append(true)
        rows[f"point_{kind}_lost"].append(float(not mask.any()))
        rows["predicted"].append(score)
        rows["true"].append(true)


def propagation(sam2: SAM2, scene: Scene, rows: Rows) -> None:
    """Every object from its true mask on the middle frame, both ways; for comparison that mask held still."""
    start = len(scene.frames) // 2
    masks = torch.from_numpy(scene.masks)
    objects = [i for i in range(len(masks)) if masks[i, start].sum() >= SMALLEST]
    if not objects:
        return
    with sam2.segmenter() as segmenter:
        encoder = FrameEncoder(segmenter, [torch.from_numpy(f) for f in scene.frames], FeatureCache(1 << 30), lambda: None)
        prompts = FixedPrompts([(start, pack_bits(masks[i, start])) for i in objects])
        for swept in Sweep(segmenter, encoder, masks.shape[-1], batch=16).run(prompts):
            found = torch.cat([m for _, m in video_masks(swept.logits, tuple(masks.shape[-2:]))])
            for i, mask in zip(swept.ids, found, strict=True):
                truth = masks[objects[i], swept.frame]
                if swept.frame == start:
                    continue
                if not truth.any():
                    rows["absent_empty"].append(float(not mask.any()))
                elif truth.sum() >= SMALLEST:
                    rows["tracked"].append(iou(mask, truth))
                    rows["tracked_forward" if swept.frame > start else "tracked_backward"].append(iou(mask, truth))
                    rows["held_still"].append(iou(masks[objects[i], start], truth))
                    rows["present_lost"].append(float(not mask.any()))


def imitated_attention(truth: Tensor, rng: np.random.Generator) -> Tensor:
    """(K, H, W) bool -> (K, rows, cols) in 0..1: what good attention would be like, the truth on the grid of tokens, blurred and noisy."""
    grid = (truth.shape[-2] // PATCH, truth.shape[-1] // PATCH)
    cover = F.adaptive_avg_pool2d(truth[:, None].float(), grid)
    weights = torch.tensor((0.25, 0.5, 0.25))
    blurred = F.conv2d(F.pad(cover, (1, 1, 1, 1)), (weights[:, None] * weights)[None, None])[:, 0]
    noisy = blurred * torch.from_numpy(rng.uniform(0.75, 1, blurred.shape)).float()
    return noisy / noisy.amax().clamp(min=1e-6)


def segmentation(sam2: SAM2, scene: Scene, rng: np.random.Generator, rows: Rows) -> None:
    """One object by `decaf.tracking.segment` from imitated attention."""
    target = int(rng.integers(len(scene.masks)))
    truth = torch.from_numpy(scene.masks[target])
    if truth.flatten(1).sum(1).amax() < SMALLEST:
        return
    clip = clip_from_images(torch.from_numpy(scene.frames))
    keys = key_frames(len(clip), 8)
    fused = FusedAttention(imitated_attention(truth[list(keys)], rng), clip_info(clip, keys))
    prompts = attention_points(fused)
    union = segment(sam2, clip, prompts).union()
    rows["segment_jf"].append(float((region_similarity(union, truth).mean() + contour_accuracy(union, truth).mean()) / 2))
    rows["segment_points"].append(len(prompts.key))


def evaluate(sam2: SAM2, scenes: int, first_seed: int = FIRST_SEED, tracked: int | None = None, length: int = 16) -> dict[str, float]:
    """Means over `scenes` scenes of `length` frames; clips are followed on the first `tracked` of them (all)."""
    rows: Rows = defaultdict(list)
    for number in range(scenes):
        seed = first_seed + number
        rng = np.random.default_rng((4, seed))
        scene = make_scene(seed, length=length)
        points(sam2, scene, rng, rows)
        if tracked is None or number < tracked:
            propagation(sam2, scene, rows)
            segmentation(sam2, scene, rng, rows)
    figures = {name: round(float(np.mean(values)), 4) for name, values in sorted(rows.items())}
    for name in ("point_anywhere", "tracked", "segment_jf"):
        if rows[name]:
            figures[f"{name}_median"] = round(float(np.median(rows[name])), 4)
    predicted, true = np.array(rows["predicted"]), np.array(rows["true"])
    figures["predicted_correlation"] = round(float(np.corrcoef(predicted, true)[0, 1]), 4)
    figures["predicted_error"] = round(float(np.abs(predicted - true).mean()), 4)
    # With the points on no object, whose true IoU is 0.
    nothing = np.array(rows["background_predicted"])
    everywhere = np.corrcoef(np.append(predicted, nothing), np.append(true, np.zeros(len(nothing))))
    figures["predicted_correlation_everywhere"] = round(float(everywhere[0, 1]), 4)
    figures["scenes"] = scenes
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--tracked", type=int, help="scenes whose clips are followed (all)")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--length", type=int, default=16, help="frames of a scene")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = evaluate(load_sam2(options.checkpoint), options.scenes, options.first_seed, options.tracked, options.length)
    text = json.dumps(figures, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
