"""Attention rollout on NVIDIA GPUs in two passes over the keys, fused in Triton: no row of attention is ever written to memory.

All prompts stand in one packed sequence: the prefix that they share, then one suffix after the other. A position sees the prefix and its own
suffix up to itself. So one launch serves every question, and each head's queries and keys are read for all questions together.

Per layer `_row_statistics` finds the logarithm of each row's normaliser and its largest attention to a visual key, which give the V-Max
weights; `_row_products` makes the rows again, a block at a time, and multiplies the questions' vectors with them. A program of the second
kernel owns a block of keys and walks over the queries that see it, so nothing is added up across programs and results repeat to the last bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

log = logging.getLogger(__name__)

MOST_VECTORS = 8
"""Row vectors that one program multiplies; more of them go to further programs. Bounded by registers."""

LOG2_E = 1.4426950408889634

broken = False
"""Set when the kernel could not be compiled or launched on this machine."""


def supported(device: torch.device) -> bool:
    """Whether to try. Triton's matrix products need compute capability 8.0; on older GPUs its compiler may abort the process."""
    return not broken and device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def blocks(width: int, itemsize: int) -> tuple[int, int, int, int]:
    """Rows that a program owns, rows that it takes per step, warps, pipeline stages; for heads padded to `width`."""
    if itemsize == 4:  # no matrix units for exact float32: small tiles, whose operands fit the registers
        return 32, 32, 4, 2
    return (128, 64, 4, 2) if width <= 128 else (64, 32, 4, 2)


@triton.jit
def _load_rows(rows, places, length, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    inside = (places < length)[:, None]
    if WIDTH != PADDED:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(rows + places[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _visible(query, key, start, shared):
    """Causal within the prefix and within a query's own suffix, which begins at `start`; the prefix is seen by all."""
    return (key <= query) & ((key < shared) | (key >= start))


@triton.jit
def _with_block(scores, seen, peak, total, best, scale):
    """Online softmax: largest score, sum of exponentials and largest visual score of each row, with another block of keys."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    total = total * tl.exp2((peak - higher) * scale) + tl.sum(tl.exp2(scores * scale - (higher * scale)[:, None]), 1)
    best = tl.maximum(best, tl.max(tl.where(seen[None, :], scores, float("-inf")), 1))
    return higher, total, best


@triton.jit
def _row_statistics(
    queries,  # (B * H, N, WIDTH)
    keys,  # (B * KV, N, WIDTH)
    visual,  # (N,) int8
    starts,  # (N,) int32: where a position's suffix begins, 0 in the prefix
    norms,  # out (B * H, N): log2 of the sum of exponentials
    strongest,  # out (B * H, N): largest attention to a visual key
    length,  # N
    shared,  # positions of the prefix
    scale,  # of the scores, in powers of two
    GROUP: tl.constexpr,  # query heads per key head
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    OWN: tl.constexpr,  # queries of a program
    STEP: tl.constexpr,  # keys per step
):
    head = tl.program_id(0).to(tl.int64)
    # The last queries see most keys: they go first, so that no long program is left over at the end.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * OWN
    places = first + tl.arange(0, OWN)
    steps = tl.arange(0, STEP)
    own = _load_rows(queries + head * length * WIDTH, places, length, WIDTH, PADDED)
    keys += head // GROUP * length * WIDTH
    peak = tl.full([OWN], float("-inf"), tl.float32)
    best = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)

    whole = tl.minimum(first, shared) // STEP * STEP  # up to here every query of the block sees every key
    for begin in range(0, whole, STEP):
        key = begin + steps
        scores = tl.dot(own, tl.trans(_load_rows(keys, key, length, WIDTH, PADDED)), input_precision="ieee")
        peak, total, best = _with_block(scores, tl.load(visual + key) != 0, peak, total, best, scale)
    start = tl.load(starts + places, mask=places < length, other=0)
    for begin in range(whole, tl.minimum(first + OWN, length), STEP):
        key = begin + steps
        scores = tl.dot(own, tl.trans(_load_rows(keys, key, length, WIDTH, PADDED)), input_precision="ieee")
        scores = tl.where(_visible(places[:, None], key[None, :], start[:, None], shared), scores, float("-inf"))
        seen = tl.load(visual + key, mask=key < length, other=0) != 0
        peak, total, best = _with_block(scores, seen, peak, total, best, scale)

    norm = peak * scale + tl.log2(total)
    tl.store(norms + head * length + places, norm, mask=places < length)
    tl.store(strongest + head * length + places, tl.exp2(best * scale - norm), mask=places < length)


@triton.jit
def _with_rows(sums, attention, vectors, place, length, count, VECTORS: tl.constexpr):
    """Sums over queries of vector times attention, (keys, queries), with another block of queries."""
    added = ()
    for i in tl.static_range(VECTORS):
        vector = tl.load(vectors + i * length + place, mask=place < tl.where(i < count, length, 0), other=0.0)
        added = added + (sums[i] + tl.sum(attention * vector[None, :], 1),)
    return added


@triton.jit
def _row_products(
    queries,
    keys,
    starts,
    norms,
    vectors,  # (B, Q, N)
    weights,  # (B, H, Q): head weights
    products,  # out (B, H, Q, N): weight times vector @ attention
    length,
    shared,
    scale,
    count,  # Q
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    VECTORS: tl.constexpr,  # row vectors of a program
    OWN: tl.constexpr,  # keys of a program
    STEP: tl.constexpr,  # queries per step
):
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * OWN  # the first keys are seen by most queries: they go first
    places = first + tl.arange(0, OWN)
    steps = tl.arange(0, STEP)
    left = count - tl.program_id(2) * VECTORS
    own = _load_rows(keys + head // GROUP * length * WIDTH, places, length, WIDTH, PADDED)
    queries += head * length * WIDTH
    norms += head * length
    vectors += (head // HEADS * count + tl.program_id(2) * VECTORS) * length
    out = head * count + tl.program_id(2) * VECTORS
    sums = ()
    for _ in tl.static_range(VECTORS):
        sums = sums + (tl.zeros([OWN], tl.float32),)

    # Queries from here on see all keys of the block, if no key belongs to a suffix.
    whole = tl.where(first + OWN <= shared, (first + OWN + STEP - 1) // STEP * STEP, length)
    for begin in range(first // STEP * STEP, tl.minimum(whole, length), STEP):
        place = begin + steps
        scores = tl.dot(own, tl.trans(_load_rows(queries, place, length, WIDTH, PADDED)), input_precision="ieee")
        start = tl.load(starts + place, mask=place < length, other=0)
        scores = tl.where(_visible(place[None, :], places[:, None], start[None, :], shared), scores, float("-inf"))
        norm = tl.load(norms + place, mask=place < length, other=0.0)
        sums = _with_rows(sums, tl.exp2(scores * scale - norm[None, :]), vectors, place, length, left, VECTORS)
    for begin in range(whole, length, STEP):
        place = begin + steps
        scores = tl.dot(own, tl.trans(_load_rows(queries, place, length, WIDTH, PADDED)), input_precision="ieee")
        norm = tl.load(norms + place, mask=place < length, other=0.0)
        sums = _with_rows(sums, tl.exp2(scores * scale - norm[None, :]), vectors, place, length, left, VECTORS)

    for i in tl.static_range(VECTORS):
        weight = tl.load(weights + out + i, mask=i < left, other=0.0)
        tl.store(products + (out + i) * length + places, sums[i] * weight, mask=places < tl.where(i < left, length, 0))


def roll_out(prefix, suffixes: Sequence, visual: Tensor, tick: Callable[[], None] = lambda: None) -> list[Tensor] | None:
    """What `rollout.last_row_rollout` returns for the same arguments, or None where the kernel cannot be compiled or launched.

    `tick` is called once per layer. Raises torch.OutOfMemoryError as PyTorch does.
    """
    global broken
    layers = sorted(prefix.queries, reverse=True)
    batch, _, shared, _ = prefix.queries[layers[0]].shape
    device = prefix.queries[layers[0]].device
    counts = [suffix.queries[layers[0]].shape[2] for suffix in suffixes]
    ends = torch.tensor([shared, *counts]).cumsum(0)
    firsts, lasts = ends[:-1].tolist(), ends[1:].tolist()
    starts = torch.tensor([0, *firsts], dtype=torch.int32).repeat_interleave(torch.tensor([shared, *counts])).to(device)
    length = len(starts)
    seen = torch.zeros(length, dtype=torch.int8, device=device)
    seen[:shared] = visual
    of = torch.tensor(firsts, device=device)[:, None]
    prompts = ((starts == 0) | (starts == of)).float()  # (Q, N): which positions make up which prompt
    rows = torch.zeros(batch, len(suffixes), length, device=device)
    rows[:, range(len(suffixes)), [last - 1 for last in lasts]] = 1
    for layer in layers:
        tick()
        try:
            queries = torch.cat([prefix.queries[layer], *(suffix.queries[layer] for suffix in suffixes)], 2)
            keys = torch.cat([prefix.keys[layer], *(suffix.keys[layer] for suffix in suffixes)], 2)
            rows = pass_layer(queries, keys, rows, seen, starts, prompts, shared, prefix.scale)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler's and a driver's errors have no common kind
            if "out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            broken = True
            log.warning(
                "The fused attention rollout cannot be used here (%s: %s). Going on with the slower one.", type(error).__name__, error
            )
            return None
    return [torch.cat([rows[:, i, :shared], rows[:, i, first:last]], 1) for i, (first, last) in enumerate(zip(firsts, lasts, strict=True))]


def pass_layer(
    queries: Tensor, keys: Tensor, rows: Tensor, seen: Tensor, starts: Tensor, prompts: Tensor, shared: int, scale: float
) -> Tensor:
    """`rows` (B, Q, N) float32 of packed prompts carried through one layer.

    queries (B, H, N, D) and keys (B, KV, N, D) of one dtype; seen (N,) int8, the visual positions; starts (N,) int32, where a position's suffix
    begins and 0 in the prefix of `shared` positions; prompts (Q, N) float32, 1 where a position belongs to a prompt.
    """
    batch, heads, length, width = queries.shape
    count = rows.shape[1]
    padded = max(16, triton.next_power_of_2(width))
    own, step, warps, stages = blocks(padded, queries.element_size())
    group = heads // keys.shape[1]
    turns = triton.cdiv(length, own)
    norms, strongest = rows.new_empty(2, batch, heads, length)
    products = rows.new_empty(batch, heads, count, length)
    vectors = min(triton.next_power_of_2(count), MOST_VECTORS)
    fixed = {"GROUP": group, "WIDTH": width, "PADDED": padded, "OWN": own, "STEP": step, "num_warps": warps, "num_stages": stages}
    with torch.cuda.device_of(queries):
        _row_statistics[batch * heads, turns](queries, keys, seen, starts, norms, strongest, length, shared, scale * LOG2_E, **fixed)
        weights = (strongest[:, :, None] * prompts).sum(-1)
        weights /= weights.amax(1, keepdim=True)
        _row_products[batch * heads, turns, triton.cdiv(count, vectors)](
            queries,
            keys,
            starts,
            norms,
            rows,
            weights,
            products,
            length,
            shared,
            scale * LOG2_E,
            count,
            HEADS=heads,
            VECTORS=vectors,
            **fixed,
        )
    return products.sum(1).mul_(0.5 / heads).add_(rows, alpha=0.5)
