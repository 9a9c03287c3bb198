"""Qwen2-VL and Qwen2.5-VL: pictures of any size on a grid of 28 x 28 pixel tokens, two video frames to a slot, three-axis positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..base import MLLM, Encoded, Family, Layout, TowerLayer, VisionShape, whole_number
from ..pictures import fit_grid, normalised, resize

FEWEST_TOKENS = 128
"""Smaller pictures are enlarged to this many tokens a frame: on coarse grids attention cannot tell neighbours apart."""

LARGEST_CELL = 64
"""Side in pixels of what a visual token covers; published models have 28 and 32. Pictures are enlarged to whole cells."""

SECONDS_PER_SLOT = 1.0
"""Key frames are sampled unevenly in time, so a clip is always declared to have two frames per second, two frames to a slot (as the paper's
reference does)."""


def _as_product(convolution: nn.Conv3d) -> nn.Linear:
    """A convolution whose kernel covers the whole patch, as the product that it is: PyTorch's 3D convolutions are several times slower.

    It takes the same patches (n, channels, frames, height, width), and gives (n, width of the tower).
    """
    weight, bias = convolution.weight, convolution.bias
    product = nn.Linear(weight[0].numel(), len(weight), bias is not None, device="meta")
    product.weight, product.bias = nn.Parameter(weight.flatten(1), requires_grad=False), bias
    product.register_forward_pre_hook(lambda module, inputs: (inputs[0].flatten(1),))
    return product


class QwenVL(Family):
    name = "Qwen2-VL"
    title = "Qwen2-VL and Qwen2.5-VL"
    rank = 1
    model_types = ("qwen2_vl", "qwen2_5_vl")
    text_types = ("qwen2_vl", "qwen2_5_vl", "qwen2_vl_text", "qwen2_5_vl_text")
    vision_types = ("qwen2_vl", "qwen2_5_vl", "qwen2_vl_vision", "qwen2_5_vl_vision")
    repositories = (
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "Qwen/Qwen2-VL-2B-Instruct",
        "Qwen/Qwen2-VL-7B-Instruct",
    )
    system = "You are a helpful assistant."
    opening = "<|im_start|>user\n"
    closing = "<|im_end|>\n<|im_start|>assistant\n"
    visual_tokens = {"video": "<|video_pad|>", "image": "<|image_pad|>"}
    tower_layer = TowerLayer(attending=10, attending_in_half=18, feeding=3, inner=3)  # gated in Qwen2.5-VL
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def prepare(self, model: nn.Module) -> None:
        patches = model.model.visual.patch_embed
        patches.proj = _as_product(patches.proj)

    def vision_shape(self, config: object) -> VisionShape:
        vision, timed = config.vision_config, config.model_type == "qwen2_5_vl"
        merge = whole_number(vision, "spatial_merge_size", 1, 8)
        patch = whole_number(vision, "patch_size", 1, LARGEST_CELL // merge)
        if timed:  # windows of the vision tower's attention, in pixels; they hold whole tokens
            whole_number(vision, "window_size", patch * merge, 1 << 14)
        # Qwen2-VL counts slots, Qwen2.5-VL time.
        step = SECONDS_PER_SLOT * whole_number(vision, "tokens_per_second", 1, 1000) if timed else 1
        return VisionShape(patch, merge, whole_number(vision, "temporal_patch_size", 1, 8), step)

    def video_layout(self, shape: VisionShape, frame_size: tuple[int, int], seconds: Sequence[float], max_tokens: int) -> Layout:
        rows, cols = self._grid(shape, frame_size, max_tokens)
        slots = -(-len(seconds) // shape.frames_per_slot)
        return self._layout("video", (slots, rows, cols), 1, len(seconds))

    def image_layout(self, shape: VisionShape, frame_size: tuple[int, int], batch: int, max_tokens: int) -> Layout:
        # Exactly twice the video's grid, so that a video cell is four image cells.
        rows, cols = (2 * side for side in self._grid(shape, frame_size, max_tokens))
        return self._layout("image", (1, rows, cols), batch, batch)

    def coarse_image_layout(self, shape: VisionShape, frame_size: tuple[int, int], batch: int, max_tokens: int) -> Layout:
        return self._layout("image", (1, *self._grid(shape, frame_size, max_tokens)), batch, batch)

    @staticmethod
    def _grid(shape: VisionShape, frame_size: tuple[int, int], max_tokens: int) -> tuple[int, int]:
        return fit_grid(*frame_size, shape.cell, min(FEWEST_TOKENS, max_tokens), max_tokens)

    @staticmethod
    def _layout(kind: str, grid: tuple[int, int, int], batch: int, frames: int) -> Layout:
        slots, rows, cols = grid
        return Layout(kind, grid, ("<|vision_start|>", slots * rows * cols, "<|vision_end|>"), batch, frames)

    def pixels(self, mllm: MLLM, layout: Layout, frames: Sequence[Tensor]) -> dict[str, Tensor]:
        slots, rows, cols = layout.grid
        shape = mllm.vision
        pictures = normalised([resize(frame, rows * shape.cell, cols * shape.cell) for frame in frames], mllm.mean, mllm.std)
        span = shape.frames_per_slot
        if layout.kind == "image":  # a picture fills its slot alone
            pictures = pictures.repeat_interleave(span, 0)
        elif len(pictures) % span:
            pictures = torch.cat([pictures, pictures[-1:].expand(-len(pictures) % span, -1, -1, -1)])
        # The tower takes the patches of a token one after the other, each as channels, frames, rows, columns.
        cut = pictures.view(-1, span, 3, rows, shape.merge, shape.patch, cols, shape.merge, shape.patch)
        patches = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * span * shape.patch**2)
        grid = torch.tensor([[slots, rows * shape.merge, cols * shape.merge]] * layout.batch)
        names = {"video": ("pixel_values_videos", "video_grid_thw"), "image": ("pixel_values", "image_grid_thw")}[layout.kind]
        return dict(zip(names, (patches, grid), strict=True))

    def encode(self, mllm: MLLM, layout: Layout, pixels: Mapping[str, Tensor]) -> Encoded:
        tokens, levels = mllm.engine.see(pixels)
        return Encoded(tokens.view(layout.batch, layout.tokens, -1), tuple(level.view(layout.batch, layout.tokens, -1) for level in levels))

    def position_ids(self, shape: VisionShape, visual: Tensor, layout: Layout | None) -> Tensor:
        """(3, L): time, row and column of visual tokens, counted on from the text before them; text has three equal coordinates.

        Text after the pictures goes on one past the largest position on any axis, time included, as these models were trained.
        transformers 5 starts it after max(rows, cols) instead, which on long videos of few tokens overlaps the video's own positions.
        """
        if layout is None:
            return torch.arange(len(visual)).expand(3, -1)
        before = int(visual.int().argmax())
        after = len(visual) - before - layout.tokens
        slots, rows, cols = layout.grid
        step = shape.slot_step if layout.kind == "video" else 1
        axes = (torch.arange(slots) * step).long(), torch.arange(rows), torch.arange(cols)
        seen = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + before
        rest = torch.arange(after) + int(seen.max()) + 1
        return torch.cat([torch.arange(before).expand(3, -1), seen, rest.expand(3, -1)], 1)


FAMILY = QwenVL()
