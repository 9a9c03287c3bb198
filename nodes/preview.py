"""Pictures of what the model looks at."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

from ..decaf.attention.fusion import coarse_masks
from ..decaf.clips import check_same_clip
from ..decaf.data import caption
from ..decaf.pictures.contact_sheet import contact_sheet
from ..decaf.pictures.drawing import heat_overlay
from ..decaf.pictures.heat_frames import heat_frames
from ..decaf.pictures.lettering import captioned
from . import host, live
from .inputs import checked
from .sockets import CATEGORY, FusedAttention, Prompts, frames_input


class DecAFAttentionPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DecAFAttentionPreview",
            display_name="Preview Attention",
            category=CATEGORY,
            description="Shows where the model looks: a heat map over up to six key frames, and the points. "
            "Put it before Propagate with SAM 2, through its output prompts, and it shows them before SAM 2 runs.",
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
                io.Image.Output(
                    "sheet", tooltip="One picture with up to six key frames, each with its heat map, coarse mask and points, to save or to show."
                ),
                FusedAttention.Output("fused", tooltip="What came in. What takes it from here runs after the pictures were shown."),
                Prompts.Output(
                    "prompts",
                    tooltip="What came in, for Propagate with SAM 2: it then runs after the pictures were shown. Nothing if no prompts came in.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, frames, fused, prompts=None) -> io.NodeOutput:
        report, pictures = host.progress(), []
        with host.returning_memory():
            clip = host.clip_of(frames)
            check_same_clip(clip, fused.clip)
            masks = coarse_masks(fused, clip.frame_size)
            for key, index in enumerate(fused.clip.key_frames):
                report(key, len(fused.clip.key_frames), "Drawing the heat maps")
                dots = None if prompts is None else prompts.xy[prompts.key == key]
                picture = heat_overlay(clip[index], fused.map[key], masks[key], dots)
                pictures.append(captioned(picture, caption(fused)) if fused.name else picture)
            report(len(pictures), len(pictures), "Drawing the heat maps")
            note = "" if fused.presence is None else f"presence {fused.presence:.2f}"
            shown = heat_frames(clip, fused, prompts, fps=clip.fps, note=note)
            sheet = contact_sheet(clip, fused, prompts, progress=report)
            report(0, 2, "Writing the pictures")
            ui = live.Says("" if prompts is None else live.absent(prompts), host.shown_images(_image(shown)))
            report(1, 2, "Writing the pictures")
            images = host.as_image(torch.stack(pictures))
            report(2, 2, "Writing the pictures")
        return io.NodeOutput(images, host.as_mask(masks), _image(sheet), fused, prompts, ui=ui)


def _image(picture) -> torch.Tensor:
    """IMAGE of a Pillow picture."""
    return host.as_image(torch.from_numpy(np.array(picture))[None])
