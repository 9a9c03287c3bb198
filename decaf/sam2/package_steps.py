"""The steps of a segmenter, each by the package's own methods of `SAM2Base` below its predictor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..tracking.segmenter import Clicks, MemoryBank, MemoryReach, Outputs
from .encoder import Features, normalised

MEMORY_DTYPE = torch.bfloat16
"""The predictor stores memories so, in every setting."""

_STEEPEST = 32.0
"""The largest logit of an earlier mask that the predictor hands to the mask decoder."""


class PackageSteps:
    """A `decaf.tracking.segmenter.Segmenter` that is equal to the package's video predictor bit for bit, as each object goes alone.

    `model`: a `SAM2Base`, whose weights must stay as and where they are for the life of this object. `dtype`: float32, or the half
    precision of autocast. A memory is a tensor (h * w, channels), a pointer one of (channels).
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, check_cancelled: Callable[[], None] = lambda: None):
        self._model, self._dtype, self._check_cancelled = model, dtype, check_cancelled
        self.image_size, self.device = model.image_size, model.device
        self.reach = MemoryReach(model.num_maskmem, model.max_obj_ptrs_in_encoder)
        self._memory_pos_enc: Tensor | None = None  # (1, channels, h, w), the same for all memories

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """No gradients, and half precision where it is asked for."""
        half = self._dtype != torch.float32
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=self._dtype if half else None, enabled=half):
            yield

    def encode(self, picture: Tensor) -> Features:
        with self._inference():
            return self._encode(normalised(picture.to(self.device))[None])

    def _encode(self, image: Tensor) -> Features:
        _, levels, pos_enc, sizes = self._model._prepare_backbone_features(self._model.forward_image(image))
        return Features(tuple(levels), pos_enc[-1], tuple(sizes))

    def point_masks(self, features: Features, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Of SAM 2's three masks for each point the one with the highest predicted IoU; logits at a quarter of the input size."""
        model, n = self._model, len(xy)
        with self._inference():
            fine, lowest = features.maps(n)
            lowest = lowest + model.no_mem_embed.view(1, -1, 1, 1)
            points = {
                "point_coords": (xy[:, None] * self.image_size).to(self.device),
                "point_labels": torch.ones(n, 1, dtype=torch.int32, device=self.device),
            }
            _, _, ious, low, *_ = model._forward_sam_heads(lowest, points, None, fine, model._use_multimask(True, points))
            return low, ious.float().amax(-1)

    # ---- the prompt's frame ----------------------------------------------------------------------------------------------------------

    def remember(self, features: Features, masks: Sequence[Tensor]) -> Outputs:
        return joined([self._remember(features, [mask]) for mask in masks])

    def _remember(self, features: Features, masks: Sequence[Tensor]) -> Outputs:
        with self._inference():
            out = self._given(features, masks)
            # The predictor memorises what is left of the mask at the low resolution, not the mask itself.
            return self._remembered(features, out["pred_masks"], out["object_score_logits"], out["obj_ptr"])

    def _given(self, features: Features, masks: Sequence[Tensor]) -> dict[str, Tensor]:
        """What the package makes of (H, W) masks that are given to it."""
        levels, pos_enc = features.flat(len(masks))
        return self._model.track_step(
            frame_idx=0,
            is_init_cond_frame=True,
            current_vision_feats=levels,
            current_vision_pos_embeds=pos_enc,
            feat_sizes=features.sizes,
            point_inputs=None,
            mask_inputs=self._mask_inputs(masks),
            output_dict={},
            num_frames=1,
            run_mem_encoder=False,
        )

    def _remembered(self, features: Features, low: Tensor, score: Tensor, pointers: Tensor) -> Outputs:
        """First memories of n objects: their logits (n, 1, h, w), object scores and pointers."""
        high = F.interpolate(low, size=(self.image_size,) * 2, mode="bilinear", align_corners=False)
        return self._memorised(features, low, high, score, pointers)

    def _memorised(self, features: Features, low: Tensor, high: Tensor, score: Tensor, pointers: Tensor) -> Outputs:
        """`high`: the logits that memories are made of, (n, 1, H, W)."""
        memories, pos_enc = self._model._encode_new_memory(features.flat(len(low))[0], features.sizes, high, score, True)
        self._memory_pos_enc = pos_enc[-1][:1]
        return Outputs(low, as_tokens(memories), [pointer.clone() for pointer in pointers])

    def remember_clicks(self, features: Features, clicks: Clicks, mask: Tensor | None) -> tuple[Outputs, float]:
        """As the predictor does for `add_new_points_or_box`, after `add_new_mask` on the same frame if there is a mask."""
        model = self._model
        with self._inference():
            # A box is two points with labels of their own, before all others.
            corners = torch.tensor(clicks.box or (), dtype=torch.float32).view(-1, 2)
            labels = [2, 3][: len(corners)] + clicks.positive.to(torch.int32).tolist()
            points = {
                "point_coords": (torch.cat([corners, clicks.xy])[None] * self.image_size).to(self.device),
                "point_labels": torch.tensor([labels], dtype=torch.int32, device=self.device),
            }
            before = None if mask is None else self._given(features, [mask])["pred_masks"].clamp(-_STEEPEST, _STEEPEST)
            fine, lowest = features.maps(1)
            lowest = lowest + model.no_mem_embed.view(1, -1, 1, 1)
            _, _, ious, low, _, pointers, score = model._forward_sam_heads(lowest, points, before, fine, model._use_multimask(True, points))
            return self._remembered(features, low, score, pointers), float(ious.float().amax())

    def _mask_inputs(self, masks: Sequence[Tensor]) -> Tensor:
        """(H, W) bool -> (n, 1, S, S) float32 of zeros and ones, resized as the predictor does."""
        size = (self.image_size,) * 2
        resized = []
        for mask in masks:
            mask = mask[None, None].to(self.device).float()
            if mask.shape[-2:] != size:
                mask = (F.interpolate(mask, size=size, mode="bilinear", align_corners=False, antialias=True) >= 0.5).float()
            resized.append(mask)
        return torch.cat(resized)

    # ---- a tracked frame -------------------------------------------------------------------------------------------------------------

    def track(self, features: Features, banks: Sequence[MemoryBank], remember: Sequence[bool], length: int) -> Outputs:
        return joined([self._track_one(features, bank, wanted, length) for bank, wanted in zip(banks, remember, strict=True)])

    def _track_one(self, features: Features, bank: MemoryBank, wanted: bool, length: int) -> Outputs:
        out = self._tracked(features, bank, wanted, length)
        memories = as_tokens(out["maskmem_features"]) if wanted else [None]
        return Outputs(out["pred_masks"], memories, [out["obj_ptr"][0]])

    def _tracked(self, features: Features, bank: MemoryBank, wanted: bool, length: int) -> dict[str, Tensor]:
        """What the package finds. `wanted`: with a memory."""
        with self._inference():
            levels, pos_enc = features.flat(1)
            # The package looks at distances in time alone: tracking backward is tracking forward in frames that are counted backward.
            frame = max(distance for distance, _ in [*bank.memories, *bank.pointers])
            return self._model.track_step(
                frame_idx=frame,
                is_init_cond_frame=False,
                current_vision_feats=levels,
                current_vision_pos_embeds=pos_enc,
                feat_sizes=features.sizes,
                point_inputs=None,
                mask_inputs=None,
                output_dict=self._output_dict(bank, frame),
                num_frames=length,
                run_mem_encoder=wanted,
            )

    def _output_dict(self, bank: MemoryBank, frame: int) -> dict[str, dict[int, dict[str, object]]]:
        """The memory bank in the predictor's structure, as seen from `frame`."""
        size = self._memory_pos_enc.shape[-2:]
        memories, pointers = ({frame - distance: x for distance, x in part} for part in (bank.memories, bank.pointers))
        outputs = {
            index: {
                "maskmem_features": memories[index].transpose(0, 1).unflatten(1, size)[None] if index in memories else None,
                "maskmem_pos_enc": [self._memory_pos_enc],
                "obj_ptr": pointers[index][None] if index in pointers else None,
            }
            for index in memories.keys() | pointers.keys()
        }
        prompts = [frame - distance for distance, _ in bank.memories[: bank.prompts]]
        return {"cond_frame_outputs": {prompt: outputs.pop(prompt) for prompt in prompts}, "non_cond_frame_outputs": outputs}


def joined(parts: Sequence[Outputs]) -> Outputs:
    """Of several batches, one after the other."""
    return Outputs(
        torch.cat([part.logits for part in parts]),
        [memory for part in parts for memory in part.memories],
        [pointer for part in parts for pointer in part.pointers],
    )


def as_tokens(memories: Tensor) -> list[Tensor]:
    """(n, channels, h, w) -> n times (h * w, channels), each with storage of its own: a view would keep the memories of the whole batch."""
    return [memory.clone() for memory in memories.to(MEMORY_DTYPE).flatten(2).transpose(1, 2)]
