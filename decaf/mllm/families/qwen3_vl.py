"""Qwen3-VL, dense and mixture of experts: 32 x 32 pixel tokens, the time of each video slot in words, features of several depths (deepstack)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import DecafError
from ..base import Layout, TowerLayer, VisionShape, whole_number
from ..folder import MOST_LAYERS
from .qwen_vl import QwenVL

START, END = "<|vision_start|>", "<|vision_end|>"


class Qwen3VL(QwenVL):
    name = "Qwen3-VL"
    title = "Qwen3-VL"
    rank = 2
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    text_types = ("qwen3_vl_text", "qwen3_vl_moe_text")
    vision_types = ("qwen3_vl", "qwen3_vl_vision", "qwen3_vl_moe", "qwen3_vl_moe_vision")
    repositories = (
        "Qwen/Qwen3-VL-2B-Instruct",
        "Qwen/Qwen3-VL-4B-Instruct",
        "Qwen/Qwen3-VL-8B-Instruct",
        "Qwen/Qwen3-VL-32B-Instruct",
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
    )
    system = ""
    tower_layer = TowerLayer(attending=10, attending_in_half=18, feeding=3, inner=2)
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def vision_shape(self, config: object) -> VisionShape:
        shape = super().vision_shape(config)
        blocks = range(whole_number(config.vision_config, "depth", 1, MOST_LAYERS))
        layers, levels = config.get_text_config().num_hidden_layers, config.vision_config.deepstack_visual_indexes
        # The model would leave out what has no block or no layer, without a word.
        if not isinstance(levels, list | tuple) or len(set(levels) & set(blocks)) != len(levels) or len(levels) > layers:
            raise DecafError(
                f"The model's config.json gives {levels!r:.60} for deepstack_visual_indexes; these must be different blocks of the vision "
                f"tower's {len(blocks)}, at most {layers} of them. Download the model again."
            )
        return shape

    def video_layout(self, shape: VisionShape, frame_size: tuple[int, int], seconds: Sequence[float], max_tokens: int) -> Layout:
        """Each slot stands behind its time, the middle between its first and its last frame, since key frames are spread over the clip.

        The slots' tokens stand in the prompt as the models were published with them (transformers 4.57). From 5.10 on, transformers writes
        another start and end token around them all.
        """
        rows, cols = self._grid(shape, frame_size, max_tokens)
        span, parts = shape.frames_per_slot, []
        for first in range(0, len(seconds), span):
            time = (seconds[first] + seconds[min(first + span, len(seconds)) - 1]) / 2
            parts += [f"{END if parts else ''}<{time:.1f} seconds>{START}", rows * cols]
        return Layout("video", (len(parts) // 2, rows, cols), (*parts, END), 1, len(seconds))

    def position_ids(self, shape: VisionShape, visual: Tensor, layout: Layout | None) -> Tensor:
        """(3, L): time, row and column. Every slot counts as a picture of its own: time stands still in it, and what follows goes on
        max(rows, cols) behind its start. Some versions between transformers 4.57 and 5.4 take the slots for one picture, against the training."""
        if layout is None:
            return torch.arange(len(visual)).expand(3, -1)
        slots, rows, cols = layout.grid
        picture = torch.stack(torch.meshgrid(torch.zeros(1).long(), torch.arange(rows), torch.arange(cols), indexing="ij")).flatten(1)
        parts, done, position = [], 0, 0
        for start in visual.nonzero()[:, 0].view(slots, -1)[:, 0].tolist():
            words = start - done
            parts += [torch.arange(words).expand(3, -1) + position, picture + position + words]
            position += words + max(rows, cols)
            done = start + rows * cols
        return torch.cat([*parts, torch.arange(len(visual) - done).expand(3, -1) + position], 1)


FAMILY = Qwen3VL()
