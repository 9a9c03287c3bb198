"""InternVL3 (hub format, model type "internvl"): square tiles of a fixed number of tokens. A video frame is one tile; an image is several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..base import MLLM, Family, Visual, resize

MOST_TILES = 12
"""Tiles per image, as the models were trained."""


class InternVL(Family):
    name = "InternVL3"
    model_types = ("internvl",)

    def video(self, mllm: MLLM, frames: Sequence[Tensor], max_tokens: int) -> Visual:
        size, side = self._tile(mllm)
        shown = "\n".join(f"Frame{number}: {self._tile_text(mllm, 1)}" for number in range(1, len(frames) + 1))
        tiles = [resize(frame, size, size) for frame in frames]
        return Visual("video", self._pixels(mllm, tiles), (len(frames), side, side), shown, 1, len(frames))

    def images(self, mllm: MLLM, frames: Sequence[Tensor], max_tokens: int) -> Visual:
        size, side = self._tile(mllm)
        rows, cols = choose_tiles(*frames[0].shape[:2], size)
        tiles: list[Image.Image] = []
        for frame in frames:
            whole = resize(frame, rows * size, cols * size)
            corners = [(x * size, y * size) for y in range(rows) for x in range(cols)]
            tiles += [whole.crop((x, y, x + size, y + size)) for x, y in corners]
        # In the prompt all tokens of a tile come before those of the next; on the map they lie side by side.
        places = torch.arange(rows * cols * side * side).view(rows, cols, side, side)
        order = places.permute(0, 2, 1, 3).flatten()
        grid = (1, rows * side, cols * side)
        return Visual("image", self._pixels(mllm, tiles), grid, self._tile_text(mllm, rows * cols), len(frames), len(frames), order)

    def placeholder(self, mllm: MLLM, kind: str) -> str:
        return mllm.processor.video_token if kind == "video" else mllm.processor.image_token

    def token_id(self, mllm: MLLM, kind: str) -> int:
        return mllm.model.config.image_token_id

    def encode(self, mllm: MLLM, visual: Visual) -> Tensor:
        out = mllm.model.get_image_features(pixel_values=visual.pixels["pixel_values"].to(mllm.device))
        features = getattr(out, "pooler_output", out)  # transformers 5 wraps what 4 returned bare
        return features.reshape(visual.prompts, visual.tokens, -1)

    def positions(self, mllm: MLLM, visual_mask: Tensor, visual: Visual | None) -> Tensor:
        """(1, L): counted through."""
        return torch.arange(len(visual_mask))[None]

    @staticmethod
    def _tile(mllm: MLLM) -> tuple[int, int]:
        """Side of a tile in pixels and in tokens."""
        config = mllm.model.config
        size, patch = (
            value if isinstance(value, int) else value[0] for value in (config.vision_config.image_size, config.vision_config.patch_size)
        )
        return size, int(size // patch * config.downsample_ratio)

    def _tile_text(self, mllm: MLLM, tiles: int) -> str:
        processor, (_, side) = mllm.processor, self._tile(mllm)
        return f"{processor.start_image_token}{processor.image_token * (side * side * tiles)}{processor.end_image_token}"

    @staticmethod
    def _pixels(mllm: MLLM, tiles: list[Image.Image]) -> dict[str, Tensor]:
        pixels = mllm.processor.image_processor(images=tiles, do_resize=False, crop_to_patches=False, return_tensors="pt")
        return {"pixel_values": pixels["pixel_values"]}


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
