"""Building a SAM 2 model from its weights, without Hydra and without a configuration file."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..devices import memory_for, usable_device
from ..errors import DecafError, reason, shown
from .architecture import Architecture, Settings, count, read_architecture
from .checkpoint import Checkpoint, open_checkpoint, read_checkpoint
from .package import sam2_package
from .segmenter import SAM2

log = logging.getLogger(__name__)

# When a single mask token's mask is unstable the best of the three takes its place (build_sam2_video_predictor's post-processing).
_DYNAMIC_MULTIMASK = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}


HOW_IT_RUNS = {
    "sigmoid_scale_for_mem_enc": 20.0,
    "sigmoid_bias_for_mem_enc": -10.0,
    "use_mask_input_as_output_without_sam": True,
    "directly_add_no_mem_embed": True,
    "multimask_output_in_sam": True,
    "multimask_min_pt_num": 0,
    "multimask_max_pt_num": 1,
    "multimask_output_for_tracking": True,
    "use_multimask_token_for_obj_ptr": True,
    "iou_prediction_use_sigmoid": True,
    "use_obj_ptrs_in_encoder": True,
    "only_obj_ptrs_in_the_past_for_eval": True,
}
"""Arguments of `SAM2Base` that no weight tells, the same in all released models: those of Meta's configurations."""


def load_sam2(
    path: str | Path | Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    settings: Mapping[str, object] | None = None,
) -> SAM2:
    """Loads a SAM 2 or SAM 2.1 checkpoint of any size (.pt, or .safetensors with the same names, in any float type).

    Shapes tell most of the architecture. The rest comes from, in this order: `settings`; the file's own metadata entry "decaf.sam2" (a JSON
    object); the table of Meta's four sizes; rules for other sizes. The last three are described at `read_architecture`, the fields at
    `Settings`. `dtype`: float32, or bfloat16 or float16 to compute under autocast as SAM 2 was trained (weights stay float32).

    Raises DecafError: file missing or damaged, not a SAM 2 model, a pickle that would run code, weights missing or left over, another
    module shadowing the package `sam2`, or no such device.
    """
    device = usable_device(device)
    file = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    path, own, weights = file.path, file.settings, read_checkpoint(file)
    sam2_package()  # says what is wrong with the package before anything is said about the file
    try:
        architecture = read_architecture(weights, {**own, **(settings or {})})
        with WithoutMemory():
            expected = build_model(weights, architecture).state_dict()
    except KeyError as error:
        raise DecafError(f"{path} lacks the weight {error}. Download it again, or use Meta's checkpoint.") from error
    except DecafError as error:
        raise DecafError(f"{path}: {error}") from error
    except Exception as error:  # the package's classes assert, divide and look up what they are given
        raise DecafError(f"{path}: its weights do not fit together as a SAM 2 model ({reason(error)}). Use Meta's checkpoint.") from error
    refuse_other_names(path, weights, expected)
    with memory_for(
        f"to load {path}", "Close other programs, free the GPU memory that other models hold, or choose a smaller SAM 2 model."
    ):
        model = build_model(weights, architecture)  # takes as much memory as the weights now
        model.load_state_dict({name: value.float() for name, value in weights.items()})
        model.to(device).eval().requires_grad_(False)
    log.info("%s from %s, %d px", architecture.name, path, architecture.settings.image_size)
    return SAM2(model, architecture.settings.image_size, architecture.name, dtype)


class WithoutMemory(TorchFunctionMode):
    """Weights that are made have a shape and no memory: sizes that contradict each other may ask for any amount of it. Tensors that a
    constructor computes with are left alone, unlike under `torch.device("meta")`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.randn) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def refuse_other_names(
    path: str | Path,
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    model: str = "a SAM 2 model",
    use: str = "Or use Meta's checkpoint.",
) -> None:
    """DecafError: weights are missing or left over, or have another shape than expected."""
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    shaped = [name for name, value in expected.items() if name in weights and weights[name].shape != value.shape]
    for names, what in ((missing, "lacks"), (unexpected, "has unknown"), (shaped, "has, in another shape than its other weights ask for,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise DecafError(f"{path} {what} weights of {model}: '{shown(names[0])}'{more}. Download it again. {use}")


def build_model(weights: Mapping[str, Tensor], architecture: Architecture) -> nn.Module:
    """A `SAM2Base` of the shapes in `weights`, initialised at random, with the settings under which the DecAF paper uses SAM 2."""
    return build_tracker(weights, _image_encoder(weights, architecture), architecture.settings)


def build_tracker(weights: Mapping[str, Tensor], image_encoder: nn.Module, settings: Settings, stride: int = 16) -> nn.Module:
    """A `SAM2Base` around an image encoder, whose lowest level has one token for `stride` x `stride` pixels."""
    model = sam2_package().SAM2Base(
        image_encoder=image_encoder,
        memory_attention=_memory_attention(weights, settings.memory_heads, settings.image_size // stride),
        memory_encoder=_memory_encoder(weights),
        num_maskmem=weights["maskmem_tpos_enc"].shape[0],
        image_size=settings.image_size,
        backbone_stride=stride,
        binarize_mask_from_pts_for_mem_enc=True,
        use_high_res_features_in_sam="sam_mask_decoder.conv_s0.weight" in weights,
        add_tpos_enc_to_obj_ptrs="obj_ptr_tpos_proj.weight" in weights,
        proj_tpos_enc_in_obj_ptrs="obj_ptr_tpos_proj.weight" in weights,
        use_signed_tpos_enc_to_obj_ptrs="obj_ptr_tpos_proj.weight" in weights,
        pred_obj_scores="sam_mask_decoder.obj_score_token.weight" in weights,
        pred_obj_scores_mlp="sam_mask_decoder.pred_obj_score_head.layers.0.weight" in weights,
        fixed_no_obj_ptr="no_obj_ptr" in weights,
        use_mlp_for_obj_ptr_proj="obj_ptr_proj.layers.0.weight" in weights,
        no_obj_embed_spatial="no_obj_embed_spatial" in weights,
        sam_mask_decoder_extra_args=_DYNAMIC_MULTIMASK,
        **HOW_IT_RUNS,
    )
    # SAM2Base fixes the sizes of the decoder's hidden layers; a reduced model may have others.
    model.sam_mask_decoder = _mask_decoder(weights, settings.decoder_heads)
    return model


def _image_encoder(weights: Mapping[str, Tensor], architecture: Architecture) -> nn.Module:
    sam2 = sam2_package()
    trunk = sam2.Hiera(
        embed_dim=weights["image_encoder.trunk.patch_embed.proj.weight"].shape[0],
        num_heads=architecture.settings.num_heads,
        stages=architecture.stages,
        global_att_blocks=architecture.settings.global_att_blocks,
        window_pos_embed_bkg_spatial_size=tuple(weights["image_encoder.trunk.pos_embed"].shape[-2:]),
        window_spec=architecture.settings.window_spec,
    )
    return with_neck(trunk, weights["image_encoder.neck.convs.0.conv.weight"].shape[0])


def with_neck(trunk: nn.Module, d_model: int) -> nn.Module:
    """The image encoder of a trunk: three levels of `d_model` channels, of which the lowest also sees the one below it."""
    sam2 = sam2_package()
    neck = sam2.FpnNeck(
        position_encoding=sine(d_model),
        d_model=d_model,
        backbone_channel_list=trunk.channel_list,
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    return sam2.ImageEncoder(trunk=trunk, neck=neck, scalp=1)


def sine(channels: int) -> nn.Module:
    """Positional encodings of a map."""
    return sam2_package().PositionEmbeddingSine(num_pos_feats=channels, normalize=True, scale=None, temperature=10000, warmup_cache=False)


def _memory_attention(weights: Mapping[str, Tensor], heads: int, side: int) -> nn.Module:
    sam2 = sam2_package()
    layer = "memory_attention.layers.0."
    d_model = weights[layer + "norm1.weight"].shape[0]

    def attention(name: str, **more: object) -> nn.Module:
        inner, outer = weights[f"{layer}{name}.q_proj.weight"].shape
        return sam2.RoPEAttention(
            rope_theta=10000.0,
            feat_sizes=(side, side),
            embedding_dim=outer,
            num_heads=heads,
            downsample_rate=outer // inner,
            dropout=0.1,
            **more,
        )

    return sam2.MemoryAttention(
        d_model=d_model,
        pos_enc_at_input=True,
        layer=sam2.MemoryAttentionLayer(
            activation="relu",
            dim_feedforward=weights[layer + "linear1.weight"].shape[0],
            dropout=0.1,
            pos_enc_at_attn=False,
            self_attention=attention("self_attn"),
            d_model=d_model,
            pos_enc_at_cross_attn_keys=True,
            pos_enc_at_cross_attn_queries=False,
            cross_attention=attention(
                "cross_attn_image", rope_k_repeat=True, kv_in_dim=weights[layer + "cross_attn_image.k_proj.weight"].shape[1]
            ),
        ),
        num_layers=count(weights, "memory_attention.layers."),
    )


def _memory_encoder(weights: Mapping[str, Tensor]) -> nn.Module:
    sam2 = sam2_package()
    first = weights["memory_encoder.mask_downsampler.encoder.0.weight"]
    stride, kernel = math.isqrt(first.shape[0]), first.shape[-1]
    dim = weights["memory_encoder.pix_feat_proj.weight"].shape[0]
    block = "memory_encoder.fuser.layers.0."
    depthwise = weights[block + "dwconv.weight"]
    return sam2.MemoryEncoder(
        in_dim=dim,
        out_dim=weights["maskmem_tpos_enc"].shape[-1],
        position_encoding=sine(weights["maskmem_tpos_enc"].shape[-1]),
        mask_downsampler=sam2.MaskDownSampler(embed_dim=dim, kernel_size=kernel, stride=stride, padding=(kernel - stride + 1) // 2),
        fuser=sam2.Fuser(
            layer=sam2.CXBlock(
                dim=dim,
                kernel_size=depthwise.shape[-1],
                padding=depthwise.shape[-1] // 2,
                layer_scale_init_value=1e-6 if block + "gamma" in weights else 0,
                use_dwconv=depthwise.shape[1] == 1,
            ),
            num_layers=count(weights, "memory_encoder.fuser.layers."),
        ),
    )


def _mask_decoder(weights: Mapping[str, Tensor], heads: int) -> nn.Module:
    sam2 = sam2_package()
    decoder = "sam_mask_decoder."
    tokens, dim = weights[decoder + "mask_tokens.weight"].shape
    return sam2.MaskDecoder(
        num_multimask_outputs=tokens - 1,
        transformer=sam2.TwoWayTransformer(
            depth=count(weights, decoder + "transformer.layers."),
            embedding_dim=dim,
            mlp_dim=weights[decoder + "transformer.layers.0.mlp.layers.0.weight"].shape[0],
            num_heads=heads,
            attention_downsample_rate=dim // weights[decoder + "transformer.final_attn_token_to_image.q_proj.weight"].shape[0],
        ),
        transformer_dim=dim,
        iou_head_depth=count(weights, decoder + "iou_prediction_head.layers."),
        iou_head_hidden_dim=weights[decoder + "iou_prediction_head.layers.0.weight"].shape[0],
        use_high_res_features=decoder + "conv_s0.weight" in weights,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=decoder + "obj_score_token.weight" in weights,
        pred_obj_scores_mlp=decoder + "pred_obj_score_head.layers.0.weight" in weights,
        use_multimask_token_for_obj_ptr=True,
        **_DYNAMIC_MULTIMASK,
    )
