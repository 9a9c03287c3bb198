"""SAM 2's memory attention for many objects on one image, whose memories differ in number.

The package's own module takes a batch of equal lengths. Here everything runs in one batch but the cross-attention itself, which runs once
per group of objects with equally many memories: no padding, no mask, and the first layer's self-attention, which no object has touched yet,
only once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .package import sam2_package


@dataclass(frozen=True)
class MemoryTokens:
    """Memories of k objects: `objects` their places in the batch, `tokens` and `position` (k, length, channels), of which the last
    `pointers` tokens are object pointers, which get no rotary position code."""

    objects: list[int]
    tokens: Tensor
    position: Tensor
    pointers: int


def attend(attention: nn.Module, current: Tensor, position: Tensor, groups: list[MemoryTokens]) -> Tensor:
    """Same result as `attention` (a `MemoryAttention`) object by object, up to rounding.

    `current`, `position`: (1, h * w, channels), the image's features and position codes. Returns (n, h * w, channels) for the n objects of
    all groups.
    """
    hidden = current + 0.1 * position
    for layer in attention.layers:
        hidden = layer._forward_sa(hidden, position)
        hidden = hidden + _cross_attention(layer.cross_attn_image, layer.norm2(hidden), groups)
        hidden = hidden + layer.linear2(layer.activation(layer.linear1(layer.norm3(hidden))))
    return attention.norm(hidden)


def _cross_attention(attention: nn.Module, hidden: Tensor, groups: list[MemoryTokens]) -> Tensor:
    """`hidden`: (1 or n, h * w, channels), one for all objects as long as they are equal. Returns (n, h * w, channels)."""
    heads = attention.num_heads
    query = attention._separate_heads(attention.q_proj(hidden), heads)
    side = query.shape[-2] ** 0.5
    rotary = attention.compute_cis(end_x=side, end_y=side).to(query.device)
    outputs = []
    for group in groups:
        key = attention._separate_heads(attention.k_proj(group.tokens + group.position), heads)
        value = attention._separate_heads(attention.v_proj(group.tokens), heads)
        spatial = key.shape[-2] - group.pointers
        own = query if len(query) == 1 else query[group.objects]
        own, rotated = sam2_package().apply_rotary_enc(own, key[:, :, :spatial], freqs_cis=rotary, repeat_freqs_k=attention.rope_k_repeat)
        key = torch.cat([rotated, key[:, :, spatial:]], dim=2)
        outputs.append(F.scaled_dot_product_attention(own.expand(len(group.objects), -1, -1, -1), key, value))
    places = torch.tensor([place for group in groups for place in group.objects], device=hidden.device)
    merged = torch.cat(outputs)[places.argsort()]
    return attention.out_proj(attention._recombine_heads(merged))
