"""SAM 3's track data as ComfyUI makes them, packed by its own function, of objects whose masks are known. For ComfyUI's Python."""

from __future__ import annotations

from pathlib import Path

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

    class Tracker:
        @staticmethod
        def forward_video(**given):
            asked.append(given)
            found = track_data(masks, (1, 1))
            del found["orig_size"]
            return found

    return stand_in(Tracker())


def stand_in(segmenter):
    """A MODEL for core's nodes whose answers are those of `segmenter`."""
    import comfy.model_management as mm
    from comfy.model_patcher import ModelPatcher

    class Stand(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.diffusion_model = segmenter

        def get_dtype(self):
            return torch.float32

    return ModelPatcher(Stand(), mm.get_torch_device(), mm.unet_offload_device())


class KnowsTheScene:
    """Answers for SAM 3's model about a made-up scene whose true masks are known. It recognises frames by their pixels, whatever their size and
    order, and objects by a point or a mask on one of them."""

    def __init__(self, seed: int, length: int):
        from decaf.demo.scenes import make_scene

        scene = make_scene(seed, length=length)
        self._frames = self._small(torch.from_numpy(scene.frames).movedim(-1, 1) / 255)
        masks = torch.from_numpy(scene.masks).movedim(0, 1)
        self._masks = torch.nn.functional.interpolate(masks.float(), size=(SIDE, SIDE)) > 0.5  # (T, N, 1008, 1008)

    def forward_segment(self, frame, point_inputs=None, box_inputs=None, mask_inputs=None):
        if mask_inputs is not None:
            return mask_inputs
        masks = self._masks[self._which(frame)[0]]
        x, y = point_inputs["point_coords"][0].long().clamp(0, SIDE - 1).T
        return masks[masks[:, y, x].sum(1).argmax()][None, None].float() * 20 - 10

    def forward_video(self, images, initial_masks=None, text_prompts=None, **_):
        order = self._which(images)
        objects = list(range(self._masks.shape[1]))
        if initial_masks is not None:
            first, given = self._masks[order[0]], torch.nn.functional.interpolate(initial_masks.float(), size=(SIDE, SIDE))[:, 0] > 0.5
            objects = [int(((first & mask).sum((1, 2)) / (first | mask).sum((1, 2)).clamp(min=1)).argmax()) for mask in given]
        elif not text_prompts:
            raise AssertionError("SAM 3 was given neither a mask nor a text")
        found = track_data(self._masks[order][:, objects], (1, 1))
        del found["orig_size"]
        return found

    def _which(self, images) -> list[int]:
        return torch.cdist(self._small(images.float()).flatten(1), self._frames.flatten(1)).argmin(1).tolist()

    @staticmethod
    def _small(images):
        return torch.nn.functional.interpolate(images, size=(48, 64), mode="area")


def make_pack(custom_nodes: Path) -> None:
    """A pack for ComfyUI's server with what stands in for a checkpoint of SAM 3 in tests: "SceneSAM3" (MODEL) and "SceneText" (CONDITIONING)."""
    pack = custom_nodes / "recorded_sam3_for_tests"
    pack.mkdir(parents=True, exist_ok=True)
    here = Path(__file__)
    lines = (
        "import sys",
        f"sys.path.append({str(here.parent)!r})",
        f"sys.path.append({str(here.parents[2])!r})",
        "from recorded_sam3 import server_nodes",
        "NODE_CLASS_MAPPINGS = server_nodes()",
        "",
    )
    (pack / "__init__.py").write_text("\n".join(lines), encoding="utf-8")


def server_nodes() -> dict:
    class SceneSAM3:
        INPUT_TYPES = classmethod(lambda cls: {"required": {"seed": ("INT", {}), "length": ("INT", {})}})
        RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "tests"

        def make(self, seed, length):
            return (stand_in(KnowsTheScene(seed, length)),)

    class SceneText:
        INPUT_TYPES = classmethod(lambda cls: {"required": {"text": ("STRING", {})}})
        RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "tests"

        def make(self, text):
            if not text.strip():
                raise ValueError("SAM 3 was given an empty name")
            return ([[torch.zeros(1, 4, 8), {}]],)

    return {"SceneSAM3": SceneSAM3, "SceneText": SceneText}
