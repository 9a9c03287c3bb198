"""Attention rollout (Abnar and Zuidema, ACL 2020) with the DecAF paper's V-Max head weights, for the last prompt token only.

With `A_lh` the softmax attention of head h in layer l over the prompt, V-Max weighs a head by how strongly its queries look at visual tokens:
`m_lh` = mean over all queries of the largest attention to any visual key, `w_lh = m_lh / max_h m_lh`. A layer then passes on
`A_l = 1/2 mean_h(w_lh A_lh) + 1/2 I`, and the rollout is the product of all layers from the top one down.

Only the last prompt token's row of that product is wanted, so a row vector is carried down the layers instead of multiplying L x L matrices:
`v <- 1/2 mean_h(w_lh v A_lh) + 1/2 v`. CapturedQK of `A_lh` are made from queries and keys a block at a time and thrown away, so the extra memory
is one block of rows and grows linearly with the prompt. On NVIDIA GPUs with Triton a fused kernel does the same without writing even that;
what stands here is its fallback and its oracle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..mllm.packed import CapturedQK

log = logging.getLogger(__name__)

BLOCK_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
"""Size of one block of attention rows. Small enough for a CPU's cache to help, large enough to keep a GPU busy."""


def visual_runs(visual: Tensor) -> list[tuple[int, int]]:
    """(L,) bool -> half-open ranges of True. Visual tokens are not one slice: some models put text between the frames."""
    edges = torch.diff(visual.to(torch.int8), prepend=visual.new_zeros(1).to(torch.int8), append=visual.new_zeros(1).to(torch.int8))
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))


@cache
def _triton_module() -> ModuleType | None:
    try:
        from . import rollout_triton as rollout_kernel
    except Exception as error:  # also a Triton that is there but does not fit the machine
        log.info("Without Triton the attention rollout is slower (%s: %s).", type(error).__name__, error)
        return None
    return rollout_kernel


def fused_kernel(device: torch.device) -> ModuleType | None:
    """`rollout_kernel`, if it can be used on the device. Triton is missing on Windows, for one."""
    module = _triton_module() if device.type == "cuda" else None
    return module if module and module.supported(device) else None


@torch.no_grad()
def last_row_rollout(
    prefix: CapturedQK,
    suffixes: Sequence[CapturedQK],
    visual: Tensor,
    *,
    block_bytes: int | None = None,
    tick: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Rollout row of the last token of every prompt `prefix + suffix`, from the lowest captured layer to the top.

    Args:
        prefix: what all prompts begin with; holds all visual tokens. Its attention rows are formed once for all suffixes.
        suffixes: one per question. Lengths may differ. The work is done on the device on which they are.
        visual: (P,) bool over the prefix's positions, the same for every prompt of the batch.
        block_bytes: size of a block of attention rows in bytes; the result does not depend on it but for rounding. The fused kernel has none.
        tick: called at least once per layer; may raise to stop.

    Returns: per suffix the row (B, P + n) in float32. Not normalised: rows of weighted attention do not sum to one.
    """
    device = next(iter(suffixes[0].queries.values())).device
    if block_bytes is None:
        block_bytes = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"])
    if (kernel := fused_kernel(device)) and kernel.agrees(prefix, suffixes, _by_blocks):
        found = kernel.roll_out(prefix, suffixes, visual, tick)
        if found is not None:
            return found
    return _by_blocks(prefix, suffixes, visual, block_bytes, tick)


def _by_blocks(
    prefix: CapturedQK,
    suffixes: Sequence[CapturedQK],
    visual: Tensor,
    block_bytes: int = BLOCK_BYTES["cuda"],
    tick: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """`last_row_rollout` by PyTorch."""
    layers = sorted(prefix.queries, reverse=True)
    batch, heads, length, _ = prefix.queries[layers[0]].shape
    device = suffixes[0].queries[layers[0]].device
    runs = visual_runs(visual)
    rows = []
    for suffix in suffixes:
        row = torch.zeros(batch, length + suffix.queries[layers[0]].shape[2], device=device)
        row[:, -1] = 1
        rows.append(row)

    for layer in layers:
        keys = prefix.keys[layer].to(device).float().transpose(2, 3)
        # mean-over-queries numerators of V-Max and the products v A, for the rows of the prefix
        weight, product = _pass_rows(
            prefix.queries[layer].to(device),
            keys,
            0,
            prefix.scale,
            torch.stack([row[:, :length] for row in rows], 1),
            runs,
            block_bytes,
            tick,
        )
        for i, suffix in enumerate(suffixes):
            own_keys = torch.cat([keys, suffix.keys[layer].float().transpose(2, 3)], 3)
            own_weight, own_product = _pass_rows(
                suffix.queries[layer], own_keys, length, suffix.scale, rows[i][:, None, length:], runs, block_bytes, tick
            )
            own_product = own_product[:, :, 0]
            own_product[:, :, :length] += product[:, :, i]
            head = weight + own_weight
            head = head / head.amax(-1, keepdim=True)
            rows[i] = 0.5 * torch.einsum("bh,bhl->bl", head, own_product) / heads + 0.5 * rows[i]
    return rows


def _pass_rows(
    queries: Tensor,
    keys: Tensor,
    offset: int,
    scale: float,
    vectors: Tensor,
    runs: list[tuple[int, int]],
    block_bytes: int,
    tick: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Attention rows at positions offset, offset + 1, ... against all keys up to each.

    queries (B, H, n, D); keys (B, KV, D, L) float32; vectors (B, Q, n), the entries of Q row vectors at these positions.
    Returns the sum over rows of the largest visual attention (B, H), and `vectors @ A` per head (B, H, Q, L).
    """
    batch, heads, count, dim = queries.shape
    groups, length = keys.shape[1], keys.shape[3]
    weight = queries.new_zeros(batch, heads, dtype=torch.float32)
    product = queries.new_zeros(batch, heads, vectors.shape[1], length, dtype=torch.float32)
    step = max(1, block_bytes // (4 * batch * heads * length))
    buffer = queries.new_empty(batch * heads * min(step, count) * length, dtype=torch.float32)
    for first in range(0, count, step):
        tick()
        last = min(first + step, count)
        n, reach = last - first, offset + last
        block = (queries[:, :, first:last].float() * scale).reshape(batch * groups, heads // groups * n, dim)
        scores = buffer[: batch * heads * n * reach].view(batch * groups, heads // groups * n, reach)
        torch.bmm(block, keys[..., :reach].flatten(0, 1), out=scores)
        scores = scores.view(batch, heads, n, reach)
        later = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu_(1)
        scores[..., offset + first :].masked_fill_(later, -torch.inf)
        scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        # CapturedQK are left unnormalised: dividing what is read from them is cheaper than dividing them.
        total = scores.sum(-1)
        seen = [scores[..., a : min(b, reach)].amax(-1) for a, b in runs if a < reach]
        if seen:
            weight += (torch.stack(seen).amax(0) / total).sum(-1)
        product[..., :reach] += (vectors[:, None, :, first:last] / total[:, :, None]) @ scores
    return weight, product
