"""SAM 2's mask decoder for objects that are tracked without a prompt.

The package's own method encodes the missing prompt again on every frame, and brings all three candidate masks to the size of the input to keep
one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NOT_SEEN = -1024.0
"""Mask logit of an object that is not in the picture."""


@dataclass(frozen=True)
class NoPrompt:
    """What the prompt encoder makes of no prompt, the same for every tracked frame: `sparse` (1, 1, channels), `dense` and `place`
    (1, channels, h, w)."""

    sparse: Tensor
    dense: Tensor
    place: Tensor

    @classmethod
    def of(cls, model: nn.Module) -> NoPrompt:
        encoder, device = model.sam_prompt_encoder, model.device
        nowhere = (torch.zeros(1, 1, 2, device=device), -torch.ones(1, 1, dtype=torch.int32, device=device))
        sparse, dense = encoder(points=nowhere, boxes=None, masks=None)
        return cls(sparse, dense, encoder.get_dense_pe())


def decode(model: nn.Module, conditioned: Tensor, fine: list[Tensor] | None, prompt: NoPrompt) -> tuple[Tensor, Tensor, Tensor]:
    """The best mask of each object that is tracked without a prompt.

    `conditioned`: (n, channels, h, w); `fine`: the high-resolution maps, (n, ...) each. Returns logits (n, 1, 4 h, 4 w) float32, object
    pointers (n, channels) and object scores (n, 1).
    """
    n = len(conditioned)
    masks, ious, tokens, score = model.sam_mask_decoder(
        image_embeddings=conditioned,
        image_pe=prompt.place,
        sparse_prompt_embeddings=prompt.sparse.expand(n, -1, -1),
        dense_prompt_embeddings=prompt.dense.expand(n, -1, -1, -1),
        multimask_output=True,
        repeat_image=False,
        high_res_features=fine,
    )
    best = ious.argmax(-1)
    objects = torch.arange(n, device=best.device)
    low = masks[objects, best][:, None]
    pointers = model.obj_ptr_proj(tokens[objects, best])
    if model.pred_obj_scores:
        seen = score > 0
        low = torch.where(seen[..., None, None], low, _NOT_SEEN)
        if model.fixed_no_obj_ptr:
            pointers = seen.float() * pointers
        pointers = pointers + (1 - seen.float()) * model.no_obj_ptr
    return low.float(), pointers, score
