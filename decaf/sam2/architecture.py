"""What a SAM 2 checkpoint's tensors say about the model, and a few rules for what they cannot say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from torch import Tensor

from ..errors import DecafError, shown


@dataclass(frozen=True)
class Settings:
    """What tensor shapes cannot tell.

    `image_size`: side in pixels of the square that every frame is resized to. `num_heads`: attention heads in the first stage of the image
    encoder (they double with each stage). `window_spec`: attention window per stage, in tokens. `global_att_blocks`: blocks of the image
    encoder whose attention is not windowed. `memory_heads`: heads of the memory attention. `decoder_heads`: heads of the mask decoder.
    """

    image_size: int
    num_heads: int
    window_spec: tuple[int, ...]
    global_att_blocks: tuple[int, ...]
    memory_heads: int = 1
    decoder_heads: int = 8


@dataclass(frozen=True)
class Architecture:
    """Everything that the builder needs to know. `name` is for people."""

    name: str
    stages: tuple[int, ...]
    settings: Settings


# Meta's four sizes, by (width of the first stage, blocks per stage).
_OFFICIAL = {
    (96, (1, 2, 7, 2)): ("tiny", Settings(1024, 1, (8, 4, 14, 7), (5, 7, 9))),
    (96, (1, 2, 11, 2)): ("small", Settings(1024, 1, (8, 4, 14, 7), (7, 10, 13))),
    (112, (2, 3, 16, 3)): ("base+", Settings(1024, 2, (8, 4, 14, 7), (12, 16, 20))),
    (144, (2, 6, 36, 4)): ("large", Settings(1024, 2, (8, 4, 16, 8), (23, 33, 43))),
}
_REDUCED_IMAGE_SIZE = 256
_LARGEST_IMAGE_SIZE = 4096  # its position tables grow with the square

# What a checkpoint may ask for, beside what the largest published model has: each of them is built, or used, once per object and frame.
MAX_BLOCKS = 256  # 48 in the image encoder
MAX_LAYERS = 32  # 4 in the memory attention, 2 or 3 elsewhere
MAX_MEMORIES = 64  # 7
MAX_MASKS = 16  # 4 mask tokens
_MAX_TABLE_BYTES = 1 << 30  # 32 MB for the positions of the memory attention
_HEAD_WIDTH = 32  # of the official mask decoder


def read_architecture(weights: Mapping[str, Tensor], given: Mapping[str, object]) -> Architecture:
    """`given`: fields of `Settings` that are known from elsewhere; they win over the rules.

    Rules for a model that is none of Meta's four sizes: 256 px; one head in the first stage; windows w, w/2, w, w/2 with w from the window
    position embedding; in the third stage the last block and up to two more at equal steps before it attend globally, but never the stage's
    first block; the decoder has eight heads if its hidden layers have the stock sizes, otherwise one per 32 channels.
    """
    stages = _stages(weights)
    width = weights["image_encoder.trunk.patch_embed.proj.weight"].shape[0]
    size, settings = _OFFICIAL.get((width, stages), (f"reduced, width {width}", None))
    settings = settings or _reduced(weights, stages)
    version = "2.1" if "no_obj_embed_spatial" in weights else "2"
    settings = _override(settings, given)
    _check_settings(settings, sum(stages))
    check_sizes(weights, settings)
    if width % settings.num_heads:
        raise DecafError(f"SAM 2 setting 'num_heads' is {settings.num_heads}, which does not divide the first stage's width {width}.")
    return Architecture(f"SAM {version} {size}", stages, settings)


def _stages(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks per stage: a stage begins where the width changes."""
    depth = count(weights, "image_encoder.trunk.blocks.", MAX_BLOCKS)
    starts = [0] + [i for i in range(depth) if f"image_encoder.trunk.blocks.{i}.proj.weight" in weights] + [depth]
    return tuple(b - a for a, b in zip(starts[:-1], starts[1:], strict=True))


def _reduced(weights: Mapping[str, Tensor], stages: tuple[int, ...]) -> Settings:
    window = weights["image_encoder.trunk.pos_embed_window"].shape[-1]
    third = stages[2] if len(stages) > 2 else 0
    first, last, step = sum(stages[:2]), sum(stages[:3]) - 1, max(1, 2 * third // 7)
    d_model = weights["image_encoder.neck.convs.0.conv.weight"].shape[0]
    return Settings(
        image_size=_REDUCED_IMAGE_SIZE,
        num_heads=1,
        window_spec=tuple(window if i % 2 == 0 else max(1, window // 2) for i in range(len(stages))),
        global_att_blocks=tuple(b for b in (last - 2 * step, last - step, last) if b > first),
        decoder_heads=decoder_heads(weights, d_model),
    )


def decoder_heads(weights: Mapping[str, Tensor], d_model: int) -> int:
    """Of the mask decoder: eight if its hidden layers have the stock sizes, else one per 32 channels."""
    stock = (
        weights["sam_mask_decoder.transformer.layers.0.mlp.layers.0.weight"].shape[0] == 2048
        and weights["sam_mask_decoder.iou_prediction_head.layers.0.weight"].shape[0] == 256
    )
    return 8 if stock else max(1, d_model // _HEAD_WIDTH)


def _override(settings: Settings, given: Mapping[str, object]) -> Settings:
    known = {field.name for field in fields(Settings)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise DecafError(f"Unknown SAM 2 setting '{shown(unknown[0])}'. The settings are: {', '.join(sorted(known))}.")
    values = {}
    for name, value in given.items():
        several = name in ("window_spec", "global_att_blocks")
        numbers = value if several and isinstance(value, list | tuple) else [value]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise DecafError(
                f"SAM 2 setting {name!r} is {shown(repr(value))}; it must be {'whole numbers' if several else 'a whole number'}."
            )
        if name.endswith("heads") and value == 0:
            raise DecafError(f"SAM 2 setting {name!r} is 0; there must be at least one head.")
        values[name] = tuple(numbers) if several else value
    size = values.get("image_size", 32)
    if size % 32 or not 0 < size <= _LARGEST_IMAGE_SIZE:
        raise DecafError(f"SAM 2 setting 'image_size' is {shown(size)}; it must be a multiple of 32 pixels, at most {_LARGEST_IMAGE_SIZE}.")
    return replace(settings, **values)


def _check_settings(settings: Settings, depth: int) -> None:
    """A window that is larger than the picture would be filled up with padding, whatever that takes."""
    side = settings.image_size // 4
    if any(window > side for window in settings.window_spec):
        raise DecafError(
            f"SAM 2 setting 'window_spec' is {shown(settings.window_spec)}; at {settings.image_size} px the image encoder has {side} tokens a side."
        )
    if any(block >= depth for block in settings.global_att_blocks):
        raise DecafError(
            f"SAM 2 setting 'global_att_blocks' is {shown(settings.global_att_blocks)}; the image encoder has blocks 0 to {depth - 1}."
        )


def check_sizes(weights: Mapping[str, Tensor], settings: Settings, stride: int = 16) -> None:
    """What is built, or used, as often as a weight is long. ValueError says what there is too much of."""
    for name, most in (("maskmem_tpos_enc", MAX_MEMORIES), ("sam_mask_decoder.mask_tokens.weight", MAX_MASKS)):
        if weights[name].shape[0] > most:
            raise ValueError(f"'{name}' is {weights[name].shape[0]} long, and at most {most} are read")
    layers = count(weights, "memory_attention.layers.")
    tokens = (settings.image_size // stride) ** 2
    parts = ("self_attn", "cross_attn_image")
    channels = sum(weights[f"memory_attention.layers.0.{part}.q_proj.weight"].shape[0] for part in parts)
    tables = layers * tokens * channels // 2 * 8  # a complex number for two channels
    if tables > _MAX_TABLE_BYTES:
        raise ValueError(f"the positions of {layers} layers of {channels} channels at {settings.image_size} px take {tables / 1e9:.1f} GB")


def count(weights: Mapping[str, Tensor], prefix: str, most: int = MAX_LAYERS) -> int:
    """How many parts, for example layers, follow `prefix`. ValueError if they are not numbered from 0 on, or more than `most`."""
    numbers = {name[len(prefix) :].split(".", 1)[0] for name in weights if name.startswith(prefix)}
    if len(numbers) > most:
        raise ValueError(f"it has {len(numbers)} parts '{prefix}', and at most {most} are read")
    odd = numbers - {str(number) for number in range(len(numbers))}
    if odd:
        raise ValueError(f"its {len(numbers)} parts '{prefix}' are not numbered from 0 on: one is '{shown(min(odd))}'")
    return len(numbers)
