"""`python -m benchmarks.picking`: which rule picks the object that the query means, on made-up scenes whose true masks are the tracks.

Two tables: with the objects alone, as a tracker of whole objects gives them; and with the inner part of each object and all the ground among
them, as a tool gives them that masks everything it sees.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F

import decaf
from decaf.attention.extract import extract_attentions
from decaf.attention.fusion import frame_fusion, object_background_fusion
from decaf.clips import clip_from_images
from decaf.demo import MLLM_FOLDER
from decaf.demo.scenes import make_scene
from decaf.tracking.match import RULES
from decaf.tracking.selection import grid_coverage

Right = dict[tuple[str, str, str], list[bool]]
"""By kind of query, tracks ("objects" or "parts too") and rule: whether the best objects were just the query's targets."""


def right_picks(scenes: int, seed: int, length: int) -> Right:
    """Asks the bundled model every query about unseen scenes that has a target, and lets each rule pick as many objects as are meant."""
    mllm, right = decaf.load_mllm(MLLM_FOLDER), defaultdict(list)
    for number in range(scenes):
        scene = make_scene(seed + number, length=length)
        queries = [query for query in scene.queries if query.targets]
        if len(scene.things) < 2 or not queries:
            continue
        masks = torch.from_numpy(scene.masks)
        offered = {"objects": masks, "parts too": torch.cat([masks, _inner(masks), ~masks.any(0, keepdim=True)])}
        found = extract_attentions(mllm, clip_from_images(torch.from_numpy(scene.frames)), [query.text for query in queries])
        for query, (object, background) in zip(queries, found, strict=True):
            fused = frame_fusion(object_background_fusion(object, background))
            for name, some in offered.items():
                covered = torch.stack([grid_coverage(mask[list(fused.clip.key_frames)], fused.map.shape[1:]) for mask in some])
                for rule, score in RULES.items():
                    best = score(covered, fused.map).topk(len(query.targets)).indices
                    right[query.kind, name, rule].append(set(best.tolist()) == set(query.targets))
    return right


def _inner(masks: Tensor) -> Tensor:
    """(N, T, H, W) bool: the pixels of each mask that are further from its border than half of its radius."""
    inner = torch.zeros_like(masks)
    for mask, kept in zip(masks.flatten(0, 1), inner.flatten(0, 1), strict=True):
        width = 2 * int((mask.sum() / torch.pi).sqrt() / 2) + 1
        kept.copy_(F.max_pool2d((~mask)[None].float(), width, 1, width // 2)[0] == 0)
    return inner


def table(right: Right) -> list[str]:
    """Markdown: the share of right picks, by kind of query."""
    columns = [(name, rule) for name in ("objects", "parts too") for rule in RULES]
    kinds = list(dict.fromkeys(kind for kind, *_ in right))
    lines = ["| query | number | " + " | ".join(f"{name}: {rule}" for name, rule in columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for kind in [*kinds, "all"]:
        of = kinds if kind == "all" else [kind]
        cells = [[one for each in of for one in right[each, name, rule]] for name, rule in columns]
        lines.append(f"| {kind} | {len(cells[0])} | " + " | ".join(f"{sum(cell) / len(cell):.2f}" for cell in cells) + " |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picking", description=__doc__)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--seed", type=int, default=91_000, help="of the first scene")
    parser.add_argument("--frames", type=int, default=8)
    given = parser.parse_args()
    print("\n".join(table(right_picks(given.scenes, given.seed, given.frames))))  # noqa: T201
