"""InternVL3 and InternVL3.5 (hub format, model type "internvl"): square tiles of a fixed number of tokens.

A video frame is one tile; an image is several. The text tower is Qwen2 in InternVL3 and Qwen3 in InternVL3.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import DecafError
from ..base import MLLM, Encoded, Family, Layout, TowerLayer, VisionShape, whole_number
from ..pictures import normalised, resize

MOST_TILES = 12
"""Tiles per image, as the models were trained."""

MOST_TOKENS_OF_A_TILE = 4096
"""Published models have 256."""


class InternVL(Family):
    name = "InternVL3"
    title = "InternVL3 and InternVL3.5"
    rank = 3
    model_types = ("internvl",)
    text_types = ("qwen2", "qwen3")
    vision_types = ("internvl_vision",)
    repositories = (
        "OpenGVLab/InternVL3-2B-hf",
        "OpenGVLab/InternVL3-8B-hf",
        "OpenGVLab/InternVL3-14B-hf",
        "OpenGVLab/InternVL3_5-2B-HF",
        "OpenGVLab/InternVL3_5-4B-HF",
        "OpenGVLab/InternVL3_5-8B-HF",
        "OpenGVLab/InternVL3_5-14B-HF",
    )
    opening = "<|im_start|>user\n"
    closing = "<|im_end|>\n<|im_start|>assistant\n"
    tower_layer = TowerLayer(attending=8, attending_in_half=9, feeding=5, inner=2)
    visual_tokens = {"video": "<IMG_CONTEXT>", "image": "<IMG_CONTEXT>"}
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def vision_shape(self, config: object) -> VisionShape:
        patch, tile = whole_number(config.vision_config, "patch_size", 1, 128), whole_number(config.vision_config, "image_size", 1, 4096)
        ratio = getattr(config, "downsample_ratio", None)
        merge = round(1 / ratio) if isinstance(ratio, int | float) and 0 < ratio <= 1 else 0
        if not 0 < merge <= 16 or merge * ratio != 1 or tile % (patch * merge) or (tile // (patch * merge)) ** 2 > MOST_TOKENS_OF_A_TILE:
            raise DecafError(
                f"The model's config.json gives tiles of {tile} pixels, patches of {patch} and a downsample_ratio of {ratio!r:.60}, which do "
                "not fit together. Download the model again."
            )
        return VisionShape(patch, merge, tile=tile)

    def video_layout(self, shape: VisionShape, frame_size: tuple[int, int], seconds: Sequence[float], max_tokens: int) -> Layout:
        side, parts = shape.tile // shape.cell, []
        for number in range(1, len(seconds) + 1):
            parts += [f"{'</img>' + chr(10) if parts else ''}Frame{number}: <img>", side * side]
        return Layout("video", (len(seconds), side, side), (*parts, "</img>"), 1, len(seconds), rest="\n")

    def image_layout(self, shape: VisionShape, frame_size: tuple[int, int], batch: int, max_tokens: int) -> Layout:
        return self._image_layout(shape, choose_tiles(*frame_size, shape.tile), batch)

    def coarse_image_layout(self, shape: VisionShape, frame_size: tuple[int, int], batch: int, max_tokens: int) -> Layout:
        return self._image_layout(shape, (1, 1), batch)  # a single tile, as in the video

    @staticmethod
    def _image_layout(shape: VisionShape, tiles: tuple[int, int], batch: int) -> Layout:
        side, (rows, cols) = shape.tile // shape.cell, tiles
        # In the prompt all tokens of a tile come before those of the next; on the map they lie side by side.
        order = torch.arange(rows * cols * side * side).view(rows, cols, side, side).permute(0, 2, 1, 3).flatten()
        parts = ("<img>", rows * cols * side * side, "</img>")
        return Layout("image", (1, rows * side, cols * side), parts, batch, batch, rest="\n", order=order)

    def pixels(self, mllm: MLLM, layout: Layout, frames: Sequence[Tensor]) -> dict[str, Tensor]:
        size, (_, rows, cols) = mllm.vision.tile, layout.grid
        # A frame of a video is a single tile; its slots are not stacked.
        height, width = rows * mllm.vision.cell, cols * mllm.vision.cell
        tiles = []
        for frame in frames:
            whole = resize(frame, height, width)
            tiles += [whole.crop((x, y, x + size, y + size)) for y in range(0, height, size) for x in range(0, width, size)]
        return {"pixel_values": normalised(tiles, mllm.mean, mllm.std)}

    def encode(self, mllm: MLLM, layout: Layout, pixels: Mapping[str, Tensor]) -> Encoded:
        tokens, _ = mllm.engine.see(pixels)
        return Encoded(tokens.view(layout.batch, layout.tokens, -1))

    def position_ids(self, shape: VisionShape, visual: Tensor, layout: Layout | None) -> Tensor:
        """(1, L): counted through."""
        return torch.arange(len(visual))[None]


def choose_tiles(height: int, width: int, size: int, most: int = MOST_TILES) -> tuple[int, int]:
    """(rows, cols) of tiles, at most `most` in all: the shape nearest to the picture's; of equal shapes the largest one whose area the picture
    fills at least half."""
    shapes = sorted(
        ((rows, cols) for rows in range(1, most + 1) for cols in range(1, most // rows + 1)), key=lambda shape: shape[0] * shape[1]
    )
    best, nearest = (1, 1), float("inf")
    for rows, cols in shapes:
        off = abs(width / height - cols / rows)
        if off < nearest or (off == nearest and height * width > 0.5 * size * size * rows * cols):
            best, nearest = (rows, cols), off
    return best


FAMILY = InternVL()
