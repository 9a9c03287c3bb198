"""The rollout as the paper's formula says it, with L x L matrices in float64: what the streamed one is held against."""

import torch

from decaf.attention.rollout import CapturedQK


def dense_row(attentions, visual, start, *, v_max=True):
    """attentions: per layer (B, H, L, L) after softmax; visual (L,) bool -> last row (B, L) of the rollout of layers >= start."""
    rollout = None
    for attention in attentions[start:]:
        attention = attention.double()
        strength = attention[..., visual].amax(-1).mean(-1)
        weight = strength / strength.amax(-1, keepdim=True) if v_max else torch.ones_like(strength)
        mixed = 0.5 * (weight[..., None, None] * attention).mean(1) + 0.5 * torch.eye(attention.shape[-1], dtype=torch.float64)
        rollout = mixed if rollout is None else mixed @ rollout
    return rollout[:, -1]


def dense_attention(queries, keys, scale):
    """queries (B, H, L, D), keys (B, KV, L, D) of any dtype -> causal softmax attention (B, H, L, L) in float64."""
    queries, keys = queries.double(), keys.double().repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    scores = queries @ keys.transpose(2, 3) * scale
    length = scores.shape[-1]
    return scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def random_rows(batch, heads, groups, lengths, dim=16, dtype=torch.float32, layers=4):
    """Queries and keys of a prompt in pieces: a prefix and one suffix per further length."""
    pieces = []
    for length in lengths:
        rows = CapturedQK(dim**-0.5)
        for layer in range(layers):
            rows.q[layer] = (torch.randn(batch, heads, length, dim) * 2).to(dtype)
            rows.k[layer] = (torch.randn(batch, groups, length, dim) * 2).to(dtype)
        pieces.append(rows)
    return pieces[0], pieces[1:]


def dense_rows(prefix, suffix, visual, start=0, **options):
    """What `last_row_rollout` should give for one prompt."""
    attentions = {
        layer: dense_attention(
            torch.cat([prefix.q[layer], suffix.q[layer]], 2),
            torch.cat([prefix.k[layer], suffix.k[layer]], 2),
            prefix.scale,
        )
        for layer in prefix.q
    }
    length = next(iter(attentions.values())).shape[-1]
    seen = torch.cat([visual, torch.zeros(length - len(visual), dtype=torch.bool)])
    return dense_row([attentions[layer] for layer in sorted(attentions)], seen, start, **options)


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())
