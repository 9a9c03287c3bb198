"""SAM 2's two heads for objects that are tracked without a prompt: masks from conditioned features, and memories from masks.

The package's own methods encode the missing prompt again on every frame, copy the image's features and positional encodings for every object, enlarge
all candidate masks to keep one of them, and enlarge with transposed convolutions, which for 2 x 2 pixels at a stride of 2 are matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .encoder import Features

_NOT_SEEN = -1024.0
"""Mask logit of an object that is not in the picture."""


class TrackingHeads:
    """Results equal those of `track_step` without a prompt, up to rounding.

    `model`: a `SAM2Base`, whose weights must stay as and where they are for the life of this object. To be called under
    `torch.inference_mode`, with autocast where half precision is wanted.
    """

    def __init__(self, model: nn.Module, memory_mask_size: int | None = None):
        """`memory_mask_size`: side of the masks that memories are made of, if not the picture's."""
        self._model, self._memory_mask_size = model, memory_mask_size
        decoder, encoder, device = model.sam_mask_decoder, model.sam_prompt_encoder, model.device
        with torch.autocast(device.type, enabled=False):
            no_points = (torch.zeros(1, 1, 2, device=device), -torch.ones(1, 1, dtype=torch.int32, device=device))
            sparse, dense = encoder(points=no_points, boxes=None, masks=None)
            self._no_mask_embed, self._image_pe = (x.flatten(2).transpose(1, 2) for x in (dense, encoder.get_dense_pe()))
            scored = [decoder.obj_score_token.weight] if model.pred_obj_scores else []
            self._tokens = torch.cat([*scored, decoder.iou_token.weight, decoder.mask_tokens.weight, sparse[0]])[None]
            up = decoder.output_upscaling
            self._enlarge = [_as_product(up[0]), _as_product(up[3])]
            # One small network for each candidate mask but the first, which is not for tracking; they are picked by candidate.
            networks = [network.layers for network in decoder.output_hypernetworks_mlps[1:]]
            self._networks = [
                (torch.stack([x.weight.T for x in step]), torch.stack([x.bias for x in step])) for step in zip(*networks, strict=True)
            ]

    def masks(self, conditioned: Tensor, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        """The best mask of each object. `conditioned`: (n, h * w, channels), the frame's features seen through each object's memories.

        Returns logits (n, 1, 4 h, 4 w) float32, object pointers (n, channels) and object scores (n, 1).
        """
        model, decoder = self._model, self._model.sam_mask_decoder
        tokens, image = self._transform(conditioned + self._no_mask_embed)
        first = int(model.pred_obj_scores)  # index of the token of predicted IoUs
        candidates = tokens[:, first + 2 : first + 1 + decoder.num_mask_tokens]
        best = decoder.iou_prediction_head(tokens[:, first])[:, 1:].argmax(-1)
        chosen = candidates[torch.arange(len(best), device=best.device), best]
        low = self._mask(self._upscaled(image, features), chosen, best, features.sizes[-1])
        pointers = model.obj_ptr_proj(chosen)
        if not model.pred_obj_scores:
            return low.float(), pointers, torch.full_like(pointers[:, :1], 10.0, dtype=torch.float32)
        score = decoder.pred_obj_score_head(tokens[:, 0])
        seen = score > 0
        low = torch.where(seen[..., None, None], low, _NOT_SEEN)
        if model.fixed_no_obj_ptr:
            pointers = seen.float() * pointers
        return low.float(), pointers + (1 - seen.float()) * model.no_obj_ptr, score

    def memories(self, features: Features, low: Tensor, score: Tensor) -> Tensor:
        """(n, 1, 4 h, 4 w) mask logits and (n, 1) object scores -> memories (n, channels, h, w)."""
        model, encoder = self._model, self._model.memory_encoder
        high = F.interpolate(low, size=(model.image_size,) * 2, mode="bilinear", align_corners=False)
        if self._memory_mask_size is not None:
            high = F.interpolate(high, size=(self._memory_mask_size,) * 2, mode="bilinear", align_corners=False)
        high = torch.sigmoid(high) * model.sigmoid_scale_for_mem_enc + model.sigmoid_bias_for_mem_enc
        _, lowest = features.maps(1)
        fused = encoder.pix_feat_proj(lowest) + encoder.mask_downsampler(high)
        memories = encoder.out_proj(encoder.fuser(fused.contiguous(memory_format=torch.channels_last)))
        if model.no_obj_embed_spatial is None:
            return memories
        return memories + (score <= 0)[..., None, None] * model.no_obj_embed_spatial[..., None, None]

    def _transform(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's two-way transformer: keys (n, h * w, channels), of the image -> tokens (n, t, channels) and keys."""
        transformer, query_pe, key_pe = self._model.sam_mask_decoder.transformer, self._tokens, self._image_pe
        tokens = query_pe
        for layer in transformer.layers:
            if layer.skip_first_layer_pe:
                tokens = layer.norm1(layer.self_attn(q=tokens, k=tokens, v=tokens))
            else:
                q = tokens + query_pe
                tokens = layer.norm1(tokens + layer.self_attn(q=q, k=q, v=tokens))
            k = keys + key_pe
            q = (tokens + query_pe).expand(len(keys), -1, -1)  # the first layer's are the same for all objects
            tokens = layer.norm2(tokens + layer.cross_attn_token_to_image(q=q, k=k, v=keys))
            tokens = layer.norm3(tokens + layer.mlp(tokens))
            keys = layer.norm4(keys + layer.cross_attn_image_to_token(q=k, k=tokens + query_pe, v=tokens))
        attended = transformer.final_attn_token_to_image(q=tokens + query_pe, k=keys + key_pe, v=keys)
        return transformer.norm_final_attn(tokens + attended), keys

    def _upscaled(self, image: Tensor, features: Features) -> Tensor:
        """(n, h * w, channels) -> (n, h * w, 4, 4, fewer channels): each token twice divided into 2 x 2 pixels."""
        _, norm, first_act, _, second_act = self._model.sam_mask_decoder.output_upscaling
        (first, first_bias), (second, second_bias) = self._enlarge
        halves = F.linear(image, first, first_bias).unflatten(-1, (4, -1))
        if len(features.levels) > 1:
            halves = halves + _divided(features, -2)
        halves = first_act(F.layer_norm(halves, halves.shape[-1:], norm.weight, norm.bias, norm.eps))
        quarters = F.linear(halves, second, second_bias).unflatten(-1, (4, -1))
        if len(features.levels) > 1:
            quarters = quarters + _divided(features, -3)
        return second_act(quarters)

    def _mask(self, pixels: Tensor, tokens: Tensor, best: Tensor, size: tuple[int, int]) -> Tensor:
        """`pixels` as `_upscaled` gives them, the chosen tokens (n, channels) and which candidates they are (n,) -> (n, 1, 4 h, 4 w)."""
        (h, w), hidden = size, tokens[:, None]
        for number, (weights, biases) in enumerate(self._networks):
            hidden = torch.baddbmm(biases[best][:, None], hidden, weights[best])
            hidden = F.relu(hidden) if number + 1 < len(self._networks) else hidden
        logits = pixels.flatten(1, 3) @ hidden.transpose(1, 2)
        return logits.view(-1, h, w, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 1, 4 * h, 4 * w)


def _as_product(convolution: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """A transposed convolution of 2 x 2 pixels at a stride of 2 as weight (4 * out, in) and bias (4 * out,), the four pixels row by row."""
    return convolution.weight.permute(2, 3, 1, 0).flatten(0, 2), convolution.bias.repeat(4)


def _divided(features: Features, level: int) -> Tensor:
    """A fine level's (h' * w', 1, channels) as (h * w, 4, channels), or (h * w, 4, 4, channels): the pixels of each token of the lowest level."""
    h, w = features.sizes[-1]
    grid = features.levels[level][:, 0].unflatten(0, features.sizes[level])
    if level == -2:
        return grid.view(h, 2, w, 2, -1).permute(0, 2, 1, 3, 4).reshape(h * w, 4, -1)
    return grid.view(h, 2, 2, w, 2, 2, -1).permute(0, 3, 1, 4, 2, 5, 6).reshape(h * w, 4, 4, -1)


def decoder_bytes(model: nn.Module) -> int:
    """Bytes that the mask decoder, or the memory encoder after it, which takes more, takes for one object or point: two copies of the image's tokens,
    and masks at the size of the input and what is made of them on the way down to the tokens' size."""
    tokens, width = model.sam_image_embedding_size**2, model.hidden_dim
    return round(4 * (2 * tokens * width + 8.6 * 16**2 * tokens))
