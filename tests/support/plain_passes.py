"""Whole prompts through the model's own forward pass, one at a time, without anything of ours but ids and positions."""

import torch

from decaf.mllm.packed import pack


def whole_prompt(mllm, layout, question):
    """Token ids (L,), the mask (L,) of visual tokens and position ids (axes, L) of one prompt."""
    packed = pack(mllm, layout, [question])
    ids = torch.cat([packed.shared_ids, packed.question_ids[0]])
    mask = torch.cat([packed.visual, torch.zeros(len(packed.question_ids[0]), dtype=torch.bool)])
    return ids, mask, packed.positions[0]


def embedded(mllm, layout, frames, ids, mask):
    """Embeddings (batch, L, width) with the pictures in their places."""
    dtype = mllm.engine.dtype
    pixels = {k: v.to(dtype) if v.is_floating_point() else v for k, v in mllm.family.pixels(mllm, layout, frames).items()}
    embeds = mllm.model.get_input_embeddings()(ids.expand(layout.batch, -1))
    embeds[:, mask] = mllm.family.encode(mllm, layout, pixels).tokens.to(embeds)
    return embeds


def forward(mllm, embeds, positions, **options):
    """What the text tower gives for prompts (B, L, width) at `positions` (axes, L)."""
    positions = positions[:, None].expand(-1, len(embeds), -1)
    positions = positions[0] if len(positions) == 1 else positions
    whole = torch.ones(embeds.shape[:2], dtype=torch.long)  # GLM's code in transformers 4.57 cannot do without, though nothing is padded
    return mllm.engine.text_tower(inputs_embeds=embeds, position_ids=positions, attention_mask=whole, use_cache=False, **options)
