"""Attention rollout (Abnar and Zuidema, ACL 2020) with the DecAF paper's V-Max head weights, for the last prompt token only.

With `A_lh` the softmax attention of head h in layer l over the prompt, V-Max weighs a head by how strongly its queries look at visual tokens:
`m_lh` = mean over all queries of the largest attention to any visual key, `w_lh = m_lh / max_h m_lh`. A layer then passes on
`A_l = 1/2 mean_h(w_lh A_lh) + 1/2 I`, and the rollout is the product of all layers from the top one down.

Only the last prompt token's row of that product is needed, so a row vector is carried down the layers instead of multiplying L x L matrices:
`v <- 1/2 mean_h(w_lh v A_lh) + 1/2 v`. Rows of `A_lh` are computed from q and k a block at a time and then dropped, so the extra memory is one
block of rows and grows linearly with the prompt. On NVIDIA GPUs with Triton a fused kernel does the same without storing any row; the PyTorch
version in this file is its fallback and the reference it is checked against.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..mllm.engine import TextShape
from ..mllm.packed import CapturedQK

log = logging.getLogger(__name__)

BLOCK_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
"""Bytes of one block of attention rows: small enough for a CPU's cache, large enough to keep a GPU busy."""


def rollout_bytes(shape: TextShape, batch: int, length: int, questions: int, device: torch.device) -> int:
    """Bytes that the rollout of `questions` questions takes in PyTorch, beside what it is given; the fused kernel takes less."""
    heads, block = batch * shape.heads, BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"])
    rows = max(1, min(length, block // (4 * heads * length)))
    # A block of rows; its queries in float32, and scaled.
    at_work = rows * heads * (length + 2 * shape.head_width)
    # Products of all questions, and of a block; the layer's keys in float32, and with a question's behind them.
    return 4 * (at_work + 2 * heads * questions * length + 2 * batch * shape.kv_heads * shape.head_width * length)


def visual_runs(visual: Tensor) -> list[tuple[int, int]]:
    """(L,) bool -> half-open ranges of True. Visual tokens are not always one slice: some models put text between the frames."""
    edges = torch.diff(visual.to(torch.int8), prepend=visual.new_zeros(1).to(torch.int8), append=visual.new_zeros(1).to(torch.int8))
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))


@cache
def _triton_module() -> ModuleType | None:
    try:
        from . import rollout_triton
    except Exception as error:  # also a Triton that is installed but does not work on this machine
        log.info("Without Triton the attention rollout is slower (%s: %s).", type(error).__name__, error)
        return None
    return rollout_triton


def fused_kernel(device: torch.device) -> ModuleType | None:
    """The module `rollout_triton` if it can be used on the device, else None. Triton is missing on Windows, for example."""
    module = _triton_module() if device.type == "cuda" else None
    return module if module and module.supported(device) else None


@torch.no_grad()
def last_row_rollout(
    prefix: CapturedQK,
    suffixes: Sequence[CapturedQK],
    visual: Tensor,
    *,
    v_max: bool = True,
    block_bytes: int | None = None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Rollout row of the last token of every prompt `prefix + suffix`, from the lowest captured layer to the top.

    Args:
        prefix: q and k of the P tokens that all prompts begin with, all visual tokens among them. Their attention is computed once for all
            suffixes.
        suffixes: q and k of each question's n tokens; n may differ. Computation runs on their device.
        visual: (P,) bool, the visual tokens of the prefix, the same for every prompt of the batch.
        v_max: whether heads are weighed; else all count alike, as in the published ablation. The fused kernel always weighs them.
        block_bytes: size of a block of attention rows. It changes the result by rounding only; the fused kernel ignores it.
        check_cancelled: called at least once per layer; may raise to cancel.

    Returns:
        Per suffix the row (B, P + n) in float32. Not normalised: rows of weighted attention do not sum to one.
    """
    device = next(iter(suffixes[0].q.values())).device
    if block_bytes is None:
        block_bytes = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"])
    if v_max and (kernel := fused_kernel(device)) and kernel.agrees(prefix, suffixes, _by_blocks):
        rows = kernel.roll_out(prefix, suffixes, visual, check_cancelled)
        if rows is not None:
            return rows
    return _by_blocks(prefix, suffixes, visual, block_bytes, check_cancelled, v_max)


def _by_blocks(
    prefix: CapturedQK,
    suffixes: Sequence[CapturedQK],
    visual: Tensor,
    block_bytes: int = BLOCK_BYTES["cuda"],
    check_cancelled: Callable[[], None] = lambda: None,
    v_max: bool = True,
) -> list[Tensor]:
    """`last_row_rollout` in PyTorch, without a fused kernel."""
    layers = sorted(prefix.q, reverse=True)
    batch, heads, length, _ = prefix.q[layers[0]].shape
    device = suffixes[0].q[layers[0]].device
    runs = visual_runs(visual)
    rows = []
    for suffix in suffixes:
        row = torch.zeros(batch, length + suffix.q[layers[0]].shape[2], device=device)
        row[:, -1] = 1
        rows.append(row)

    for layer in layers:
        k = prefix.k[layer].to(device).float().transpose(2, 3)
        # For the rows of the prefix: numerators of V-Max's mean, and the products v A.
        weight, product = _pass_rows(
            prefix.q[layer].to(device),
            k,
            0,
            prefix.scale,
            torch.stack([row[:, :length] for row in rows], 1),
            runs,
            block_bytes,
            check_cancelled,
        )
        for i, suffix in enumerate(suffixes):
            suffix_k = torch.cat([k, suffix.k[layer].float().transpose(2, 3)], 3)
            suffix_weight, suffix_product = _pass_rows(
                suffix.q[layer], suffix_k, length, suffix.scale, rows[i][:, None, length:], runs, block_bytes, check_cancelled
            )
            suffix_product = suffix_product[:, :, 0]
            suffix_product[:, :, :length] += product[:, :, i]
            head_weight = weight + suffix_weight
            head_weight = head_weight / head_weight.amax(-1, keepdim=True) if v_max else torch.ones_like(head_weight)
            rows[i] = 0.5 * torch.einsum("bh,bhl->bl", head_weight, suffix_product) / heads + 0.5 * rows[i]
    return rows


def _pass_rows(
    q: Tensor,
    k: Tensor,
    offset: int,
    scale: float,
    vectors: Tensor,
    runs: list[tuple[int, int]],
    block_bytes: int,
    check_cancelled: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Causal attention rows at positions offset, offset + 1, ..., a block at a time.

    Args:
        q: (B, H, n, D).
        k: (B, KV, D, L) float32.
        vectors: (B, Q, n), the entries of Q row vectors at these positions.
        runs: half-open ranges of visual tokens.

    Returns:
        The sum over rows of the largest visual attention (B, H), and `vectors @ A` per head (B, H, Q, L).
    """
    batch, heads, count, dim = q.shape
    kv_heads, length = k.shape[1], k.shape[3]
    weight = q.new_zeros(batch, heads, dtype=torch.float32)
    product = q.new_zeros(batch, heads, vectors.shape[1], length, dtype=torch.float32)
    step = max(1, block_bytes // (4 * batch * heads * length))
    buffer = q.new_empty(batch * heads * min(step, count) * length, dtype=torch.float32)
    for first in range(0, count, step):
        check_cancelled()
        last = min(first + step, count)
        n, visible = last - first, offset + last
        block = (q[:, :, first:last].float() * scale).reshape(batch * kv_heads, heads // kv_heads * n, dim)
        scores = buffer[: batch * heads * n * visible].view(batch * kv_heads, heads // kv_heads * n, visible)
        torch.bmm(block, k[..., :visible].flatten(0, 1), out=scores)
        scores = scores.view(batch, heads, n, visible)
        causal_mask = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu_(1)
        scores[..., offset + first :].masked_fill_(causal_mask, -torch.inf)
        scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        # The rows stay unnormalised: dividing the few numbers that are read from them is cheaper than dividing them all.
        total = scores.sum(-1)
        visual_maxima = [scores[..., start : min(stop, visible)].amax(-1) for start, stop in runs if start < visible]
        if visual_maxima:
            weight += (torch.stack(visual_maxima).amax(0) / total).sum(-1)
        product[..., :visible] += (vectors[:, None, :, first:last] / total[:, :, None]) @ scores
    return weight, product
