"""A clip to try the pack with, made up on the spot."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..decaf.demo.asking import KINDS
from ..decaf.demo.scenes import make_scene
from ..decaf.errors import DecafError
from . import host
from .inputs import checked
from .sockets import CATEGORY

ANY = "any"


class DecAFSampleClip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DecAFSampleClip",
            display_name="Make Sample Clip",
            category=CATEGORY,
            description="A made-up clip of moving shapes, a query for one of them, and the true mask: to try the pack with its bundled "
            "models, offline.",
            search_aliases=["decaf", "demo", "sample video", "synthetic clip", "test clip"],
            inputs=[
                io.Int.Input(
                    "clip_seed", default=3, min=0, max=2**31 - 1, tooltip="Which clip. The same number gives the same clip and query."
                ),
                io.Combo.Input(
                    "kind",
                    options=[ANY, *KINDS],
                    default=ANY,
                    tooltip="What the query goes by. absent: it asks for something that is not in the clip. The bundled model is good at "
                    "nouns, colours, positions and relations, less so at sizes and time.",
                ),
                io.Int.Input("frames", default=12, min=1, max=96, tooltip="Length of the clip, at 12 frames per second."),
            ],
            outputs=[
                io.Image.Output("images", tooltip="The clip."),
                io.String.Output("query", tooltip="The query, for Extract Rollout Attention."),
                io.Mask.Output("truth", tooltip="The true mask of the query, one per frame, to compare with."),
                io.String.Output("queries", tooltip="All queries that this clip can be asked, one per line."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, clip_seed, kind, frames) -> io.NodeOutput:
        scene = make_scene(clip_seed, length=frames)
        fitting = [query for query in scene.queries if kind in (ANY, query.kind)]
        if not fitting:
            there = ", ".join(sorted({query.kind for query in scene.queries}))
            raise DecafError(f"Clip {clip_seed} has no query of the kind '{kind}', only {there}. Choose another kind or another seed.")
        asked = fitting[0]
        return io.NodeOutput(
            host.as_image(torch.from_numpy(scene.frames)),
            asked.text,
            host.as_mask(torch.from_numpy(scene.truth(asked))),
            "\n".join(query.text for query in scene.queries),
        )
