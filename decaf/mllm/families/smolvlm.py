"""SmolVLM2 (model type "smolvlm"): square tiles of a fixed number of tokens. A video frame is one tile with its time; an image is up to 4 x 4.

The whole picture shrunk to one tile, which the published processor puts behind an image's tiles, has no place on a map and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version

import torch
from PIL import Image
from torch import Tensor

from ...errors import DecafError
from ..base import MLLM, Encoded, Family, Layout, VisionShape, whole_number
from ..pictures import normalised

TILES_A_SIDE = 4
"""Tiles along the longer side of an image, as the models were trained."""

MOST_TOKENS_OF_A_TILE = 4096
"""Published models have 64 and 81."""

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


class SmolVLM(Family):
    name = "SmolVLM2"
    title = "SmolVLM2"
    model_types = ("smolvlm",)
    text_types = ("llama",)
    vision_types = ("smolvlm_vision",)
    repositories = (
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    )
    opening = "<|im_start|>User:"
    before_text = " "
    closing = "<end_of_utterance>\nAssistant:"
    visual_tokens = {"video": "<image>", "image": "<image>"}
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def dtype_problem(self, dtype: torch.dtype) -> str | None:
        installed = version("transformers")
        if dtype == torch.bfloat16 and int(installed.split(".")[0]) < 5:
            return (
                f"transformers {installed} reckons the places of its patches in that format, too coarsely. Update it (pip install --upgrade "
                "transformers), or choose float32 as its dtype."
            )
        return super().dtype_problem(dtype)

    def vision_shape(self, config: object) -> VisionShape:
        tile = whole_number(config.vision_config, "image_size", 2, 4096)
        patch = whole_number(config.vision_config, "patch_size", 1, min(tile, 128))
        merge, side = whole_number(config, "scale_factor", 1, 16), tile // patch
        if tile % 2 or side % merge or (side // merge) ** 2 > MOST_TOKENS_OF_A_TILE:
            raise DecafError(
                f"The model's config.json gives tiles of {tile} pixels, patches of {patch} and a scale_factor of {merge}, which do not fit together. "
                "Download the model again."
            )
        return VisionShape(patch, merge, tile=tile)

    def video_layout(self, shape: VisionShape, frame_size: tuple[int, int], seconds: Sequence[float], max_tokens: int) -> Layout:
        side, length = _side(shape), str(timedelta(seconds=int(seconds[-1])))
        text = f" You are provided the following series of {in_words(len(seconds))} frames from a {length} [H:MM:SS] video.\n"
        parts = []
        for second in seconds:
            text += f"\nFrame from {int(second // 60):02d}:{int(second % 60):02d}:<fake_token_around_image><global-img>"
            parts += [text, side * side]
            text = "<fake_token_around_image>"
        return Layout("video", (len(seconds), side, side), (*parts, text), 1, len(seconds), rest="\n\n")

    def image_layout(self, shape: VisionShape, frame_size: tuple[int, int], batch: int, max_tokens: int) -> Layout:
        side, (rows, cols) = _side(shape), choose_tiles(*frame_size, shape.tile)
        # In the prompt all tokens of a tile come before those of the next; on the map they lie side by side.
        order = torch.arange(rows * cols * side * side).view(rows, cols, side, side).permute(0, 2, 1, 3).flatten()
        parts, text = [], ""
        for row in range(1, rows + 1):
            for col in range(1, cols + 1):
                parts += [f"{text}<fake_token_around_image><row_{row}_col_{col}>", side * side]
                text = ""
            text = "\n"
        parts.append("\n\n<fake_token_around_image>")
        return Layout("image", (1, rows * side, cols * side), tuple(parts), batch, batch, order=order)

    def pixels(self, mllm: MLLM, layout: Layout, frames: Sequence[Tensor]) -> dict[str, Tensor]:
        size, tiles = mllm.vision.tile, []
        for frame in frames:
            height, width = frame.shape[:2]
            whole, (rows, cols) = Image.fromarray(frame.numpy()), (1, 1)
            steps = [(size, size)]
            if layout.kind == "image":  # in two steps, as the published processor does it: in its own proportions, then to whole tiles
                rows, cols = choose_tiles(height, width, size)
                steps = [_proportional(height, width, TILES_A_SIDE * size), (rows * size, cols * size)]
            for high, wide in steps:
                whole = whole.resize((wide, high), Image.Resampling.LANCZOS)
            tiles += [whole.crop((x, y, x + size, y + size)) for y in range(0, rows * size, size) for x in range(0, cols * size, size)]
        values = normalised(tiles, mllm.mean, mllm.std)
        return {"pixel_values": values.view(layout.batch, -1, *values.shape[1:])}

    def encode(self, mllm: MLLM, layout: Layout, pixels: Mapping[str, Tensor]) -> Encoded:
        tokens, _ = mllm.engine.see(pixels)
        return Encoded(tokens.view(layout.batch, layout.tokens, -1))

    def position_ids(self, shape: VisionShape, visual: Tensor, layout: Layout | None) -> Tensor:
        """(1, L): counted through."""
        return torch.arange(len(visual))[None]


def _side(shape: VisionShape) -> int:
    """Tokens a side of a tile. Pixels beyond the last whole patch are not seen."""
    return shape.tile // shape.patch // shape.merge


def _proportional(height: int, width: int, longer: int) -> tuple[int, int]:
    """(height, width) with the given longer side, the shorter one rounded down and then up to an even number."""
    if width >= height:
        short = int(longer / (width / height))
        return max(1, short + short % 2), longer
    short = int(longer * (width / height))
    return longer, max(1, short + short % 2)


def choose_tiles(height: int, width: int, size: int) -> tuple[int, int]:
    """(rows, cols) of tiles of `size` pixels a side: four along the longer side of a picture, and what it then needs along the other."""
    return tuple(math.ceil(side / size) for side in _proportional(height, width, TILES_A_SIDE * size))


def in_words(number: int) -> str:
    """A number of frames in words, as the models were trained; in digits from a thousand on."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_SMALL[ones]}" if ones else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{_SMALL[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")
    return str(number)


FAMILY = SmolVLM()
