"""Attention rollout (Abnar and Zuidema, ACL 2020) with the DecAF paper's V-Max head weights, for the last prompt token only.

With `A_lh` the softmax attention of head h in layer l over the prompt, V-Max weighs a head by how strongly its queries look at visual tokens:
`m_lh` = mean over all queries of the largest attention to any visual key, `w_lh = m_lh / max_h m_lh`. A layer then passes on
`A_l = 1/2 mean_h(w_lh A_lh) + 1/2 I`, and the rollout is the product of all layers from the top one down.

Only the last prompt token's row of that product is wanted, so a row vector is carried down the layers instead of multiplying L x L matrices:
`v <- 1/2 mean_h(w_lh v A_lh) + 1/2 v`. Rows of `A_lh` are made from queries and keys a block at a time and thrown away, so the extra memory
is one block of rows and grows linearly with the prompt. On NVIDIA GPUs with Triton a fused kernel does the same without writing even that;
what stands here is its fallback and its oracle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .errors import DecafError

log = logging.getLogger(__name__)

CAPTURE = "decaf_capture"
"""Name of the attention implementation that a text tower must be set to before `capture_attention` can see it."""

BLOCK_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
"""Size of one block of attention rows. Small enough for a CPU's cache to help, large enough to keep a GPU busy."""


@dataclass
class Rows:
    """Queries and keys of consecutive prompt positions, per decoder layer.

    `queries[l]` is (B, H, n, D), `keys[l]` is (B, KV, n, D) with H a multiple of KV, both after rotary embedding and in the model's dtype.
    Those of a prefix may lie in host memory: the rollout fetches them a layer at a time.
    """

    scale: float = 1.0
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class _Recorder:
    rows: Rows
    start_layer: int
    tick: Callable[[], None]
    room: int | None
    last_layer: int | None

    def keep(self, layer: int, query: Tensor, key: Tensor) -> None:
        if self.room is not None:
            self.room -= query.nbytes
        self.rows.queries[layer] = query if self.room is None or self.room >= 0 else query.cpu()
        self.rows.keys[layer] = key


_recorder: ContextVar[_Recorder | None] = ContextVar("decaf_recorder", default=None)


class _Enough(Exception):
    """Ends a forward pass that has given all that is wanted of it."""


@contextmanager
def capture_attention(start_layer: int, tick: Callable[[], None], room: int | None = None, last_layer: int | None = None):
    """Within it, a forward pass of a text tower set to `CAPTURE` leaves the queries and keys of its layers >= `start_layer` in the yielded
    `Rows`. `tick` is called once per layer and may raise to stop the pass. `room`: bytes of the model's device that queries may take, the
    others go to host memory; None leaves all where they are. Keys stay: they are few. `last_layer`: the pass ends there, and the block
    with it, as soon as queries and keys are known and cached: what is attended to, and all that comes after, is for the next token alone."""
    rows = Rows()
    token = _recorder.set(_Recorder(rows, start_layer, tick, room, last_layer))
    try:
        yield rows
    except _Enough:
        pass
    finally:
        _recorder.reset(token)


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    recorder = _recorder.get()
    if recorder is not None:
        recorder.tick()
        if module.layer_idx >= recorder.start_layer:
            _refuse_other_attention(query, key, kwargs)
            new = query.shape[2]
            recorder.rows.scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            # A cached prefix's keys come before the new ones; they were captured when the prefix was run. The clone lets go of them.
            recorder.keep(module.layer_idx, query, key if key.shape[2] == new else key[:, :, -new:].clone())
        if module.layer_idx == recorder.last_layer:
            raise _Enough
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _refuse_other_attention(query: Tensor, key: Tensor, kwargs: dict) -> None:
    """The rows are rebuilt as plain causal softmax attention; a model that computes something else would get wrong maps without a word."""
    window = kwargs.get("sliding_window")
    if window is not None and window < key.shape[2]:
        raise DecafError(
            f"this model attends in a sliding window of {window} tokens, and the prompt has {key.shape[2]}; its attention rollout is not "
            "supported. Lower the key frames or the tokens per frame, or choose a model with full attention."
        )
    for name, what in (("softcap", "soft-capped attention"), ("s_aux", "attention sinks")):
        if kwargs.get(name) is not None:
            raise DecafError(
                f"this model uses {what}; its attention rollout is not supported. Choose a model with plain softmax attention."
            )


# A name without a mask function of its own would get no attention mask at all, also for padded or cached prompts.
AttentionInterface.register(CAPTURE, _attention)
AttentionMaskInterface.register(CAPTURE, sdpa_mask)


def visual_runs(visual: Tensor) -> list[tuple[int, int]]:
    """(L,) bool -> half-open ranges of True. Visual tokens are not one slice: some models put text between the frames."""
    edges = torch.diff(visual.to(torch.int8), prepend=visual.new_zeros(1).to(torch.int8), append=visual.new_zeros(1).to(torch.int8))
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))


@cache
def _triton_module() -> ModuleType | None:
    try:
        from . import rollout_kernel
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
    prefix: Rows,
    suffixes: Sequence[Rows],
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
    prefix: Rows,
    suffixes: Sequence[Rows],
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
        # Rows are left unnormalised: dividing what is read from them is cheaper than dividing them.
        total = scores.sum(-1)
        seen = [scores[..., a : min(b, reach)].amax(-1) for a, b in runs if a < reach]
        if seen:
            weight += (torch.stack(seen).amax(0) / total).sum(-1)
        product[..., :reach] += (vectors[:, None, :, first:last] / total[:, :, None]) @ scores
    return weight, product
