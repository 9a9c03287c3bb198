"""The streamed last-row rollout against the dense formula, at the head shapes of a 7B model (28 heads, 4 key heads, 128 wide)."""

from __future__ import annotations

from statistics import median

import torch

from decaf.rollout import Rows, last_row_rollout

from .measure import measure

HEADS, KEY_HEADS, WIDTH = 28, 4, 128
SUFFIX = 40
TOLERANCE = 1e-5


def prepare(tokens: int, layers: int) -> tuple[Rows, Rows, torch.Tensor]:
    """Queries and keys of a prompt: pictures, then a question."""
    torch.manual_seed(0)
    pieces = []
    for length in (tokens - SUFFIX, SUFFIX):
        rows = Rows(WIDTH**-0.5)
        for layer in range(layers):
            rows.queries[layer] = torch.randn(1, HEADS, length, WIDTH).mul_(1.2)
            rows.keys[layer] = torch.randn(1, KEY_HEADS, length, WIDTH).mul_(1.2)
        pieces.append(rows)
    visual = torch.ones(tokens - SUFFIX, dtype=torch.bool)
    visual[:20] = False
    return *pieces, visual


def streamed(prefix: Rows, suffix: Rows, visual: torch.Tensor) -> list[float]:
    return last_row_rollout(prefix, [suffix], visual)[0][0].tolist()


def dense(prefix: Rows, suffix: Rows, visual: torch.Tensor) -> list[float]:
    """The formula as it stands: per layer H x L x L attention in float32, and the L x L product of all layers."""
    rollout = None
    seen = visual.nonzero()[:, 0]
    for layer in sorted(prefix.queries):
        queries = torch.cat([prefix.queries[layer], suffix.queries[layer]], 2)
        keys = torch.cat([prefix.keys[layer], suffix.keys[layer]], 2).repeat_interleave(HEADS // KEY_HEADS, 1)
        scores = queries @ keys.transpose(2, 3) * prefix.scale
        length = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        attention = scores.softmax(-1)
        del scores
        strength = attention[..., seen[0] : seen[-1] + 1].amax(-1).mean(-1)
        weight = strength / strength.amax(-1, keepdim=True)
        mixed = (attention * weight[..., None, None]).mean(1) * 0.5 + torch.eye(length) * 0.5
        rollout = mixed if rollout is None else mixed @ rollout
    return rollout[0, -1].tolist()


def run(tokens: list[int], layers: int, repeats: int) -> list[dict]:
    """One record per prompt length. The two sides take turns; ratios are made of neighbours."""
    table = []
    for length in tokens:
        rows = []
        for _ in range(repeats):
            ours, found = measure(prepare, streamed, length, layers)
            theirs, expected = measure(prepare, dense, length, layers)
            found, expected = torch.tensor(found), torch.tensor(expected)
            error = float((found - expected).norm() / expected.norm())
            if error > TOLERANCE:
                raise SystemExit(f"The two sides differ by {error:.1e} at {length} tokens: nothing to compare.")
            rows.append((ours, theirs, error))
        table.append(
            {
                "tokens": length,
                "layers": layers,
                "streamed_seconds": median(ours.seconds for ours, _, _ in rows),
                "dense_seconds": median(theirs.seconds for _, theirs, _ in rows),
                "speedup": median(theirs.seconds / ours.seconds for ours, theirs, _ in rows),
                "streamed_bytes": median(ours.bytes for ours, _, _ in rows),
                "dense_bytes": median(theirs.bytes for _, theirs, _ in rows),
                "memory_ratio": median(ours.bytes / theirs.bytes for ours, theirs, _ in rows),
                "relative_error": max(error for _, _, error in rows),
            }
        )
    return table
