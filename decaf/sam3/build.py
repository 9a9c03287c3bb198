"""Building SAM 3's tracker from its weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..devices import memory_for, usable_device
from ..errors import DecafError, reason
from ..report import Progress, Report, silent
from ..sam2.architecture import MAX_BLOCKS, Settings, check_sizes, count, decoder_heads
from ..sam2.build import WithoutMemory, build_tracker, refuse_other_names, sine
from ..sam2.checkpoint import Checkpoint, open_checkpoint
from ..sam2.package import sam2_package
from .encoder import ImageEncoder, Trunk, transformers_classes
from .names import NECK, TRUNK, our_name, our_weights, whose
from .segmenter import SAM3

log = logging.getLogger(__name__)

_HEAD_WIDTH = 64
_LARGEST_SIDE = 128  # tokens; tables of positions grow with its square
_USE = "Use sam3.pt or model.safetensors of facebook/sam3."


def load_sam3(
    path: str | Path | Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | Report = silent,
) -> SAM3:
    """Loads the tracker of a SAM 3 checkpoint, in any float type: Meta's `sam3.pt`, the same as .safetensors, which ComfyUI's own nodes
    load, or transformers' `model.safetensors`. The detector and the text encoder in it are not read into memory for long.

    Shapes tell the architecture, by the proportions of the published model: the position table is a window wide and a third of the picture,
    a head has 64 channels, and the last block of each quarter attends globally. `dtype`: float32, or bfloat16 or float16 to compute under
    autocast (weights stay float32). `progress`: callback or `Report`; may raise to stop.

    Raises DecafError: file missing or damaged, not SAM 3 or without its tracker, SAM 3.1, weights missing, an installed transformers
    without SAM 3, another module shadowing the package `sam2`, or no such device.
    """
    device = usable_device(device)
    file = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    kind = _kind(file)
    classes = transformers_classes()
    sam2_package()  # says what is wrong with the package before anything is said about the file
    names = [name for name in file.names if our_name(name, kind) is not None]
    with memory_for(
        f"to load {file.path}", "Close other programs, free the GPU memory that other models hold, or choose a smaller SAM 2 model."
    ):
        weights = our_weights(file.read(names), kind)
        model = _model(file, weights, classes)
        expected = model.state_dict()
        unknown = [name for name in weights if name not in expected]
        if unknown:
            log.warning("%s: %d weights are not used, which SAM 3's tracker has not, such as %s", file.path, len(unknown), unknown[0])
        refuse_other_names(file.path, {name: value for name, value in weights.items() if name in expected}, expected, "SAM 3", _USE)
        model.load_state_dict(_in_float32({name: weights.pop(name) for name in expected}, progress), assign=True)
        model.to(device).eval().requires_grad_(False)
    config = model.image_encoder.trunk.vit.config
    published = (config.hidden_size, config.num_hidden_layers) == (1024, 32)
    name = "SAM 3" if published else f"SAM 3 reduced, width {config.hidden_size}"
    log.info("%s from %s, %d px", name, file.path, model.image_size)
    return SAM3(model, model.image_size, name, dtype)


def _kind(file: Checkpoint) -> str:
    try:
        kind = whose(file.names)
    except DecafError as error:
        raise DecafError(f"{file.path} {error}.") from error
    if kind is None:
        raise DecafError(f"{file.path} does not hold SAM 3. {_USE}")
    return kind


def _in_float32(weights: dict[str, Tensor], progress: Progress | Report) -> dict[str, Tensor]:
    """Copies, one after the other: those of a safetensors file are read from the disk now."""
    report, total, done, copies = Report.of(progress), sum(value.numel() for value in weights.values()), 0, {}
    for name in list(weights):
        report.progress(done, total, "Loading SAM 3")
        value = weights.pop(name)
        copies[name] = value.to(torch.float32, copy=True).contiguous()
        done += value.numel()
    report.progress(total, total, "Loading SAM 3")
    return copies


def _model(file: Checkpoint, weights: Mapping[str, Tensor], classes) -> nn.Module:
    """A `SAM2Base` of the shapes in `weights`, whose parameters take no memory yet."""
    try:
        with WithoutMemory():
            return build_sam3(weights, classes)
    except KeyError as error:
        raise DecafError(f"{file.path} lacks the weight {error}. Download it again. {_USE}") from error
    except Exception as error:  # the packages' classes assert, divide and look up what they are given
        raise DecafError(f"{file.path}: its weights do not fit together as SAM 3 ({reason(error)}). {_USE}") from error


def build_sam3(weights: Mapping[str, Tensor], classes) -> nn.Module:
    """A `SAM2Base` of the shapes in `weights`, initialised at random, with SAM 3's image encoder. `classes`: transformers'."""
    config = _vit_config(weights, classes)
    vision = classes.Sam3VisionConfig(
        backbone_config=config, fpn_hidden_size=weights[NECK + "0.proj2.weight"].shape[0], scale_factors=[4.0, 2.0, 1.0]
    )
    width = vision.fpn_hidden_size
    encoder = ImageEncoder(Trunk(classes.Sam3ViTModel(config)), classes.Sam3VisionNeck(vision), width, sine(width))
    settings = Settings(
        image_size=config.image_size, num_heads=1, window_spec=(), global_att_blocks=(), decoder_heads=decoder_heads(weights, width)
    )
    check_sizes(weights, settings, config.patch_size)
    return build_tracker(weights, encoder, settings, config.patch_size)


def _vit_config(weights: Mapping[str, Tensor], classes):
    hidden, _, patch, _ = weights[TRUNK + "embeddings.patch_embeddings.projection.weight"].shape
    window = math.isqrt(weights[TRUNK + "embeddings.position_embeddings"].shape[1])
    depth = count(weights, TRUNK + "layers.", MAX_BLOCKS)
    if hidden % _HEAD_WIDTH:
        raise ValueError(f"the image encoder's width {hidden} is no multiple of {_HEAD_WIDTH}")
    if not 0 < 3 * window <= _LARGEST_SIDE or not 0 < patch <= _LARGEST_SIDE:
        raise ValueError(f"a picture of {3 * window} x {3 * window} tokens of {patch} px is larger than any that is read")
    quarter = max(1, depth // 4)
    return classes.Sam3ViTConfig(
        hidden_size=hidden,
        intermediate_size=weights[TRUNK + "layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=depth,
        num_attention_heads=hidden // _HEAD_WIDTH,
        image_size=3 * window * patch,
        patch_size=patch,
        window_size=window,
        global_attn_indexes=list(range(quarter - 1, depth, quarter)),
        pretrain_image_size=window * patch,
    )
