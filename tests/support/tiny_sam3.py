"""Tiny SAM 3 trackers with random weights, made by transformers, and files of them under all the names that such weights go by."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, PATCH, WINDOW, HIDDEN = 64, 14, 3, 128
IMAGE_SIZE = 3 * WINDOW * PATCH


def make_tracker(seed: int = 0, seen: float = 4.0):
    """A `Sam3TrackerVideoModel` whose masks are neither empty nor full and move with the picture. `seen`: bias of the object score."""
    from transformers import Sam3TrackerVideoConfig, Sam3TrackerVideoModel

    config = Sam3TrackerVideoConfig(
        vision_config={
            "model_type": "sam3_vision_model",
            "fpn_hidden_size": HIDDEN,
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": WIDTH,
                "intermediate_size": 2 * WIDTH,
                "num_hidden_layers": 8,
                "num_attention_heads": 1,
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH,
                "window_size": WINDOW,
                "global_attn_indexes": [1, 3, 5, 7],
                "pretrain_image_size": WINDOW * PATCH,
            },
        },
        prompt_encoder_config={"hidden_size": HIDDEN, "image_size": IMAGE_SIZE, "patch_size": PATCH},
        mask_decoder_config={
            "hidden_size": HIDDEN,
            "mlp_dim": 2 * HIDDEN,
            "num_attention_heads": HIDDEN // 32,
            "iou_head_hidden_dim": HIDDEN // 2,
            "dynamic_multimask_via_stability": True,
        },
        memory_attention_hidden_size=HIDDEN,
        memory_attention_num_layers=2,
        memory_attention_feed_forward_hidden_size=2 * HIDDEN,
        memory_encoder_hidden_size=HIDDEN,
        mask_downsampler_embed_dim=HIDDEN,
        memory_fuser_embed_dim=HIDDEN,
        memory_fuser_intermediate_dim=4 * HIDDEN,
        image_size=IMAGE_SIZE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Sam3TrackerVideoModel(config).eval()
        _enliven(model, seen)
    return model


def _enliven(model, seen: float) -> None:
    """Fresh layers hardly look at their input; scaled up they do."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name and "token" not in name:
                fan_in = weight[0].numel() if "upscale" not in name and "scale_layers" not in name else weight.shape[0]
                weight.normal_(std=fan_in**-0.5)
            elif name.endswith("bias"):
                weight.normal_(std=0.05)
            if name.endswith(("memory_fuser.layers.0.scale", "memory_fuser.layers.1.scale")):
                weight.fill_(0.1)
            elif re.search(
                "(no_memory|temporal_positional_encoding$|no_object|occlusion|position_embeddings|token.*weight|point_embed)", name
            ):
                weight.normal_(std=0.3)
        decoder = model.mask_decoder
        for mlp in decoder.output_hypernetworks_mlps:
            mlp.proj_out.weight.mul_(3)
        decoder.iou_prediction_head.proj_out.weight.mul_(3)
        decoder.pred_obj_score_head.proj_out.weight.mul_(2 if seen else 8)
        decoder.pred_obj_score_head.proj_out.bias.fill_(seen)
        # One matrix in the checkpoint, two modules of the model.
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(model.shared_image_embedding.positional_embedding)


def write(model, path, names: str = "transformers", dtype: torch.dtype = torch.float32) -> Path:
    """`names`: "transformers", as in the file of facebook/sam3, "alone", as of a tracker without the detector, or "Meta"."""
    weights = {name: value.detach().to(dtype).contiguous().clone() for name, value in model.state_dict().items()}
    if names != "alone":
        weights = {whole_name(name): value for name, value in weights.items()}
        weights["detector_model.text_encoder.text_model.final_layer_norm.weight"] = torch.ones(4)
        weights["detector_model.vision_encoder.neck.fpn_layers.0.proj1.bias"] = torch.ones(4)
    if names == "Meta":
        weights = _as_meta(weights)
    path = Path(path)
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"model": weights} if "nested" in path.stem else weights, path)
    return path


def whole_name(name: str) -> str:
    if name.startswith("vision_encoder.backbone."):
        return "detector_model." + name
    return name.replace("vision_encoder.neck.", "tracker_neck.") if name.startswith("vision_encoder.neck.") else "tracker_model." + name


_META = [
    (r"^detector_model\.vision_encoder\.backbone\.embeddings\.position_embeddings", "TRUNK.pos_embed"),
    (r"^detector_model\.vision_encoder\.backbone\.embeddings\.patch_embeddings\.projection", "TRUNK.patch_embed.proj"),
    (r"^detector_model\.vision_encoder\.backbone\.layer_norm", "TRUNK.ln_pre"),
    (r"^detector_model\.vision_encoder\.backbone\.layers\.", "TRUNK.blocks."),
    (r"(TRUNK.*)\.layer_norm", r"\1.norm"),
    (r"(TRUNK.*)\.attention\.o_proj", r"\1.attn.proj"),
    (r"(TRUNK.*)\.attention\.", r"\1.attn."),
    (r"^TRUNK", "detector.backbone.vision_backbone.trunk"),
    (r"^tracker_neck\.fpn_layers\.0\.scale_layers\.0", "tracker_neck.fpn_layers.0.dconv_2x2_0"),
    (r"^tracker_neck\.fpn_layers\.0\.scale_layers\.2", "tracker_neck.fpn_layers.0.dconv_2x2_1"),
    (r"^(tracker_neck\.fpn_layers\.1)\.scale_layers\.0", r"\1.dconv_2x2"),
    (r"^(tracker_neck.*)\.proj1", r"\1.conv_1x1"),
    (r"^(tracker_neck.*)\.proj2", r"\1.conv_3x3"),
    (r"^tracker_neck\.fpn_layers", "detector.backbone.vision_backbone.sam2_convs"),
    (
        r"^tracker_model\.shared_image_embedding\.positional_embedding",
        "tracker.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"^tracker_model\.prompt_encoder", "tracker.sam_prompt_encoder"),
    (r"^tracker_model\.mask_decoder", "tracker.sam_mask_decoder"),
    (r"^tracker_model\.memory_attention", "tracker.transformer.encoder"),
    (r"^tracker_model\.memory_encoder\.projection", "tracker.maskmem_backbone.out_proj"),
    (r"^tracker_model\.memory_encoder", "tracker.maskmem_backbone"),
    (r"^tracker_model\.no_memory_embedding", "tracker.no_mem_embed"),
    (r"^tracker_model\.no_memory_positional_encoding", "tracker.no_mem_pos_enc"),
    (r"^tracker_model\.memory_temporal_positional_encoding", "tracker.maskmem_tpos_enc"),
    (r"^tracker_model\.no_object_pointer", "tracker.no_obj_ptr"),
    (r"^tracker_model\.object_pointer_proj", "tracker.obj_ptr_proj"),
    (r"^tracker_model\.temporal_positional_encoding_projection_layer", "tracker.obj_ptr_tpos_proj"),
    (r"^tracker_model\.occlusion_spatial_embedding_parameter", "tracker.no_obj_embed_spatial"),
    (r"^tracker_model\.", "tracker."),
    (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"(transformer\.layers\.\d\.mlp)\.proj_in", r"\1.lin1"),
    (r"(transformer\.layers\.\d\.mlp)\.proj_out", r"\1.lin2"),
    (r"(mlps\.\d|head|obj_ptr_proj)\.layers\.0", r"\1.layers.1"),
    (r"(mlps\.\d|head|obj_ptr_proj)\.proj_in", r"\1.layers.0"),
    (r"(mlps\.\d|head|obj_ptr_proj)\.proj_out", r"\1.layers.2"),
    (r"mask_downsampler\.layers\.0\.conv", "mask_downsampler.encoder.0"),
    (r"mask_downsampler\.layers\.0\.layer_norm", "mask_downsampler.encoder.1"),
    (r"mask_downsampler\.layers\.1\.conv", "mask_downsampler.encoder.3"),
    (r"mask_downsampler\.layers\.1\.layer_norm", "mask_downsampler.encoder.4"),
    (r"mask_downsampler\.layers\.2\.conv", "mask_downsampler.encoder.6"),
    (r"mask_downsampler\.layers\.2\.layer_norm", "mask_downsampler.encoder.7"),
    (r"mask_downsampler\.layers\.3\.conv", "mask_downsampler.encoder.9"),
    (r"mask_downsampler\.layers\.3\.layer_norm", "mask_downsampler.encoder.10"),
    (r"mask_downsampler\.final_conv", "mask_downsampler.encoder.12"),
    (r"feature_projection", "pix_feat_proj"),
    (r"memory_fuser", "fuser"),
    (r"depthwise_conv", "dwconv"),
    (r"pointwise_conv", "pwconv"),
    (r"(fuser.*)\.scale$", r"\1.gamma"),
    (r"(tracker\..*)\.o_proj", r"\1.out_proj"),
    (r"(tracker\..*)\.layer_norm", r"\1.norm"),
]


def _as_meta(weights):
    found, fused = {}, {}
    for name, value in weights.items():
        if "prompt_encoder.shared_embedding" in name:
            continue
        for pattern, replacement in _META:
            name = re.sub(pattern, replacement, name)
        part = re.fullmatch(r"(.*trunk.*\.attn)\.([qkv])_proj\.(weight|bias)", name)
        if part:
            fused.setdefault(f"{part[1]}.qkv.{part[3]}", {})[part[2]] = value
        elif name.endswith("trunk.pos_embed"):
            found[name] = torch.cat([torch.ones_like(value[:, :1]), value], 1)  # a class token, which nothing uses
        elif name.endswith(".point_embed.weight"):
            for i, row in enumerate(value.split(1)):
                found[name.replace("point_embed.", f"point_embeddings.{i}.")] = row.clone()
        else:
            found[name] = value
    found |= {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in fused.items()}
    found["detector.backbone.vision_backbone.trunk.blocks.0.attn.freqs_cis"] = torch.ones(2, 2)
    found["detector.backbone.vision_backbone.convs.0.conv_1x1.bias"] = torch.ones(4)
    return found
