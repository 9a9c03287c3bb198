"""SAM 3's track data as ComfyUI makes them, packed by its own function, of objects whose masks are known. For ComfyUI's Python."""

from __future__ import annotations

import torch

SIDE = 1008
"""Pixels of SAM 3's masks: those of the whole frame, whatever its shape."""


def boxes(length: int, objects: int = 3) -> torch.Tensor:
    """(T, N, 1008, 1008) bool: boxes that move to the right, each in a row of its own; the last object comes late."""
    masks = torch.zeros(length, objects, SIDE, SIDE, dtype=torch.bool)
    high = SIDE // objects
    for frame in range(length):
        for index in range(objects):
            if index < objects - 1 or frame >= length // 2:
                left = 40 + 63 * frame + 90 * index
                masks[frame, index, index * high + 37 : (index + 1) * high - 41, left : left + 200] = True
    return masks


def track_data(masks: torch.Tensor, size: tuple[int, int], scores: list[float] | None = None) -> dict:
    """Of (T, N, 1008, 1008) bool, for frames of `size` (H, W). As core's tracker: positive logits are packed frame by frame."""
    from comfy.ldm.sam3.tracker import pack_masks

    packed = torch.stack([pack_masks(frame.float() * 20 - 10) for frame in masks])
    return {"packed_masks": packed, "n_frames": len(masks), "scores": scores or [0.9] * masks.shape[1], "orig_size": size}


def model(masks: torch.Tensor, asked: list):
    """A MODEL whose tracker answers with these masks and writes down what it is asked: the real one is fixed at a size that is too large."""
    import comfy.model_management as mm
    from comfy.model_patcher import ModelPatcher

    class Tracker:
        @staticmethod
        def forward_video(**given):
            asked.append(given)
            found = track_data(masks, (1, 1))
            del found["orig_size"]
            return found

    class Stand(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.diffusion_model = Tracker()

        def get_dtype(self):
            return torch.float32

    return ModelPatcher(Stand(), mm.get_torch_device(), mm.unet_offload_device())
