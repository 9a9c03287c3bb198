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


def narrow_value_attention(query: Tensor, keys: Tensor, tokens: Tensor, check_cancelled: Callable[[], None] = lambda: None) -> Tensor:
    """`query`: (k, heads, m, d). `keys`: (k, heads, n, d). `tokens`: (k, n, c), the values.
    `check_cancelled`: called every now and then where this takes long; may raise to stop.

    Returns (k, m, heads * c): for every head the mean of the tokens, weighted by the softmax of query times key / sqrt(d).
    """
    if query.device.type == "cpu" and query.dtype == torch.float32 and query.shape[-1] >= _WIDE and 2 * tokens.shape[-1] <= query.shape[-1]:
        return _by_tiles(query * query.shape[-1] ** -0.5, keys, tokens, check_cancelled)
    # PyTorch's own fast attention wants values as wide as keys.
    heads, width, scale = query.shape[1], max(query.shape[-1], tokens.shape[-1]), query.shape[-1] ** -0.5
    query, keys, values = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (query, keys, tokens[:, None]))
    averaged = F.scaled_dot_product_attention(query, keys, values.expand(-1, heads, -1, -1), scale=scale)
    return averaged[..., : tokens.shape[-1]].transpose(1, 2).flatten(2)


def _by_tiles(query: Tensor, keys: Tensor, tokens: Tensor, check_cancelled: Callable[[], None]) -> Tensor:
    """A tile of scores at a time, never a whole row (online softmax; Milakov and Gimelshein, 2018). PyTorch's attention takes half again as
    long with tokens a quarter as wide as keys, since it must have them as wide. `query`: scaled."""
    k, heads, length, _ = query.shape
    averaged = query.new_empty(k, length, heads, tokens.shape[-1])
    buffer = query.new_empty(_TILE * _TILE)
    for i in range(k):
        for head in range(heads):
            for first in range(0, length, _TILE):
                check_cancelled()
                rows = slice(first, first + _TILE)
                averaged[i, rows, head] = _row_of_tiles(query[i, head, rows], keys[i, head], tokens[i], buffer)
    return averaged.flatten(2)


def _row_of_tiles(query: Tensor, keys: Tensor, tokens: Tensor, buffer: Tensor) -> Tensor:
    """(m, d), (n, d) and (n, c) -> (m, c)."""
    highest = query.new_full((len(query), 1), -torch.inf)
    total, averaged = torch.zeros_like(highest), query.new_zeros(len(query), tokens.shape[-1])
    for key, token in zip(keys.split(_TILE), tokens.split(_TILE), strict=True):
        scores = torch.mm(query, key.T, out=buffer[: len(query) * len(key)].view(len(query), len(key)))
        before, highest = highest, torch.maximum(highest, scores.amax(-1, keepdim=True))
        fade = (before - highest).exp_()  # what is summed so far was measured against a lower top
        scores.sub_(highest).exp_()
        total.mul_(fade).add_(scores.sum(-1, keepdim=True))
        averaged.mul_(fade).addmm_(scores, token)
    return averaged.div_(total)
