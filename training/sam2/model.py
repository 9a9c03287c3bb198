"""The tiny SAM 2.1: the classes of the package `sam2`, small."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from decaf.sam2.build import HOW_IT_RUNS, sine, with_neck
from decaf.sam2.checkpoint import METADATA_KEY
from decaf.sam2.package import sam2_package

WIDTH = 24  # of the image encoder's first stage; it doubles with each of the four
STAGES = (1, 2, 3, 1)
DIM = 128
MEMORY_DIM = 64
MEMORIES = 5
IMAGE_SIZE = 256


def build(image_size: int = IMAGE_SIZE) -> nn.Module:
    """A `SAM2Base` with random weights. Its weights fit every image size."""
    sam2 = sam2_package()
    trunk = sam2.Hiera(
        embed_dim=WIDTH,
        num_heads=1,
        stages=STAGES,
        global_att_blocks=(4, 5),
        window_pos_embed_bkg_spatial_size=(4, 4),
        window_spec=(8, 4, 8, 4),
    )
    image_encoder = with_neck(trunk, DIM)
    side = image_size // 16
    rope = {"rope_theta": 10000.0, "feat_sizes": (side, side), "embedding_dim": DIM, "num_heads": 1, "downsample_rate": 2, "dropout": 0.0}
    layer = sam2.MemoryAttentionLayer(
        activation="relu",
        dim_feedforward=2 * DIM,
        dropout=0.0,
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
        position_encoding=sine(MEMORY_DIM),
        mask_downsampler=sam2.MaskDownSampler(embed_dim=DIM, kernel_size=3, stride=2, padding=1),
        # At the package's 1e-6 the fuser's blocks would need far more steps than this model gets to take part at all.
        fuser=sam2.Fuser(sam2.CXBlock(dim=DIM, layer_scale_init_value=0.1), num_layers=2),
    )
    model = sam2.SAM2Base(
        image_encoder=image_encoder,
        memory_attention=sam2.MemoryAttention(d_model=DIM, pos_enc_at_input=True, layer=layer, num_layers=2),
        memory_encoder=memory_encoder,
        num_maskmem=MEMORIES,
        image_size=image_size,
        no_obj_embed_spatial=True,
        use_high_res_features_in_sam=True,
        add_tpos_enc_to_obj_ptrs=True,
        proj_tpos_enc_in_obj_ptrs=True,
        use_signed_tpos_enc_to_obj_ptrs=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        use_mlp_for_obj_ptr_proj=True,
        **HOW_IT_RUNS,
    )
    _mark_places(model)
    _look_at_same_place(model)
    return model


# (x, y) waves per half picture whose sines and cosines the mask decoder's position heads compare: slow ones, so that far places differ,
# with faster ones, so that near places do.
_WAVES = ((0.25, 0), (0, 0.25), (0.75, 0), (0, 0.75), (1.5, 0), (0, 1.5))
_COARSE, _FINE = (0, 1, 2, 3), (0, 1, 4, 5)
_SHARPNESS = 12.0


def _mark_places(model: nn.Module) -> None:
    """Starts the mask decoder with a sense of place: a few channels hold nothing but positions, half of the heads between points and
    picture compare them, and the mask tokens take over the point's.

    From random projections a point meets its place in the picture in one of eight channels per head, far below the noise; the decoder then
    first learns to mask everything that is an object, and stays there for long.
    """
    encoder, decoder = model.sam_prompt_encoder, model.sam_mask_decoder
    half = DIM // 2  # sines, then cosines
    placed = [i + part for part in (0, half) for i in range(len(_WAVES))]
    with torch.no_grad():
        encoder.pe_layer.positional_encoding_gaussian_matrix[:, : len(_WAVES)] = torch.tensor(_WAVES).T
        for conv in model.image_encoder.neck.convs[:2]:  # the two levels that the lowest map is made of
            conv.conv.weight[placed] = 0
            conv.conv.bias[placed] = 0
        tokens = (decoder.iou_token, decoder.mask_tokens, decoder.obj_score_token, encoder.not_a_point_embed, *encoder.point_embeddings)
        for embedding in (*tokens, encoder.no_mask_embed):
            embedding.weight[:, placed] = 0
        for name, attention in decoder.named_modules():
            if name.endswith(("cross_attn_token_to_image", "cross_attn_image_to_token", "final_attn_token_to_image")):
                _compare_places(attention, placed, half)
        attention = decoder.transformer.layers[0].self_attn
        for channel in placed:
            attention.v_proj.weight[channel] = 0
            attention.v_proj.weight[channel, channel] = 4.0  # about the point's share of a token's attention, undone
            attention.out_proj.weight[channel] = 0
            attention.out_proj.weight[channel, channel] = 1.0


def _compare_places(attention: nn.Module, placed: list[int], half: int) -> None:
    """Equal projections of query and key: the first half of the heads sees positions only, the rest everything else."""
    weight = torch.zeros_like(attention.q_proj.weight)
    size = attention.internal_dim // attention.num_heads
    for head in range(attention.num_heads // 2):
        waves = _COARSE if head % 2 == 0 else _FINE
        for row, channel in enumerate([w + part for part in (0, half) for w in waves][:size]):
            weight[head * size + row, channel] = _SHARPNESS**0.5
    rest = weight[attention.internal_dim // 2 :]
    nn.init.orthogonal_(rest)
    rest[:, placed] = 0
    attention.q_proj.weight.copy_(weight)
    attention.k_proj.weight.copy_(weight)


def _look_at_same_place(model: nn.Module, strength: float = 3.5) -> None:
    """Starts the memory attention with looking at the same place of the remembered frames: of equal constants in query and key, rotary
    position codes leave a peak where the places are equal, here about two cells wide."""
    with torch.no_grad():
        for layer in model.memory_attention.layers:
            for projection in (layer.cross_attn_image.q_proj, layer.cross_attn_image.k_proj):
                projection.bias.zero_()
                projection.bias[::2] = strength


def save(model: nn.Module, path: Path) -> None:
    """Writes the weights in half precision, with what their shapes cannot tell, as `decaf.sam2.load_sam2` reads it."""
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    settings = {"image_size": IMAGE_SIZE, "num_heads": 1, "window_spec": [8, 4, 8, 4], "global_att_blocks": [4, 5], "decoder_heads": 8}
    save_file(weights, path, metadata={METADATA_KEY: json.dumps(settings), "format": "pt"})
