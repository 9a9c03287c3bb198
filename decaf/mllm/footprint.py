"""What the passes of a model take on a device beside its weights, from its shapes alone.

Each function counts the tensors that are alive at the most crowded moment of one step. They are compared with what PyTorch's allocator is asked
for in `tests/test_memory_estimates.py`.
"""

from __future__ import annotations

import torch

from .base import MLLM, Layout

COS_AND_SIN = 2
"""Tables of the rotary embedding, each of a head's width per token."""


def seeing_bytes(mllm: MLLM, layout: Layout, device: torch.device) -> int:
    """Of the vision tower with the pictures of `layout`: pixels, and the layer that holds the most. On a CPU the float32 pixels, and what they are
    made from, count too."""
    width, size = mllm.engine.vision_width, mllm.engine.vision_dtype.itemsize
    patches = layout.batch * layout.tokens * mllm.vision.merge**2
    pixels = patches * 3 * mllm.vision.frames_per_slot * mllm.vision.patch**2
    layer, inner = mllm.family.tower_layer, mllm.engine.vision_inner_width
    attending = (layer.attending if size == 4 else layer.attending_in_half) * width
    tower = round(patches * size * max(attending, layer.feeding * width + layer.inner * inner))
    if device.type != "cpu":
        return pixels * size + tower
    copied = pixels * size if size < 4 else 0
    cut = 1 if mllm.vision.tile else 2  # whole pictures are cut into patches, tiles are taken as they are
    return max(cut * 4 * pixels, 4 * pixels + copied + tower)


def seen_bytes(mllm: MLLM, layout: Layout) -> int:
    """Of the visual tokens, with their deepstack levels, that the tower has made of the pictures."""
    return layout.batch * layout.tokens * mllm.engine.shape.width * mllm.engine.dtype.itemsize * (1 + mllm.engine.deepstack_levels)


def passing_bytes(mllm: MLLM, tokens: int) -> int:
    """Of the hidden states of `tokens` tokens on their way through a decoder layer."""
    text = mllm.engine.shape
    queries, keys = text.heads * text.head_width, text.kv_heads * text.head_width
    # Embeddings, the layer's input and its normed copy; then queries, keys and values, and these repeated for every query head and mixed.
    attending = 3 * text.width + 4 * queries + 2 * keys
    # The same, and what attention has added to; then both halves of the gate and their product.
    feeding = 4 * text.width + 3 * text.inner_width
    return tokens * (max(attending, feeding) + COS_AND_SIN * text.head_width) * mllm.engine.dtype.itemsize


def query_bytes(mllm: MLLM, tokens: int, start_layer: int) -> int:
    """Of the captured attention queries of layers >= `start_layer`."""
    text = mllm.engine.shape
    return tokens * text.heads * text.head_width * (text.layers - start_layer) * mllm.engine.dtype.itemsize


def kept_bytes(mllm: MLLM, tokens: int, start_layer: int, *, keep: bool) -> int:
    """Of the captured keys, and with `keep` of the keys and values of all layers, which the captured ones are a part of."""
    text = mllm.engine.shape
    key_width = text.kv_heads * text.head_width
    layers = 2 * text.layers if keep else text.layers - start_layer
    return tokens * key_width * layers * mllm.engine.dtype.itemsize


def generating_bytes(mllm: MLLM, tokens: int) -> int:
    """Of a step that generates behind `tokens` tokens whose keys and values are kept: these once more, with the new token's behind them."""
    return kept_bytes(mllm, tokens, 0, keep=True)
