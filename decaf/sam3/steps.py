"""The steps of a segmenter for SAM 3: those of SAM 2, but for what transformers' tracker does otherwise.

Its token stands for 14 x 14 pixels instead of 16 x 16, so that masks of the picture's size are enlarged before memories are made of them. It
remembers a mask that it is given as it is, not what the low resolution leaves of it, with the pointer of the best of the three masks that it
would have made of it. And of many prompts of one object it looks at the memories of four.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..sam2.encoder import Features
from ..sam2.fast_steps import FastSteps
from ..sam2.package_steps import PackageSteps, as_tokens
from ..tracking.segmenter import MemoryBank, Outputs

MOST_PROMPTS = 4
"""Prompts of an object whose memories are looked at; the nearest in time, on both sides."""


class _Sam3(PackageSteps):
    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, check_cancelled: Callable[[], None] = lambda: None):
        self.memory_mask_size = 16 * model.sam_image_embedding_size
        super().__init__(model, dtype, check_cancelled)
        self._pos_enc: Tensor | None = None

    def encode(self, picture: Tensor) -> Features:
        with self._inference():
            image = picture.to(self.device).permute(2, 0, 1)[None].float() / 127.5 - 1
            decoder = self._model.sam_mask_decoder
            finest, fine, lowest = self._model.image_encoder(image)
            maps = decoder.conv_s0(finest), decoder.conv_s1(fine), lowest
            if self._pos_enc is None:
                self._pos_enc = _flat(self._model.image_encoder.position_encoding(lowest))
            return Features(tuple(_flat(one) for one in maps), self._pos_enc, tuple(tuple(one.shape[-2:]) for one in maps))

    def _remember(self, features: Features, masks: Sequence[Tensor]) -> Outputs:
        with self._inference():
            out = self._given(features, masks)
            return self._memorised(features, out["pred_masks"], out["pred_masks_high_res"], out["object_score_logits"], out["obj_ptr"])

    def _given(self, features: Features, masks: Sequence[Tensor]) -> dict[str, Tensor]:
        model, given = self._model, self._mask_inputs(masks)
        fine, lowest = features.maps(len(masks))
        *_, pointers, _ = model._forward_sam_heads(lowest, None, model.mask_downsample(given), fine, multimask_output=True)
        there = given.flatten(1).any(1, keepdim=True).float()
        high = 20 * given - 10
        low = F.interpolate(high, size=model.sam_prompt_encoder.mask_input_size, mode="bilinear", align_corners=False, antialias=True)
        return {
            "pred_masks": low,
            "pred_masks_high_res": high,
            "object_score_logits": 20 * there - 10,
            "obj_ptr": there * pointers + (1 - there) * model.no_obj_ptr,
        }

    def _memorised(self, features: Features, low: Tensor, high: Tensor, score: Tensor, pointers: Tensor) -> Outputs:
        return super()._memorised(features, low, self._enlarged(high), score, pointers)

    def _enlarged(self, high: Tensor) -> Tensor:
        return F.interpolate(high, size=(self.memory_mask_size,) * 2, mode="bilinear", align_corners=False, antialias=True)

    def track(self, features: Features, banks: Sequence[MemoryBank], remember: Sequence[bool], length: int) -> Outputs:
        reach = self.reach.memories - 1
        return super().track(features, [nearest_prompts(bank, MOST_PROMPTS, reach) for bank in banks], remember, length)


class Sam3PackageSteps(_Sam3):
    """By the package's own methods, one object after the other."""

    def _track_one(self, features: Features, bank: MemoryBank, wanted: bool, length: int) -> Outputs:
        out, memories = self._tracked(features, bank, False, length), [None]
        if wanted:
            with self._inference():
                high, score = self._enlarged(out["pred_masks_high_res"]), out["object_score_logits"]
                memories = as_tokens(self._model._encode_new_memory(features.flat(1)[0], features.sizes, high, score, False)[0])
        return Outputs(out["pred_masks"], memories, [out["obj_ptr"][0]])


class Sam3FastSteps(_Sam3, FastSteps):
    """In this library's way, all objects of a frame in one batch."""


def nearest_prompts(bank: MemoryBank, most: int, reach: int) -> MemoryBank:
    """The bank with the memories of at most so many prompts: the nearest before and after the frame, and then the nearest of the others. One
    that is left out is a memory like any other, if it is at most `reach` frames before. Pointers stay."""
    if bank.prompts <= most:
        return bank
    prompts, tracked = list(bank.memories[: bank.prompts]), list(bank.memories[bank.prompts :])
    before = min((one for one in prompts if one[0] > 0), key=lambda one: one[0], default=None)
    after = max((one for one in prompts if one[0] <= 0), key=lambda one: one[0], default=None)
    first = [one for one in (before, after) if one is not None]
    others = sorted((one for one in prompts if all(one is not other for other in first)), key=lambda one: abs(one[0]))
    chosen = {id(one) for one in [*first, *others[: most - len(first)]]}
    left = [one for one in prompts if id(one) not in chosen and 0 < one[0] <= reach]
    tracked = sorted([*tracked, *left], key=lambda one: -one[0])
    return MemoryBank([*(one for one in prompts if id(one) in chosen), *tracked], bank.pointers, most)


def _flat(one: Tensor) -> Tensor:
    """(1, channels, h, w) -> (h * w, 1, channels)."""
    return one.flatten(2).permute(2, 0, 1)
