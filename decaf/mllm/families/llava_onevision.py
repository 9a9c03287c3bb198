"""LLaVA-OneVision (hub format): square tiles of a fixed size, laid side by side so that their tokens run row by row of the whole picture.

A video frame is one tile, squeezed to a square, with half the tokens a side. An image is as many tiles as keep its own pixels. The whole picture
shrunk to one tile, which the published processor puts before the tiles, and the tokens that it puts behind each row, have no place on a map and
are left out (as the paper's reference does), so the library's own function for pictures is of no use here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...errors import DecafError
from ..base import MLLM, Encoded, Family, Layout, VisionShape, whole_number
from ..pictures import normalised, resize

MOST_TOKENS_OF_A_TILE = 4096
"""Published models have 729."""

MOST_TILES = 64
"""Tiles of one image; published models have up to 36."""

MOST_SHAPES = 256
"""Shapes of tiles to choose from; published models have 36."""

PATCHES_AT_ONCE = 8192
"""Patches that the vision tower sees in one go. An image has up to 36 tiles of 729; more at once take memory and gain no speed."""

SPARE = 1.1
"""An image may be this much finer, each way, than the model's most tiles, before it is shrunk to them."""


@dataclass(frozen=True)
class TileShape(VisionShape):
    """`shapes`: (rows, cols) of tiles that an image may have. `most_tiles`: an image of more tiles' tokens is shrunk to that many."""

    shapes: tuple[tuple[int, int], ...] = ((1, 1),)
    most_tiles: int = 9

    @property
    def side(self) -> int:
        """Tokens a side of a tile. Pixels beyond the last whole patch are not seen."""
        return self.tile // self.patch


@dataclass(frozen=True)
class Tiling:
    """How one image is cut. `tiles`: (rows, cols). `margin`: (rows, cols) of tokens that are padding, at each end. `grid`: (rows, cols) of its
    tokens, after all."""

    tiles: tuple[int, int]
    margin: tuple[int, int]
    grid: tuple[int, int]


class LlavaOneVision(Family):
    name = "LLaVA-OneVision"
    title = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    text_types = ("qwen2",)
    vision_types = ("siglip_vision_model",)
    repositories = ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf")
    opening = "<|im_start|>user\n"
    closing = "<|im_end|>\n<|im_start|>assistant\n"
    visual_tokens = {"video": "<video>", "image": "<image>"}
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def vision_shape(self, config: object) -> TileShape:
        vision = config.vision_config
        tile = whole_number(vision, "image_size", 1, 4096)
        patch = whole_number(vision, "patch_size", 1, min(tile, 128))
        if (tile // patch) ** 2 > MOST_TOKENS_OF_A_TILE:
            raise DecafError(
                f"The model's config.json gives tiles of {tile} pixels and patches of {patch}, which are {(tile // patch) ** 2:,} tokens; a tile has "
                f"at most {MOST_TOKENS_OF_A_TILE:,}. Download the model again."
            )
        layer, kept = getattr(config, "vision_feature_layer", None), getattr(config, "vision_feature_select_strategy", None)
        if layer != -1 or kept != "full":
            raise DecafError(
                f"The model's config.json takes {kept!r:.60} features of the vision tower's layer {layer!r:.60}; supported are 'full' ones of layer "
                "-1, as in the published models. Choose another model."
            )
        return TileShape(patch, 1, tile=tile, shapes=_shapes(config, tile), most_tiles=_most_tiles(config))

    def video_layout(self, shape: TileShape, frame_size: tuple[int, int], seconds: Sequence[float], max_tokens: int) -> Layout:
        side = -(-shape.side // 2)
        tokens = len(seconds) * side * side
        return Layout("video", (len(seconds), side, side), (tokens,), 1, len(seconds), rest="\n")

    def image_layout(self, shape: TileShape, frame_size: tuple[int, int], batch: int, max_tokens: int) -> Layout:
        rows, cols = choose_tiling(shape, *frame_size).grid
        return Layout("image", (1, rows, cols), (rows * cols,), batch, batch, rest="\n")

    def pixels(self, mllm: MLLM, layout: Layout, frames: Sequence[Tensor]) -> dict[str, Tensor]:
        size = mllm.vision.tile
        if layout.kind == "video":
            return {"pixel_values_videos": normalised([resize(frame, size, size) for frame in frames], mllm.mean, mllm.std)[None]}
        tiles = [tile for frame in frames for tile in _cut(mllm.vision, frame)]
        values = normalised(tiles, mllm.mean, mllm.std)
        return {
            "pixel_values": values.view(len(frames), -1, *values.shape[1:]),
            "image_sizes": torch.tensor([frame.shape[:2] for frame in frames]),
        }

    def encode(self, mllm: MLLM, layout: Layout, pixels: Mapping[str, Tensor]) -> Encoded:
        shape, (_, *grid) = mllm.vision, layout.grid
        tiles = _features(mllm, pixels["pixel_values_videos" if layout.kind == "video" else "pixel_values"].flatten(0, 1))
        if layout.kind == "video":
            pictures = tiles.movedim(-1, 1)
        else:
            height, width = pixels["image_sizes"][0].tolist()
            tiling = choose_tiling(shape, height, width)
            (down, across), (rows, cols) = tiling.margin, tiling.tiles
            whole = tiles.view(-1, rows, cols, shape.side, shape.side, tiles.shape[-1]).permute(0, 5, 1, 3, 2, 4)
            whole = whole.flatten(4, 5).flatten(2, 3)
            pictures = whole[:, :, down : whole.shape[2] - down, across : whole.shape[3] - across]
        if list(pictures.shape[2:]) != grid:  # without antialiasing, as the models were trained
            pictures = F.interpolate(pictures, size=grid, mode="bilinear", align_corners=False)
        return Encoded(pictures.movedim(1, -1).reshape(layout.batch, layout.tokens, -1))

    def position_ids(self, shape: VisionShape, visual: Tensor, layout: Layout | None) -> Tensor:
        """(1, L): counted through."""
        return torch.arange(len(visual))[None]


def choose_tiling(shape: TileShape, height: int, width: int) -> Tiling:
    """How a picture of height x width pixels is cut: in the shape that keeps most of its own pixels; of equal ones the smallest."""

    def value(tiles: tuple[int, int]) -> tuple[int, int]:
        rows, cols = (count * shape.tile for count in tiles)
        scale = min(rows / height, cols / width)
        kept = min(int(height * scale) * int(width * scale), height * width)
        return kept, kept - rows * cols

    tiles = max(shape.shapes, key=value)
    rows, cols = (count * shape.side for count in tiles)
    # Padding fills the tiles' longer side. A row of tokens is padding where all of it is; one stays even of the thinnest picture.
    if width / height > cols / rows:
        margin = (min((rows - _whole(height * (cols / width))) // 2, (rows - 1) // 2), 0)
    else:
        margin = (0, min((cols - _whole(width * (rows / height))) // 2, (cols - 1) // 2))
    rows, cols = rows - 2 * margin[0], cols - 2 * margin[1]
    ratio = math.sqrt(rows * cols / (shape.most_tiles * shape.side**2))
    if ratio > SPARE:
        rows, cols = max(1, int(rows // ratio)), max(1, int(cols // ratio))
    return Tiling(tiles, margin, (rows, cols))


def _whole(number: float) -> int:
    """Rounded down, except where only the division's error keeps it below a whole number."""
    return int(round(number, 7))


def _cut(shape: TileShape, frame: Tensor) -> list[Image.Image]:
    """The tiles of a picture, row by row: as large as they hold it in its own proportions, in the middle, on black."""
    height, width = frame.shape[:2]
    rows, cols = (count * shape.tile for count in choose_tiling(shape, height, width).tiles)
    across, down = cols / width, rows / height
    inner = (min(math.ceil(height * across), rows), cols) if across < down else (rows, min(math.ceil(width * down), cols))
    whole = Image.new("RGB", (cols, rows))
    whole.paste(resize(frame, *inner), ((cols - inner[1]) // 2, (rows - inner[0]) // 2))
    size = shape.tile
    return [whole.crop((x, y, x + size, y + size)) for y in range(0, rows, size) for x in range(0, cols, size)]


def _features(mllm: MLLM, tiles: Tensor) -> Tensor:
    """(n, 3, tile, tile) -> (n, side, side, width): what the tower's last layer gives, without its closing norm, brought to the decoder's width.

    Not by the engine's `see`: transformers would pool the tokens of videos and lay out those of tiles with their padding, by rules of its own."""
    model, side = mllm.model.model, mllm.vision.side
    tower = getattr(model.vision_tower, "vision_model", model.vision_tower)  # transformers 4 wraps it once more
    found = []
    for some in tiles.split(max(1, PATCHES_AT_ONCE // side**2)):
        patches = tower.embeddings(some.to(mllm.device, mllm.engine.dtype))
        found.append(model.multi_modal_projector(tower.encoder(inputs_embeds=patches).last_hidden_state))
    return torch.cat(found).unflatten(1, (side, side))


def _shapes(config: object, tile: int) -> tuple[tuple[int, int], ...]:
    """(rows, cols) of tiles from the pixel sizes that config.json lists."""
    sizes = getattr(config, "image_grid_pinpoints", None)
    fine = isinstance(sizes, list | tuple) and 0 < len(sizes) <= MOST_SHAPES
    if not fine or not all(_fits(size, tile) for size in sizes):
        raise DecafError(
            f"The model's config.json gives {sizes!r:.60} for image_grid_pinpoints; these must be sizes (height, width) in whole tiles of {tile} "
            f"pixels, at most {MOST_TILES} tiles each. Download the model again."
        )
    return tuple((height // tile, width // tile) for height, width in sizes)


def _fits(size: object, tile: int) -> bool:
    whole = isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int and side > 0 and side % tile == 0 for side in size)
    return whole and (size[0] // tile) * (size[1] // tile) <= MOST_TILES


def _most_tiles(config: object) -> int:
    given = getattr(config, "vision_aspect_ratio", None)
    number = given.removeprefix("anyres_max_") if isinstance(given, str) and given.startswith("anyres_max_") else ""
    if not (number.isascii() and number.isdigit() and len(number) < 4 and 1 <= int(number) <= MOST_TILES):
        raise DecafError(
            f"The model's config.json gives {given!r:.60} for vision_aspect_ratio; it must be anyres_max_1 to anyres_max_{MOST_TILES}. "
            "Choose another model, or download it again."
        )
    return int(number)


FAMILY = LlavaOneVision()
