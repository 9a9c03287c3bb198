"""What the weights of SAM 3's tracker are called: by Meta, by transformers, and here.

Meta's names are those of `sam3.pt`, and of the files that ComfyUI's own nodes load. transformers' are those of `model.safetensors` of
facebook/sam3, or of a tracker that was saved alone. Here the tracker's are SAM 2's, and those of the image encoder are transformers'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from ..errors import DecafError

TRUNK, NECK = "image_encoder.trunk.vit.", "image_encoder.neck.fpn_layers."
META, TRANSFORMERS = "Meta", "transformers"

_META_TRUNK = "detector.backbone.vision_backbone.trunk."
_LEVELS = "[0-2]"  # the neck makes a fourth, which tracking does not use

_RULES = {
    META: (
        (re.escape(_META_TRUNK) + r"pos_embed$", TRUNK + "embeddings.position_embeddings"),
        (re.escape(_META_TRUNK) + r"patch_embed\.proj\.", TRUNK + "embeddings.patch_embeddings.projection."),
        (re.escape(_META_TRUNK) + r"ln_pre\.", TRUNK + "layer_norm."),
        (re.escape(_META_TRUNK) + r"blocks\.(\d+)\.norm([12])\.", TRUNK + r"layers.\1.layer_norm\2."),
        (re.escape(_META_TRUNK) + r"blocks\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)$", TRUNK + r"layers.\1.attention.\2.\3"),
        (re.escape(_META_TRUNK) + r"blocks\.(\d+)\.mlp\.", TRUNK + r"layers.\1.mlp."),
        (rf"detector\.backbone\.vision_backbone\.sam2_convs\.({_LEVELS})\.", NECK + r"\1."),
        (r"tracker\.transformer\.encoder\.", "memory_attention."),
        (r"tracker\.maskmem_backbone\.", "memory_encoder."),
        (r"tracker\.", ""),
    ),
    TRANSFORMERS: (
        (r"(detector_model\.)?vision_encoder\.backbone\.", TRUNK),
        (rf"(tracker_neck|vision_encoder\.neck)\.fpn_layers\.({_LEVELS})\.", NECK + r"\2."),
        (r"(detector_model|tracker_neck|vision_encoder)\.", None),
        (r"(tracker_model\.)?", ""),
    ),
}
"""By whose names: how a name begins, and what stands there instead; None for what is not used."""

_PARTS = {
    META: (
        (r"\.attention\.proj\.", ".attention.o_proj."),
        (r"\.dconv_2x2(_0)?\.", ".scale_layers.0."),
        (r"\.dconv_2x2_1\.", ".scale_layers.2."),
        (r"\.conv_1x1\.", ".proj1."),
        (r"\.conv_3x3\.", ".proj2."),
        (r"\.mlp\.lin1\.", ".mlp.layers.0."),
        (r"\.mlp\.lin2\.", ".mlp.layers.1."),
    ),
    TRANSFORMERS: (
        (r"^prompt_encoder\.shared_embedding\..*", ""),  # the same as the next
        (r"^shared_image_embedding\.positional_embedding", "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
        (r"^prompt_encoder\.", "sam_prompt_encoder."),
        (r"^mask_decoder\.", "sam_mask_decoder."),
        (r"mask_embed\.conv([123])\.", lambda found: f"mask_downscaling.{3 * (int(found[1]) - 1)}."),
        (r"mask_embed\.layer_norm([12])\.", lambda found: f"mask_downscaling.{3 * int(found[1]) - 2}."),
        (r"\.point_embed\.", ".point_embeddings."),
        (r"\.upscale_conv1\.", ".output_upscaling.0."),
        (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
        (r"\.upscale_conv2\.", ".output_upscaling.3."),
        (r"(transformer\.layers\.\d+\.mlp)\.proj_in\.", r"\1.layers.0."),
        (r"(transformer\.layers\.\d+\.mlp)\.proj_out\.", r"\1.layers.1."),
        (r"(mlps\.\d+|_head|object_pointer_proj)\.layers\.0\.", r"\1.layers.1."),
        (r"(mlps\.\d+|_head|object_pointer_proj)\.proj_in\.", r"\1.layers.0."),
        (r"(mlps\.\d+|_head|object_pointer_proj)\.proj_out\.", r"\1.layers.2."),
        (r"mask_downsampler\.layers\.(\d+)\.conv\.", lambda found: f"mask_downsampler.encoder.{3 * int(found[1])}."),
        (r"mask_downsampler\.layers\.(\d+)\.layer_norm\.", lambda found: f"mask_downsampler.encoder.{3 * int(found[1]) + 1}."),
        (r"mask_downsampler\.final_conv\.", "mask_downsampler.encoder.12."),
        (r"memory_encoder\.feature_projection\.", "memory_encoder.pix_feat_proj."),
        (r"memory_encoder\.projection\.", "memory_encoder.out_proj."),
        (r"memory_encoder\.memory_fuser\.", "memory_encoder.fuser."),
        (r"(fuser\.layers\.\d+)\.depthwise_conv\.", r"\1.dwconv."),
        (r"(fuser\.layers\.\d+)\.pointwise_conv", r"\1.pwconv"),
        (r"(fuser\.layers\.\d+)\.scale$", r"\1.gamma"),
        (r"\.o_proj\.", ".out_proj."),
        (r"\.layer_norm", ".norm"),
        (r"^no_memory_embedding$", "no_mem_embed"),
        (r"^no_memory_positional_encoding$", "no_mem_pos_enc"),
        (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
        (r"^no_object_pointer$", "no_obj_ptr"),
        (r"^object_pointer_proj\.", "obj_ptr_proj."),
        (r"^temporal_positional_encoding_projection_layer\.", "obj_ptr_tpos_proj."),
        (r"^occlusion_spatial_embedding_parameter$", "no_obj_embed_spatial"),
    ),
}
"""What is replaced within a name afterwards, in this order; transformers' in the tracker alone."""


def whose(names: Iterable[str]) -> str | None:
    """Whose names these are of a file with SAM 3's tracker; None if it is no such file. DecafError: SAM 3 without the tracker, or a tracker that
    is another one. The error says what the file is, as the rest of a sentence."""
    names = set(names)
    vision = "detector.backbone.vision_backbone."
    if any(name.startswith((vision + "propagation_convs.", vision + "interactive_convs.")) for name in names):
        raise DecafError(
            "is SAM 3.1, whose tracker follows 16 objects at a time in a way of its own. Take SAM 3's file (sam3.pt or model.safetensors of "
            "facebook/sam3) or one of SAM 2.1; or track with ComfyUI's own SAM 3 nodes, and choose among their objects with Pick Tracks by Attention"
        )
    if any(name.startswith(_META_TRUNK) for name in names):
        found = META, any(name.startswith("tracker.transformer.") for name in names)
    elif any(re.match(r"(detector_model\.)?vision_encoder\.backbone\.layers\.0\.attention\.q_proj\.", name) for name in names):
        found = TRANSFORMERS, any(re.match(r"(tracker_model\.)?memory_attention\.", name) for name in names)
    else:
        return None
    if not found[1]:
        raise DecafError("holds SAM 3 without its tracker. Take the whole file, sam3.pt or model.safetensors of facebook/sam3")
    return found[0]


def our_name(name: str, kind: str) -> str | None:
    """`kind`: META or TRANSFORMERS. None for a weight that tracking does not use, such as the detector's."""
    found = ((re.match(pattern, name), replacement) for pattern, replacement in _RULES[kind])
    begin, replacement = next((one for one in found if one[0]), (None, None))
    if replacement is None:
        return None
    ours = begin.expand(replacement) + name[begin.end() :]
    if kind == META or not ours.startswith("image_encoder."):
        for pattern, other in _PARTS[kind]:
            ours = re.sub(pattern, other, ours)
    return ours or None


def our_weights(weights: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The weights under our names, as views of what is given."""
    ours: dict[str, Tensor] = {}
    for name, value in weights.items():
        name = our_name(name, kind)
        if name is None:
            continue
        split = next((rule for part, rule in _SPLIT.items() if part in name), None)
        ours.update(split(name, value) if split else {name: value})
    return ours


def _three(name: str, value: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values in one."""
    return {name.replace(".qkv.", f".{letter}_proj."): part for letter, part in zip("qkv", value.chunk(3), strict=True)}


def _four(name: str, value: Tensor) -> dict[str, Tensor]:
    """Embeddings of the kinds of points in one table."""
    if not name.endswith("point_embeddings.weight"):
        return {name: value}
    return {name.replace(".weight", f".{i}.weight"): row for i, row in enumerate(value.split(1))}


def _without_class_token(name: str, value: Tensor) -> dict[str, Tensor]:
    """Meta's table begins with a token that the image encoder has not."""
    places = value.shape[1] if value.ndim == 3 else 0
    return {name: value if math.isqrt(places) ** 2 == places else value[:, 1:]}


_SPLIT: dict[str, Callable[[str, Tensor], dict[str, Tensor]]] = {
    ".attention.qkv.": _three,
    ".point_embeddings.": _four,
    "embeddings.position_embeddings": _without_class_token,
}
