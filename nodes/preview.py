"""Pictures of what the model looks at."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..decaf.attention.fusion import coarse_masks
from ..decaf.clips import check_same_clip
from ..decaf.data import caption
from ..decaf.pictures.contact_sheet import heat_overlay
from ..decaf.pictures.lettering import captioned
from . import host
from .inputs import checked
from .sockets import CATEGORY, FusedAttention, Prompts, frames_input


class DecAFAttentionPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DecAFAttentionPreview",
            display_name="Preview Attention",
            category=CATEGORY,
            description="Shows where the model looks: a heat map over every key frame, the outline of the coarse mask, and the points.",
            search_aliases=["decaf", "heat map", "heatmap", "attention preview", "coarse mask", "visualize attention"],
            inputs=[
                frames_input("The same clip (or image) that the attention was extracted from."),
                FusedAttention.Input("fused", tooltip="From Fuse Video and Frame Attention."),
                Prompts.Input("prompts", optional=True, tooltip="From Turn Attention into Prompts: its points are drawn too."),
            ],
            outputs=[
                io.Image.Output("images", tooltip="The key frames with heat map, coarse mask and points."),
                io.Mask.Output(
                    "coarse_mask", tooltip="The mask that attention gives without SAM 2, one per key frame (not per frame of the clip)."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, frames, fused, prompts=None) -> io.NodeOutput:
        clip = host.clip_of(frames)
        check_same_clip(clip, fused.clip)
        report = host.progress()
        masks = coarse_masks(fused, clip.frame_size)
        pictures = []
        with host.returning_memory():
            for key, index in enumerate(fused.clip.key_frames):
                report(key, len(fused.clip.key_frames), "drawing")
                dots = None if prompts is None else prompts.xy[prompts.key == key]
                picture = heat_overlay(clip[index], fused.map[key], masks[key], dots)
                pictures.append(captioned(picture, caption(fused)) if fused.name else picture)
        images = host.as_image(torch.stack(pictures))
        return io.NodeOutput(images, host.as_mask(masks), ui=host.shown_images(images))
