"""Qwen2-VL and Qwen2.5-VL: pictures of any size on a grid of 28 x 28 pixel tokens, two video frames to a slot, three-axis positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import MLLM, Family, Visual, fit_grid, resize

FEWEST_TOKENS = 128
"""Smaller pictures are enlarged to this many tokens a frame: on coarse grids attention cannot tell neighbours apart."""

SECONDS_PER_SLOT = 1.0
"""The clip is always shown as if sampled at two frames per second, two frames to a slot: spread-out key frames have no speed of their own."""


class _WholePatch(nn.Module):
    """A convolution whose kernel covers the whole patch, as the product that it is: PyTorch's 3D convolutions are several times slower."""

    def __init__(self, convolution: nn.Conv3d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, patches: Tensor) -> Tensor:
        """(n, channels, frames, height, width) -> (n, width of the tower)."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class QwenVL(Family):
    name = "Qwen2-VL"
    model_types = ("qwen2_vl", "qwen2_5_vl")

    def prepare(self, model: nn.Module) -> None:
        patches = model.model.visual.patch_embed
        patches.proj = _WholePatch(patches.proj)

    def video(self, mllm: MLLM, frames: Sequence[Tensor], max_tokens: int) -> Visual:
        cell = self._cell(mllm)
        rows, cols = self._grid(frames[0], cell, max_tokens)
        pictures = np.stack([np.asarray(resize(frame, rows * cell, cols * cell)) for frame in frames])
        process = mllm.processor.video_processor
        # Sizes are settled here; newer transformers ask to be told so, older ones do not know the word.
        settled = {"cap_pixels_per_frame": False} if hasattr(process, "cap_pixels_per_frame") else {}
        clip = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        pixels = process(videos=[clip], do_resize=False, do_sample_frames=False, return_tensors="pt", **settled)
        grid = (int(pixels["video_grid_thw"][0, 0]), rows, cols)
        return self._visual("video", pixels, ("pixel_values_videos", "video_grid_thw"), grid, mllm, 1, len(frames))

    def images(self, mllm: MLLM, frames: Sequence[Tensor], max_tokens: int) -> Visual:
        cell = self._cell(mllm)
        # Exactly twice the video's grid, so that a video cell is four image cells.
        rows, cols = (2 * side for side in self._grid(frames[0], cell, max_tokens))
        pictures = [resize(frame, rows * cell, cols * cell) for frame in frames]
        pixels = mllm.processor.image_processor(images=pictures, do_resize=False, return_tensors="pt")
        return self._visual("image", pixels, ("pixel_values", "image_grid_thw"), (1, rows, cols), mllm, len(frames), len(frames))

    def placeholder(self, mllm: MLLM, kind: str) -> str:
        return mllm.processor.tokenizer.convert_ids_to_tokens(self.token_id(mllm, kind))

    def token_id(self, mllm: MLLM, kind: str) -> int:
        config = mllm.model.config
        return config.video_token_id if kind == "video" else config.image_token_id

    def encode(self, mllm: MLLM, visual: Visual) -> Tensor:
        pixels = {name: value.to(mllm.device) for name, value in visual.pixels.items()}
        run = mllm.model.get_video_features if visual.kind == "video" else mllm.model.get_image_features
        out = run(**pixels)
        features = getattr(out, "pooler_output", out)  # transformers 5 wraps what 4 returned bare
        return torch.cat(list(features)).view(visual.prompts, visual.tokens, -1)

    def positions(self, mllm: MLLM, visual_mask: Tensor, visual: Visual | None) -> Tensor:
        """(3, 1, L): time, row and column of visual tokens, counted on from the text before them; text has three equal coordinates.

        Text after the pictures goes on one past the largest position on any axis, time included, as these models were trained.
        transformers 5 starts it after max(rows, cols) instead, which on long videos of few tokens overlaps the video's own positions.
        """
        if visual is None:
            return torch.arange(len(visual_mask)).expand(3, 1, -1)
        before = int(visual_mask.int().argmax())
        after = len(visual_mask) - before - visual.tokens
        slots, rows, cols = visual.grid
        step = self._time_step(mllm) if visual.kind == "video" else 1
        axes = (torch.arange(slots) * step).long(), torch.arange(rows), torch.arange(cols)
        seen = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + before
        rest = torch.arange(after) + int(seen.max()) + 1
        return torch.cat([torch.arange(before).expand(3, -1), seen, rest.expand(3, -1)], 1)[:, None]

    @staticmethod
    def _time_step(mllm: MLLM) -> float:
        vision = mllm.model.config.vision_config  # Qwen2-VL counts slots, Qwen2.5-VL time
        return SECONDS_PER_SLOT * getattr(vision, "tokens_per_second", 1) if mllm.model.config.model_type == "qwen2_5_vl" else 1

    @staticmethod
    def _cell(mllm: MLLM) -> int:
        vision = mllm.model.config.vision_config
        return vision.patch_size * vision.spatial_merge_size

    @staticmethod
    def _grid(frame: Tensor, cell: int, max_tokens: int) -> tuple[int, int]:
        return fit_grid(frame.shape[0], frame.shape[1], cell, min(FEWEST_TOKENS, max_tokens), max_tokens)

    def _visual(self, kind: str, pixels, names: tuple[str, str], grid, mllm: MLLM, prompts: int, frames: int) -> Visual:
        slots, rows, cols = grid
        text = self.placeholder(mllm, kind) * (slots * rows * cols)
        return Visual(kind, {name: pixels[name] for name in names}, grid, text, prompts, frames)


FAMILY = QwenVL()
