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

from ..devices import is_out_of_memory

log = logging.getLogger(__name__)

MOST_VECTORS = 4
"""Row vectors that one program multiplies; more of them go to further programs. With 8, registers spill."""

LOG2_E = 1.4426950408889634

broken: set[torch.device] = set()
"""Devices on which the kernel could not be compiled or launched."""


def supported(device: torch.device) -> bool:
    """Whether to try on this CUDA device. Below compute capability 8.0 Triton's compiler may abort the process; on AMD nothing was checked."""
    return _numbered(device) not in broken and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _numbered(device: torch.device) -> torch.device:
    """With its number: "cuda" is the current one."""
    return torch.device(device.type, torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def blocks(width: int, itemsize: int, major: int) -> tuple[int, int, int, int]:
    """Positions of a program, positions of a step, warps and pipeline stages, for heads padded to `width` on a GPU of compute capability
    `major`. Chosen from what the compiler reports: no spilled registers, and shared memory for two programs on a consumer GPU."""
    if itemsize == 4:  # exact float32 runs without the matrix units
        return 32, 32, 8 if width <= 128 else 16, 2
    if width > 128:
        return 64, 32, 4, 2
    # Only Hopper lays all warps of a product along its rows, whatever its shape. Steps of 32 keep each row within one warp elsewhere too, so
    # that sums over rows need no barrier.
    return (128, 64, 4, 2) if major == 9 else (128, 32, 4, 3)


@triton.jit
def _rows_at(rows, places, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    pointers = rows + places[:, None] * WIDTH + columns[None, :]
    if WIDTH == PADDED:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _visible(query, key, start, shared):
    """Causal within the prefix and within a query's own suffix, which begins at `start`; the prefix is seen by all."""
    return (key <= query) & ((key < shared) | (key >= start))


@triton.jit
def _with_keys(scores, bias, peak, total, best, scale):
    """Online softmax: largest score, sum of exponentials and largest visual score of each row, with another block of keys."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    total = total * tl.exp2((peak - higher) * scale) + tl.sum(tl.exp2(scores * scale - (higher * scale)[:, None]), 1)
    best = tl.maximum(best, tl.max(scores + bias[None, :], 1))
    return higher, total, best


# Without this, prompts whose lengths happen to divide by 16 and a single question would each compile a kernel of their own.
@triton.jit(do_not_specialize=["shared"])
def _row_statistics(
    queries,  # (B * H, N, WIDTH)
    keys,  # (B * KV, N, WIDTH)
    biases,  # (N,) float32: 0 at visual positions, else -inf
    starts,  # (N,) int32: where a position's suffix begins, 0 in the prefix
    norms,  # out (B * H, N): log2 of the sum of exponentials
    strongest,  # out (B * H, N): largest attention to a visual key
    length,  # N, a multiple of OWN
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
    own = _rows_at(queries + head * length * WIDTH, places, WIDTH, PADDED)
    keys += head // GROUP * length * WIDTH
    peak = tl.full([OWN], float("-inf"), tl.float32)
    best = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)

    whole = tl.minimum(first, shared) // STEP * STEP  # up to here every query of the block sees every key
    for begin in range(0, whole, STEP):
        bias = tl.load(biases + begin + steps)
        scores = tl.dot(own, tl.trans(_rows_at(keys, begin + steps, WIDTH, PADDED)), input_precision="ieee")
        peak, total, best = _with_keys(scores, bias, peak, total, best, scale)
    start = tl.load(starts + places)
    for begin in range(whole, first + OWN, STEP):
        bias = tl.load(biases + begin + steps)
        scores = tl.dot(own, tl.trans(_rows_at(keys, begin + steps, WIDTH, PADDED)), input_precision="ieee")
        scores = tl.where(_visible(places[:, None], (begin + steps)[None, :], start[:, None], shared), scores, float("-inf"))
        peak, total, best = _with_keys(scores, bias, peak, total, best, scale)

    norm = peak * scale + tl.log2(total)
    tl.store(norms + head * length + places, norm)
    tl.store(strongest + head * length + places, tl.exp2(best * scale - norm))


@triton.jit
def _at(vectors, place, length, left, VECTORS: tl.constexpr):
    """VECTORS blocks of `vectors`, one of each; where fewer than that are left, the last one again."""
    found = ()
    for i in tl.static_range(VECTORS):
        found = found + (tl.load(vectors + tl.minimum(i, left - 1) * length + place),)
    return found


@triton.jit
def _with_queries(attention, blocks, sums, VECTORS: tl.constexpr):
    """Sums over queries of vector times attention, which is (keys, queries), with another block of queries."""
    added = ()
    for i in tl.static_range(VECTORS):
        added = added + (sums[i] + tl.sum(attention * blocks[i][None, :], 1),)
    return added


@triton.jit(do_not_specialize=["shared", "count"])
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
    STEP: tl.constexpr,  # queries per step; OWN is a multiple of it
):
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * OWN  # the first keys are seen by most queries: they go first
    places = first + tl.arange(0, OWN)
    steps = tl.arange(0, STEP)
    own = _rows_at(keys + head // GROUP * length * WIDTH, places, WIDTH, PADDED)
    queries += head * length * WIDTH
    norms += head * length
    before = tl.program_id(2) * VECTORS
    left = count - before
    vectors += (head // HEADS * count + before) * length
    weights += head * count + before
    products += (head * count + before) * length
    sums = ()
    for _ in tl.static_range(VECTORS):
        sums = sums + (tl.zeros([OWN], tl.float32),)

    # Queries from here on see all keys of the block, if none of these belongs to a suffix.
    whole = tl.where(first + OWN <= shared, first + OWN, length)
    for begin in range(first, whole, STEP):
        norm = tl.load(norms + begin + steps)
        blocks = _at(vectors, begin + steps, length, left, VECTORS)
        start = tl.load(starts + begin + steps)
        scores = tl.dot(own, tl.trans(_rows_at(queries, begin + steps, WIDTH, PADDED)), input_precision="ieee")
        scores = tl.where(_visible((begin + steps)[None, :], places[:, None], start[None, :], shared), scores, float("-inf"))
        sums = _with_queries(tl.exp2(scores * scale - norm[None, :]), blocks, sums, VECTORS)
    for begin in range(whole, length, STEP):
        norm = tl.load(norms + begin + steps)
        blocks = _at(vectors, begin + steps, length, left, VECTORS)
        scores = tl.dot(own, tl.trans(_rows_at(queries, begin + steps, WIDTH, PADDED)), input_precision="ieee")
        sums = _with_queries(tl.exp2(scores * scale - norm[None, :]), blocks, sums, VECTORS)

    for i in tl.static_range(VECTORS):
        vector = tl.minimum(i, left - 1)
        tl.store(products + vector * length + places, sums[i] * tl.load(weights + vector))


_agreed: dict[tuple, bool] = {}
"""By what decides how the kernel is compiled."""

FARTHEST = 1e-2
"""Relative error of a row over the prefix above which the kernel is not used. Both ways read the same numbers and add up in float32, but the
host of the library may let PyTorch multiply with fewer digits."""


def agrees(prefix, suffixes: Sequence, oracle: Callable) -> bool:
    """Whether the kernel gives on this GPU what `oracle` gives, for heads like those of `prefix` and `suffixes`.

    It is tried once for each kernel that is compiled, on a few hundred random rows, which takes milliseconds beside compiling: GPUs, drivers
    and compilers are many, and a wrong map looks like any other.
    """
    query, key = (next(iter(kind.values())) for kind in (suffixes[0].queries, suffixes[0].keys))
    like = (query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], _vectors(len(suffixes)))
    if like not in _agreed:
        trial, *questions = (_random_rows(type(prefix), query, key, length) for length in (300, 40, 9, 5, 1)[: 1 + _vectors(len(suffixes))])
        visual = torch.arange(300) % 30 > 24
        found = roll_out(trial, questions, visual)
        if found is None:
            return False
        # What lies behind the prefix is mostly the identity, beside which no error would be seen.
        pairs = [(a[:, :300], b[:, :300]) for a, b in zip(found, oracle(trial, questions, visual), strict=True)]
        errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
        _agreed[like] = all(error <= FARTHEST for error in errors)  # an error may be NaN
        if not _agreed[like]:
            listed = ", ".join(f"{error:.1e}" for error in errors)
            log.warning("The fused attention rollout is wrong on this machine (relative errors %s); going on with the slower one.", listed)
    return _agreed[like]


def _random_rows(kind: type, query: Tensor, key: Tensor, length: int):
    """One prompt's, of three layers, so that rows meet vectors of all positions; heads like `query` and `key`, from blurred to sharp, so that
    their weights differ."""
    random = torch.Generator(query.device).manual_seed(length)

    def layer(like: Tensor) -> Tensor:
        return torch.randn(1, like.shape[1], length, like.shape[3], generator=random, device=like.device)

    sharpness = torch.linspace(0.3, 3, query.shape[1], device=query.device)[:, None, None]
    queries = {number: (sharpness * layer(query)).to(query.dtype) for number in range(3)}
    return kind(query.shape[3] ** -0.5, queries, {number: layer(key).to(key.dtype) for number in range(3)})


def _vectors(count: int) -> int:
    """Row vectors of a program where there are `count`."""
    return min(triton.next_power_of_2(count), MOST_VECTORS)


def roll_out(prefix, suffixes: Sequence, visual: Tensor, tick: Callable[[], None] = lambda: None) -> list[Tensor] | None:
    """What `rollout.last_row_rollout` returns for the same arguments, or None where the kernel cannot be compiled or launched.

    `tick` is called once per layer. Raises torch.OutOfMemoryError as PyTorch does.
    """
    layers = sorted(prefix.queries, reverse=True)
    packed = _Packed(
        suffixes[0].queries[layers[0]].device,
        prefix.queries[layers[0]],
        [suffix.queries[layers[0]].shape[2] for suffix in suffixes],
        visual,
    )
    rows = packed.last_rows()
    for layer in layers:
        tick()
        try:
            queries = packed.join([prompt.queries[layer] for prompt in (prefix, *suffixes)])
            keys = packed.join([prompt.keys[layer] for prompt in (prefix, *suffixes)])
            rows = _pass_layer(queries, keys, rows, packed, prefix.scale)
        except Exception as error:  # a compiler's and a driver's errors have no common kind
            if isinstance(error, torch.OutOfMemoryError):
                raise
            full, kind, told = is_out_of_memory(error), type(error).__name__, str(error)
        else:
            continue
        # Outside the handler: an error that came of the first one would keep its frames alive, and the tensors in them.
        if full:  # as PyTorch says it; says nothing of the kernel
            raise torch.OutOfMemoryError(told)
        broken.add(_numbered(packed.device))
        log.warning("The fused attention rollout does not run on %s; going on with the slower one (%s: %s).", packed.device, kind, told)
        return None
    return [torch.cat([rows[:, i, : packed.shared], rows[:, i, a:b]], 1) for i, (a, b) in enumerate(packed.spans)]


class _Packed:
    """Where the prompts lie in the packed sequence of N positions: the shared prefix, the suffixes, and filling up to a multiple of a block,
    which is a suffix that nobody asks about. `starts` (N,) int32, `biases` (N,) as in the kernels; `prompts` (Q, N) float32, 1 where a
    position is part of a prompt; `spans`, the suffixes' half-open ranges."""

    def __init__(self, device: torch.device, queries: Tensor, counts: list[int], visual: Tensor):
        self.batch, _, self.shared, width = queries.shape
        self.device = device
        self.width = max(16, triton.next_power_of_2(width))
        major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        self.blocks = blocks(self.width, queries.element_size(), major)
        filling = -(self.shared + sum(counts)) % self.blocks[0]
        sizes = torch.tensor([self.shared, *counts, filling])
        ends = sizes.cumsum(0)
        self.length, self.filling = int(ends[-1]), filling
        firsts = torch.cat([torch.zeros(1), ends[:-1]]).to(torch.int32)
        self.spans = list(zip(ends[:-2].tolist(), ends[1:-1].tolist(), strict=True))
        self.starts = firsts.repeat_interleave(sizes).to(self.device)
        self.prompts = ((self.starts == 0) | (self.starts == firsts[1:-1, None].to(self.device))).float()
        self.biases = torch.full([self.length], -torch.inf, device=self.device)
        self.biases[: self.shared].masked_fill_(visual.to(self.device), 0)

    def join(self, parts: list[Tensor]) -> Tensor:
        """(B, H, n, D) of the prefix and of each suffix -> (B, H, N, D)."""
        parts = [part.to(self.device) for part in parts]
        batch, heads, _, width = parts[0].shape
        return torch.cat([*parts, parts[0].new_zeros(1, 1, 1, 1).expand(batch, heads, self.filling, width)], 2)

    def last_rows(self) -> Tensor:
        """(B, Q, N): per prompt 1 at its last position."""
        rows = torch.zeros(self.batch, len(self.spans), self.length, device=self.device)
        for i, (_, end) in enumerate(self.spans):
            rows[:, i, end - 1] = 1
        return rows


def _pass_layer(queries: Tensor, keys: Tensor, rows: Tensor, packed: _Packed, scale: float) -> Tensor:
    """Carries `rows` (B, Q, N) float32 through one layer with queries (B, H, N, D) and keys (B, KV, N, D)."""
    batch, heads, length, width = queries.shape
    count = rows.shape[1]
    own, step, warps, stages = packed.blocks
    norms, strongest = rows.new_empty(2, batch, heads, length)
    products = rows.new_empty(batch, heads, count, length)
    vectors = _vectors(count)
    sizes = {"GROUP": heads // keys.shape[1], "WIDTH": width, "PADDED": packed.width, "OWN": own, "STEP": step}
    options = sizes | {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    extent = length, packed.shared, scale * LOG2_E
    with torch.cuda.device_of(queries):  # Triton launches on the current device
        _row_statistics[batch * heads, length // own](queries, keys, packed.biases, packed.starts, norms, strongest, *extent, **options)
        weights = (strongest[:, :, None] * packed.prompts).sum(-1)
        weights /= weights.amax(1, keepdim=True)
        _row_products[batch * heads, length // own, triton.cdiv(count, vectors)](
            queries, keys, packed.starts, norms, rows, weights, products, *extent, count, HEADS=heads, VECTORS=vectors, **options
        )
    return products.sum(1).mul_(0.5 / heads).add_(rows, alpha=0.5)
