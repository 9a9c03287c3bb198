"""Softmax attention whose values are narrower than its keys, and the same for all heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_TILE = 512
"""Queries and keys whose scores a CPU holds at a time: 1 MB, as much as a core's own cache."""

_WIDE = 128
"""Channels of a head below which a CPU takes longer over the exponentials than over the products."""


def narrow_value_attention(q: Tensor, k: Tensor, v: Tensor, check_cancelled: Callable[[], None] = lambda: None) -> Tensor:
    """`q`: (n, heads, queries, d). `k`: (n, heads, keys, d). `v`: (n, keys, c). `check_cancelled`: called every now and then where this
    takes long; may raise to stop.

    Returns (n, queries, heads * c): for every head the mean of the values, weighted by the softmax of q k / sqrt(d).
    """
    if q.device.type == "cpu" and q.dtype == torch.float32 and q.shape[-1] >= _WIDE and 2 * v.shape[-1] <= q.shape[-1]:
        return _by_tiles(q * q.shape[-1] ** -0.5, k, v, check_cancelled)
    # PyTorch's own fast attention wants values as wide as keys.
    heads, channels, width, scale = q.shape[1], v.shape[-1], max(q.shape[-1], v.shape[-1]), q.shape[-1] ** -0.5
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v[:, None]))
    out = F.scaled_dot_product_attention(q, k, v.expand(-1, heads, -1, -1), scale=scale)
    return out[..., :channels].transpose(1, 2).flatten(2)


def _by_tiles(q: Tensor, k: Tensor, v: Tensor, check_cancelled: Callable[[], None]) -> Tensor:
    """A tile of scores at a time, never a whole row (online softmax; Milakov and Gimelshein, 2018). PyTorch's attention must have values as
    wide as keys, four times as wide as SAM 2's memories: tracking an object by SAM 2.1 small at 1024 px then takes 1.37 times as long. `q`:
    scaled."""
    n, heads, queries, _ = q.shape
    out = q.new_empty(n, queries, heads, v.shape[-1])
    buffer = q.new_empty(_TILE * _TILE)
    for i in range(n):
        for head in range(heads):
            for first in range(0, queries, _TILE):
                check_cancelled()
                rows = slice(first, first + _TILE)
                out[i, rows, head] = _row_of_tiles(q[i, head, rows], k[i, head], v[i], buffer)
    return out.flatten(2)


def _row_of_tiles(q: Tensor, k: Tensor, v: Tensor, buffer: Tensor) -> Tensor:
    """(queries, d), (keys, d) and (keys, c) -> (queries, c)."""
    highest = q.new_full((len(q), 1), -torch.inf)
    total, out = torch.zeros_like(highest), q.new_zeros(len(q), v.shape[-1])
    for key, value in zip(k.split(_TILE), v.split(_TILE), strict=True):
        scores = torch.mm(q, key.T, out=buffer[: len(q) * len(key)].view(len(q), len(key)))
        before, highest = highest, torch.maximum(highest, scores.amax(-1, keepdim=True))
        fade = (before - highest).exp_()  # what is summed so far was measured against a lower top
        scores.sub_(highest).exp_()
        total.mul_(fade).add_(scores.sum(-1, keepdim=True))
        out.mul_(fade).addmm_(scores, value)
    return out.div_(total)
