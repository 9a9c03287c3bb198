"""Cancel on the real server: the page's button posts to /interrupt, and the running node has to stop soon."""

from __future__ import annotations

import time

import pytest
from comfy_host import Events

pytestmark = pytest.mark.slow

LIMIT, LIMIT_ALONE = 2.0, 1.0
"""Seconds; the second with --long, when nothing else runs on the machine. The server polls."""


def prompt(**changes) -> dict:
    """A still clip of 240 frames through the whole pipeline. `changes`: "node.input": value."""
    graph = {
        "image": ("LoadImage", {"image": "example.png"}),
        "clip": ("RepeatImageBatch", {"image": ["image", 0], "amount": 240}),
        "large": ("ImageScale", {"image": ["image", 0], "upscale_method": "bilinear", "width": 1120, "height": 1120, "crop": "disabled"}),
        "large_clip": ("RepeatImageBatch", {"image": ["large", 0], "amount": 8}),  # 1,600 visual tokens a frame: many seconds of work
        "mllm": ("LoadMLLM", {"model": "tiny_qwen2_5_vl", "dtype": "fp32"}),
        "sam2": ("DecAFLoadSAM2", {"model": "tiny_sam2.safetensors"}),
        "extract": (
            "ExtractRolloutAttention",
            {
                "mllm": ["mllm", 0],
                "frames": ["clip", 0],
                "query": "it",
                "setting": "expression",
                "max_key_frames": 8,
                "tokens_per_frame": 64,
            },
        ),
        "contrast": ("ObjectBackgroundFusion", {"object": ["extract", 0], "background": ["extract", 1]}),
        "fused": ("FrameFusion", {"attention": ["contrast", 0]}),
        "prompts": ("AttentionToSAM2Prompts", {"fused": ["fused", 0], "threshold": 0.95}),
        "propagate": (
            "SAM2VideoPropagate",
            {"sam2": ["sam2", 0], "frames": ["clip", 0], "prompts": ["prompts", 0], "score_threshold": 0.8},
        ),
        "preview": ("DecAFAttentionPreview", {"frames": ["clip", 0], "fused": ["fused", 0], "prompts": ["prompts", 0]}),
        "correct": (
            "DecAFCorrectObjects",
            {
                "sam2": ["sam2", 0],
                "frames": ["clip", 0],
                "tracks": ["propagate", 1],
                "object": -1,
                "frame": 100,
                "mode": "refine",
                "positive_points": '[{"x": 40, "y": 40}]',
            },
        ),
        "corrected": ("MaskPreview", {"mask": ["correct", 0]}),
        "show": (
            "DecAFShowObjects",
            {"frames": ["clip", 0], "tracks": ["propagate", 1], "style": "spotlight", "opacity": 1.0, "numbers": True},
        ),
        "refined": (
            "DecAFRefineMask",
            {"masks": ["propagate", 1], "grow": 1, "feather": 2.0, "holes": 200, "specks": 100, "smooth": 1},
        ),
        "applied": (
            "DecAFApplyMask",
            {"frames": ["clip", 0], "masks": ["refined", 0], "effect": "blur", "invert": False, "strength": 0.5, "format": "auto"},
        ),
        "saved": ("DecAFSaveCutOut", {"video": ["applied", 0], "filename_prefix": "cancel/cut", "format": "as it is"}),
    }
    made = {key: {"class_type": kind, "inputs": dict(inputs)} for key, (kind, inputs) in graph.items()}
    for place, value in changes.items():
        node, name = place.split("__")
        made[node]["inputs"][name] = value
    return made


@pytest.fixture(scope="module")
def warm(server):
    """The whole graph has run once: what is cached does not run again."""
    server.run(prompt())
    return server


@pytest.mark.parametrize(
    "node, change",
    [
        ("extract", {"extract__tokens_per_frame": 1600, "extract__frames": ["large_clip", 0]}),
        ("propagate", {"propagate__nms_iou": 0.5}),
        ("correct", {"correct__frame": 120}),
        ("preview", {"fused__video_weight": 0.6}),
        ("show", {"show__opacity": 0.7}),
        ("applied", {"applied__strength": 0.7}),
        ("applied", {"refined__grow": 3}),
    ],
)
def test_cancel_stops_the_running_node(warm, node, change, request):
    with Events(warm) as events:
        queued = warm.queue(prompt(**change), events.client_id)
        events.wait("executing", node=node, prompt_id=queued)
        events.wait("progress", node=node, prompt_id=queued)  # it is at work
        asked = time.time()
        warm.post("/interrupt", {})
        entry = warm.result(queued)
    messages = dict(entry["status"]["messages"])
    assert "execution_interrupted" in messages, entry["status"]
    assert messages["execution_interrupted"]["node_id"] == node
    took = messages["execution_interrupted"]["timestamp"] / 1000 - asked
    print(f"{node}: {took:.2f} s")
    assert took < (LIMIT_ALONE if request.config.getoption("--long") else LIMIT)
    warm.run(prompt(prompts__threshold=0.9))  # after a cancel the graph runs as before
