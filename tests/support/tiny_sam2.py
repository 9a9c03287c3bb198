"""Tiny SAM 2 models with random weights, whose masks are nevertheless neither empty nor full and move with the picture."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from decaf.sam2.package import sam2_package

DIM, MEMORY_DIM, WIDTH = 64, 32, 16
STAGES = (1, 2, 3, 1)


def make_sam2(path, seed: int = 0, image_size: int = 128, version: str = "2.1") -> Path:
    """Writes a random tiny checkpoint, .pt or .safetensors by its suffix, with the setting that its shapes cannot tell. `version`: "2" or
    "2.1", with ", two heads" in the memory attention or ", often unseen": objects are not there on many frames. Or "bare": without the fine
    levels and the object score, which every published model has."""
    path = Path(path)
    weights = random_weights(seed, image_size, version)
    settings = json.dumps({"image_size": image_size, "memory_heads": 2 if "two heads" in version else 1})
    if path.suffix == ".safetensors":
        save_file(weights, path, metadata={"decaf.sam2": settings})
    else:
        torch.save({"model": weights, "decaf.sam2": settings}, path)
    return path


def random_weights(seed: int, image_size: int = 128, version: str = "2.1") -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(sam2_package().SAM2Base, image_size, version)
        enliven(model, 0.0 if "unseen" in version else 4.0)
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def build(base: type[nn.Module], image_size: int = 128, version: str = "2.1", **more) -> nn.Module:
    """A tiny model of the class `base` (`SAM2Base` or a subclass) with the constructor's arguments written out, as in the package's
    configurations."""
    sam2 = sam2_package()
    newer, whole = version.startswith("2.1"), version != "bare"
    trunk = sam2.Hiera(
        embed_dim=WIDTH,
        num_heads=1,
        stages=STAGES,
        global_att_blocks=(4, 5),
        window_pos_embed_bkg_spatial_size=(4, 4),
        window_spec=(8, 4, 8, 4),
    )
    neck = sam2.FpnNeck(
        position_encoding=_sine(DIM),
        d_model=DIM,
        backbone_channel_list=[8 * WIDTH, 4 * WIDTH, 2 * WIDTH, WIDTH],
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    rope = {
        "rope_theta": 10000.0,
        "feat_sizes": (image_size // 16,) * 2,
        "embedding_dim": DIM,
        "num_heads": 2 if "two heads" in version else 1,
        "downsample_rate": 1,
        "dropout": 0.1,
    }
    layer = sam2.MemoryAttentionLayer(
        activation="relu",
        dim_feedforward=2 * DIM,
        dropout=0.1,
        pos_enc_at_attn=False,
        self_attention=sam2.RoPEAttention(**rope),
        d_model=DIM,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        cross_attention=sam2.RoPEAttention(**rope, rope_k_repeat=True, kv_in_dim=MEMORY_DIM),
    )
    memory_encoder = sam2.MemoryEncoder(
        in_dim=DIM,
        out_dim=MEMORY_DIM,
        position_encoding=_sine(MEMORY_DIM),
        mask_downsampler=sam2.MaskDownSampler(embed_dim=DIM, kernel_size=3, stride=2, padding=1),
        fuser=sam2.Fuser(sam2.CXBlock(dim=DIM, layer_scale_init_value=0.1), num_layers=2),
    )
    return base(
        image_encoder=sam2.ImageEncoder(trunk, neck, scalp=1),
        memory_attention=sam2.MemoryAttention(d_model=DIM, pos_enc_at_input=True, layer=layer, num_layers=2),
        memory_encoder=memory_encoder,
        num_maskmem=7,
        image_size=image_size,
        sigmoid_scale_for_mem_enc=20.0,
        sigmoid_bias_for_mem_enc=-10.0,
        binarize_mask_from_pts_for_mem_enc=True,
        use_mask_input_as_output_without_sam=True,
        directly_add_no_mem_embed=True,
        no_obj_embed_spatial=newer,
        use_high_res_features_in_sam=whole,
        multimask_output_in_sam=True,
        iou_prediction_use_sigmoid=True,
        use_obj_ptrs_in_encoder=True,
        add_tpos_enc_to_obj_ptrs=newer,
        proj_tpos_enc_in_obj_ptrs=newer,
        use_signed_tpos_enc_to_obj_ptrs=newer,
        only_obj_ptrs_in_the_past_for_eval=True,
        pred_obj_scores=whole,
        pred_obj_scores_mlp=whole,
        fixed_no_obj_ptr=whole,
        multimask_output_for_tracking=True,
        use_multimask_token_for_obj_ptr=True,
        multimask_min_pt_num=0,
        multimask_max_pt_num=1,
        use_mlp_for_obj_ptr_proj=True,
        sam_mask_decoder_extra_args={
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        },
        **more,
    )


def _sine(channels: int) -> nn.Module:
    return sam2_package().PositionEmbeddingSine(num_pos_feats=channels, normalize=True, scale=None, temperature=10000)


def enliven(model: nn.Module, seen: float = 4.0) -> None:
    """Freshly initialised layers hardly look at their input; scaled up they do, and the mask depends on the point, the picture and the
    memories. `seen`: bias of the object score; at 4 most objects are seen on most frames."""
    decoder = model.sam_mask_decoder
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(3)
            elif name.endswith(("cross_attn_image.v_proj.weight", "cross_attn_image.out_proj.weight")):
                weight.mul_(2.5)
            elif name.endswith(("tpos_enc", "no_mem_embed", "no_obj_ptr", "no_obj_embed_spatial", "pos_embed", "pos_embed_window")):
                weight.normal_(std=0.3)
        if model.pred_obj_scores:
            decoder.pred_obj_score_head.layers[-1].weight.mul_(20)
            decoder.pred_obj_score_head.layers[-1].bias.fill_(seen)
        for mlp in decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.mul_(10)
        decoder.iou_prediction_head.layers[-1].weight.mul_(10)
