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
    """Embeddings (batch, L, width) with the pictures in their places, and deepstack levels (batch, tokens, width)."""
    dtype = mllm.engine.dtype
    pixels = {k: v.to(dtype) if v.is_floating_point() else v for k, v in mllm.family.pixels(mllm, layout, frames).items()}
    embeds = mllm.model.get_input_embeddings()(ids.expand(layout.batch, -1))
    encoded = mllm.family.encode(mllm, layout, pixels)
    embeds[:, mask] = encoded.tokens.to(embeds)
    return embeds, encoded.deepstack


def in_float64(mllm):
    """Has the model compute in float64, its text tower with attention that can be looked at, and with experts that can do so."""
    mllm.model.double()
    mllm.engine.text_tower.set_attn_implementation("eager")
    if hasattr(mllm.engine.text_tower, "set_experts_implementation"):  # since transformers 5
        mllm.engine.text_tower.set_experts_implementation("eager")


def forward(mllm, embeds, positions, mask, deepstack, **options):
    """What the text tower gives for prompts (B, L, width) at `positions` (axes, L), the first tokens of which are visual where `mask` says so."""
    positions = positions[:, None].expand(-1, len(embeds), -1)
    positions = positions[0] if len(positions) == 1 else positions
    # As processors give it. Without one, transformers 4.57 takes jumps of the positions for the borders of separate texts.
    options["attention_mask"] = torch.ones(embeds.shape[:2], dtype=torch.long)
    if deepstack:
        visual = torch.cat([mask, torch.zeros(embeds.shape[1] - len(mask), dtype=torch.bool)])
        options["visual_pos_masks"] = visual.repeat(len(embeds), 1)
        options["deepstack_visual_embeds"] = [torch.cat(list(level)) for level in deepstack]
    return mllm.engine.text_tower(inputs_embeds=embeds, position_ids=positions, use_cache=False, **options)
