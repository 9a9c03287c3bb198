"""Attention rollout on NVIDIA GPUs in two fused Triton kernels: no attention row is ever written to memory.

All prompts form one packed sequence: the prefix that they share, then one suffix after the other. A position sees the prefix and its own
suffix up to itself. So one launch serves every question, and each head's q and k are read once for all questions.

Per layer `_row_statistics` computes the logarithm of each row's normaliser and its largest attention to a visual key, from which the V-Max
weights follow. `_row_products` then recomputes the rows a block at a time and multiplies the questions' row vectors with them. Each program of
the second kernel owns a block of keys and loops over the queries that see it. No sum crosses programs, so results are reproducible bit for bit.
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

MAX_VECTORS = 4
"""Row vectors per program; further ones go to further programs. With 8, registers spill."""

LOG2_E = 1.4426950408889634

broken: set[torch.device] = set()
"""Devices on which the kernel could not be compiled or launched."""


def supported(device: torch.device) -> bool:
    """Whether to try on this CUDA device. Below compute capability 8.0 Triton's compiler may abort the process; AMD is untested."""
    return _with_index(device) not in broken and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _with_index(device: torch.device) -> torch.device:
    """The device with its index: plain "cuda" is the current one."""
    return torch.device(device.type, torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def blocks(width: int, itemsize: int, major: int) -> tuple[int, int, int, int]:
    """Block sizes for heads padded to `width` on a GPU of compute capability `major`, chosen from the compiler's reports: no spilled
    registers, and shared memory for two programs on a consumer GPU.

    Returns:
        Positions per program, positions per step, warps, pipeline stages.
    """
    if itemsize == 4:  # exact float32 runs without the matrix units
        return 32, 32, 8 if width <= 128 else 16, 2
    if width > 128:
        return 64, 32, 4, 2
    # Only Hopper lays all warps of a product along its rows, whatever its shape. Steps of 32 keep each row within one warp elsewhere too, so
    # that sums over rows need no barrier.
    return (128, 64, 4, 2) if major == 9 else (128, 32, 4, 3)


@triton.jit
def _load_rows(base, rows, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    pointers = base + rows[:, None] * WIDTH + columns[None, :]
    if WIDTH == PADDED:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _visible(query, key, start, shared):
    """Causal within the prefix and within a query's own suffix, which begins at `start`; every suffix sees the whole prefix."""
    return (key <= query) & ((key < shared) | (key >= start))


@triton.jit
def _update_statistics(scores, bias, row_max, total, visual_max, scale):
    """Online softmax: largest score, sum of exponentials and largest visual score of each row, updated with another block of keys."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    total = total * tl.exp2((row_max - new_max) * scale) + tl.sum(tl.exp2(scores * scale - (new_max * scale)[:, None]), 1)
    visual_max = tl.maximum(visual_max, tl.max(scores + bias[None, :], 1))
    return new_max, total, visual_max


# Without this, prompts whose lengths happen to divide by 16 and a single question would each compile a kernel of their own.
@triton.jit(do_not_specialize=["shared"])
def _row_statistics(
    queries,  # (B * H, N, WIDTH)
    keys,  # (B * KV, N, WIDTH)
    biases,  # (N,) float32: 0 at visual positions, else -inf
    starts,  # (N,) int32: first position of the suffix that a position belongs to, 0 in the prefix
    norms,  # out (B * H, N): log2 of the sum of exponentials
    maxima,  # out (B * H, N): largest attention to a visual key
    length,  # N, a multiple of OWN
    shared,  # length of the prefix
    scale,  # softmax scale times log2(e)
    GROUP: tl.constexpr,  # query heads per key head
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    OWN: tl.constexpr,  # queries per program
    STEP: tl.constexpr,  # keys per step
):
    head = tl.program_id(0).to(tl.int64)
    # The last queries see the most keys. They go first, so that no long program runs alone at the end.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * OWN
    rows = first + tl.arange(0, OWN)
    steps = tl.arange(0, STEP)
    q = _load_rows(queries + head * length * WIDTH, rows, WIDTH, PADDED)
    keys += head // GROUP * length * WIDTH
    row_max = tl.full([OWN], float("-inf"), tl.float32)
    visual_max = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)

    unmasked = tl.minimum(first, shared) // STEP * STEP  # every query of the block sees every key before this
    for begin in range(0, unmasked, STEP):
        bias = tl.load(biases + begin + steps)
        scores = tl.dot(q, tl.trans(_load_rows(keys, begin + steps, WIDTH, PADDED)), input_precision="ieee")
        row_max, total, visual_max = _update_statistics(scores, bias, row_max, total, visual_max, scale)
    start = tl.load(starts + rows)
    for begin in range(unmasked, first + OWN, STEP):
        bias = tl.load(biases + begin + steps)
        scores = tl.dot(q, tl.trans(_load_rows(keys, begin + steps, WIDTH, PADDED)), input_precision="ieee")
        scores = tl.where(_visible(rows[:, None], (begin + steps)[None, :], start[:, None], shared), scores, float("-inf"))
        row_max, total, visual_max = _update_statistics(scores, bias, row_max, total, visual_max, scale)

    norm = row_max * scale + tl.log2(total)
    tl.store(norms + head * length + rows, norm)
    tl.store(maxima + head * length + rows, tl.exp2(visual_max * scale - norm))


@triton.jit
def _load_vectors(vectors, positions, length, remaining, VECTORS: tl.constexpr):
    """The entries of VECTORS row vectors at `positions`. Where fewer than VECTORS remain, the last one is repeated."""
    loaded = ()
    for i in tl.static_range(VECTORS):
        loaded = loaded + (tl.load(vectors + tl.minimum(i, remaining - 1) * length + positions),)
    return loaded


@triton.jit
def _add_products(attention, vectors, sums, VECTORS: tl.constexpr):
    """`sums` plus, for each vector, attention (keys, queries) times its entries at the queries."""
    added = ()
    for i in tl.static_range(VECTORS):
        added = added + (sums[i] + tl.sum(attention * vectors[i][None, :], 1),)
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
    VECTORS: tl.constexpr,  # row vectors per program
    OWN: tl.constexpr,  # keys per program
    STEP: tl.constexpr,  # queries per step; OWN is a multiple of it
):
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * OWN  # the first keys are seen by the most queries, so they go first
    columns = first + tl.arange(0, OWN)
    steps = tl.arange(0, STEP)
    k = _load_rows(keys + head // GROUP * length * WIDTH, columns, WIDTH, PADDED)
    queries += head * length * WIDTH
    norms += head * length
    first_vector = tl.program_id(2) * VECTORS
    remaining = count - first_vector
    vectors += (head // HEADS * count + first_vector) * length
    weights += head * count + first_vector
    products += (head * count + first_vector) * length
    sums = ()
    for _ in tl.static_range(VECTORS):
        sums = sums + (tl.zeros([OWN], tl.float32),)

    # If no key of the block belongs to a suffix, all queries from here on see all of them.
    unmasked = tl.where(first + OWN <= shared, first + OWN, length)
    for begin in range(first, unmasked, STEP):
        norm = tl.load(norms + begin + steps)
        entries = _load_vectors(vectors, begin + steps, length, remaining, VECTORS)
        start = tl.load(starts + begin + steps)
        scores = tl.dot(k, tl.trans(_load_rows(queries, begin + steps, WIDTH, PADDED)), input_precision="ieee")
        scores = tl.where(_visible((begin + steps)[None, :], columns[:, None], start[None, :], shared), scores, float("-inf"))
        sums = _add_products(tl.exp2(scores * scale - norm[None, :]), entries, sums, VECTORS)
    for begin in range(unmasked, length, STEP):
        norm = tl.load(norms + begin + steps)
        entries = _load_vectors(vectors, begin + steps, length, remaining, VECTORS)
        scores = tl.dot(k, tl.trans(_load_rows(queries, begin + steps, WIDTH, PADDED)), input_precision="ieee")
        sums = _add_products(tl.exp2(scores * scale - norm[None, :]), entries, sums, VECTORS)

    for i in tl.static_range(VECTORS):
        vector = tl.minimum(i, remaining - 1)
        tl.store(products + vector * length + columns, sums[i] * tl.load(weights + vector))


_agreed: dict[tuple, bool] = {}
"""Results of `agrees`. The keys hold what the compiled kernel depends on."""

MAX_RELATIVE_ERROR = 1e-2
"""Relative error of a row over the prefix above which the kernel is not used. Both versions read the same numbers and accumulate in float32,
but the host application may allow PyTorch to multiply in TF32."""


def agrees(prefix, suffixes: Sequence, oracle: Callable) -> bool:
    """Whether the kernel gives the results of `oracle` on this GPU, for heads like those of `prefix` and `suffixes`.

    Each compiled kernel is checked once, on a few hundred random rows. This takes milliseconds, far less than compiling. It is needed because
    there are many GPUs, drivers and compilers, and a wrong map looks like any other.
    """
    query, key = (next(iter(kind.values())) for kind in (suffixes[0].q, suffixes[0].k))
    like = (query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], _vectors(len(suffixes)))
    if like not in _agreed:
        trial, *questions = (_random_rows(type(prefix), query, key, length) for length in (300, 40, 9, 5, 1)[: 1 + _vectors(len(suffixes))])
        visual = torch.arange(300) % 30 > 24
        rows = roll_out(trial, questions, visual)
        if rows is None:
            return False
        # Only the prefix: after it the rows are mostly the identity, which would hide an error.
        pairs = [(a[:, :300], b[:, :300]) for a, b in zip(rows, oracle(trial, questions, visual), strict=True)]
        errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
        _agreed[like] = all(error <= MAX_RELATIVE_ERROR for error in errors)  # an error may be NaN
        if not _agreed[like]:
            listed = ", ".join(f"{error:.1e}" for error in errors)
            log.warning(
                "The fused attention rollout is wrong on this machine (relative errors %s); using PyTorch instead, which is slower.", listed
            )
    return _agreed[like]


def _random_rows(kind: type, query: Tensor, key: Tensor, length: int):
    """Random q and k of one prompt, with heads like `query` and `key`.

    Three layers, so that the row vectors are non-zero at all positions. Heads go from flat to peaked attention, so that their weights differ.
    """
    random = torch.Generator(query.device).manual_seed(length)

    def layer(like: Tensor) -> Tensor:
        return torch.randn(1, like.shape[1], length, like.shape[3], generator=random, device=like.device)

    sharpness = torch.linspace(0.3, 3, query.shape[1], device=query.device)[:, None, None]
    queries = {number: (sharpness * layer(query)).to(query.dtype) for number in range(3)}
    return kind(query.shape[3] ** -0.5, queries, {number: layer(key).to(key.dtype) for number in range(3)})


def _vectors(count: int) -> int:
    """Row vectors per program for `count` questions."""
    return min(triton.next_power_of_2(count), MAX_VECTORS)


def roll_out(prefix, suffixes: Sequence, visual: Tensor, check_cancelled: Callable[[], None] = lambda: None) -> list[Tensor] | None:
    """The same as `rollout.last_row_rollout`, or None where the kernel cannot be compiled or launched.

    Args:
        check_cancelled: called once per layer; may raise to cancel.

    Raises:
        torch.OutOfMemoryError: as PyTorch does.
    """
    layers = sorted(prefix.q, reverse=True)
    packed = _Packed(
        suffixes[0].q[layers[0]].device,
        prefix.q[layers[0]],
        [suffix.q[layers[0]].shape[2] for suffix in suffixes],
        visual,
    )
    rows = packed.last_rows()
    for layer in layers:
        check_cancelled()
        try:
            q = packed.join([prompt.q[layer] for prompt in (prefix, *suffixes)])
            k = packed.join([prompt.k[layer] for prompt in (prefix, *suffixes)])
            rows = _pass_layer(q, k, rows, packed, prefix.scale)
        except Exception as error:  # errors of compiler and driver have no common base class
            if isinstance(error, torch.OutOfMemoryError):
                raise
            no_memory, kind, message = is_out_of_memory(error), type(error).__name__, str(error)
        else:
            continue
        # Outside the handler, because an error raised inside would keep the first one's frames alive, and the tensors in them.
        if no_memory:  # the kernel itself may be fine, so it is not marked as broken
            raise torch.OutOfMemoryError(message)
        broken.add(_with_index(packed.device))
        log.warning(
            "The fused attention rollout does not run on %s; using PyTorch instead, which is slower (%s: %s).", packed.device, kind, message
        )
        return None
    return [torch.cat([rows[:, i, : packed.shared], rows[:, i, a:b]], 1) for i, (a, b) in enumerate(packed.spans)]


class _Packed:
    """Layout of the packed sequence of N positions: the shared prefix, the suffixes, and padding to a multiple of the block size, which is
    treated as one more suffix.

    Attributes:
        starts, biases: (N,), as in the kernels.
        prompts: (Q, N) float32, 1 where a position is part of a prompt.
        spans: half-open range of each suffix.
    """

    def __init__(self, device: torch.device, queries: Tensor, counts: list[int], visual: Tensor):
        self.batch, _, self.shared, width = queries.shape
        self.device = device
        self.width = max(16, triton.next_power_of_2(width))
        major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        self.blocks = blocks(self.width, queries.element_size(), major)
        self.padding = -(self.shared + sum(counts)) % self.blocks[0]
        sizes = torch.tensor([self.shared, *counts, self.padding])
        ends = sizes.cumsum(0)
        self.length = int(ends[-1])
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
        return torch.cat([*parts, parts[0].new_zeros(1, 1, 1, 1).expand(batch, heads, self.padding, width)], 2)

    def last_rows(self) -> Tensor:
        """(B, Q, N): for each prompt 1 at its last position, else 0."""
        rows = torch.zeros(self.batch, len(self.spans), self.length, device=self.device)
        for i, (_, end) in enumerate(self.spans):
            rows[:, i, end - 1] = 1
        return rows


def _pass_layer(q: Tensor, k: Tensor, rows: Tensor, packed: _Packed, scale: float) -> Tensor:
    """Carries `rows` (B, Q, N) float32 through one layer with q (B, H, N, D) and k (B, KV, N, D)."""
    batch, heads, length, width = q.shape
    count = rows.shape[1]
    own, step, warps, stages = packed.blocks
    norms, maxima = rows.new_empty(2, batch, heads, length)
    products = rows.new_empty(batch, heads, count, length)
    vectors = _vectors(count)
    sizes = {"GROUP": heads // k.shape[1], "WIDTH": width, "PADDED": packed.width, "OWN": own, "STEP": step}
    options = sizes | {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    extent = length, packed.shared, scale * LOG2_E
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _row_statistics[batch * heads, length // own](q, k, packed.biases, packed.starts, norms, maxima, *extent, **options)
        weights = (maxima[:, :, None] * packed.prompts).sum(-1)
        weights /= weights.amax(1, keepdim=True)
        _row_products[batch * heads, length // own, triton.cdiv(count, vectors)](
            q, k, packed.starts, norms, rows, weights, products, *extent, count, HEADS=heads, VECTORS=vectors, **options
        )
    return products.sum(1).mul_(0.5 / heads).add_(rows, alpha=0.5)
