"""What the server tells the page while a clip goes through all nodes: progress without a standstill, words, pictures, and in which order."""

from __future__ import annotations

import io

import pytest
from comfy_graph import node
from comfy_host import Events
from moving_shapes import moving_shapes
from PIL import Image

from decaf.clips import write_video

pytestmark = pytest.mark.slow

SILENCE = 2.0
"""Seconds without any sign of progress, at most."""


@pytest.fixture(scope="module")
def length(request, base):
    """Frames of base/input/long.mp4."""
    length = 300 if request.config.getoption("--long") else 40
    size = (360, 640) if length == 300 else (144, 256)
    clip = moving_shapes(length, *size)
    write_video(base / "input" / "long.mp4", (clip[index] for index in range(length)), 24, size)
    return length


def graph(threshold: float = 0.95) -> dict:
    """Preview Attention lies on the way to SAM 2."""
    return {
        "video": node("LoadVideo", file="long.mp4"),
        "mllm": node("LoadMLLM", model="bundled", dtype="fp32"),
        "sam2": node("DecAFLoadSAM2", model="bundled"),
        "extract": node(
            "ExtractRolloutAttention", mllm=["mllm", 0], frames=["video", 0], query="the red circle\nthe blue square", setting="expression",
            max_key_frames=16, tokens_per_frame=400,
        ),
        "contrast": node("ObjectBackgroundFusion", object=["extract", 0], background=["extract", 1]),
        "fused": node("FrameFusion", attention=["contrast", 0]),
        "prompts": node("AttentionToSAM2Prompts", fused=["fused", 0], threshold=threshold, presence_threshold=0.0),
        "preview": node("DecAFAttentionPreview", frames=["video", 0], fused=["fused", 0], prompts=["prompts", 0]),
        "propagate": node("SAM2VideoPropagate", sam2=["sam2", 0], frames=["video", 0], prompts=["preview", 4], score_threshold=0.8),
        "corrected": node(
            "DecAFCorrectObjects", sam2=["sam2", 0], frames=["video", 0], tracks=["propagate", 1], object=-1, frame=3, mode="refine",
            positive_points='[{"x": 60, "y": 50}]', negative_points="",
        ),
        "show": node("DecAFShowObjects", frames=["video", 0], tracks=["corrected", 1], style="spotlight", opacity=1.0, numbers=True),
        "refined": node("DecAFRefineMask", masks=["corrected", 1], grow=1, feather=2.0, holes=200, specks=100, smooth=1),
        "applied": node(
            "DecAFApplyMask", frames=["video", 0], masks=["refined", 0], effect="cut out", invert=False, strength=0.5, format="auto"
        ),
        "saved": node("DecAFSaveCutOut", video=["applied", 0], filename_prefix="live/cut", format="as it is"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def told(server, length):
    """[(when, type, data)] of one run."""
    with Events(server) as events:
        queued = server.queue(graph(), events.client_id)
        seen = events.until("execution_success", 1500, prompt_id=queued)
    return [one for one in seen if one[1] != "status"]


def test_no_standstill(told):
    gaps = sorted(
        ((later[0] - earlier[0], earlier[1:], later[1:]) for earlier, later in zip(told, told[1:], strict=False)), key=lambda gap: -gap[0]
    )
    print(f"longest gaps: {[round(gap[0], 2) for gap in gaps[:5]]}, after {str(gaps[0][1])[:300]}")
    assert gaps[0][0] < SILENCE, gaps[0]


def test_the_bar_is_never_full_while_a_node_works(told):
    bars = [data for _, kind, data in told if kind == "progress" and data["node"] not in ("video", "saved")]
    assert len(bars) > 30 and max(bar["value"] / bar["max"] for bar in bars) <= 0.99


def test_the_steps_are_said_in_words(told, length):
    words = [data[4 + int.from_bytes(data[:4], "big") :].decode() for _, kind, data in told if kind == "text"]
    assert any(word == "Asking about the video" for word in words) and any("key frames: 16 of 16" in word for word in words)
    assert any("tracking through the clip" in word for word in words) and any("corrected object" in word for word in words)


def test_the_heat_map_is_there_before_sam2_runs(told):
    order = [data["node"] for _, kind, data in told if kind == "executed"]
    assert order.count("preview") == 1 and order.index("preview") < order.index("propagate")
    started = [data["node"] for _, kind, data in told if kind == "executing"]
    assert started.index("preview") < started.index("propagate")


def test_pictures_come_while_a_node_works(told):
    """The page of this test does not know which node a picture is of; it is the one that was begun last."""
    running, seen = None, {}
    for _, kind, data in told:
        if kind == "executing":
            running = data["node"]
        if kind == "picture":
            seen.setdefault(running, []).append(Image.open(io.BytesIO(data[4:])))
    assert seen.get("extract") and seen.get("propagate"), {key: len(value) for key, value in seen.items()}
    assert all(max(picture.size) <= 384 for pictures in seen.values() for picture in pictures)


def test_what_was_found_is_told_of_each_query(told):
    shown = {data["node"]: data["output"] for _, kind, data in told if kind == "executed" and data["output"]}
    assert len(shown["extract"]["text"][0].splitlines()) == 2
    assert len(shown["prompts"]["text"]) == 2 and len(shown["propagate"]["text"]) == 2 and len(shown["preview"]["images"]) == 2


def test_a_second_run_executes_nothing_and_tells_the_same(server, told):
    with Events(server) as events:
        queued = server.queue(graph(), events.client_id)
        seen = events.until("execution_success", 120, prompt_id=queued)
    cached = next(data["nodes"] for _, kind, data in seen if kind == "execution_cached")
    assert set(cached) == set(graph())
    shown = {data["node"]: data["output"] for _, kind, data in told if kind == "executed" and data["output"]}
    again = {data["node"]: data["output"] for _, kind, data in seen if kind == "executed" and data["output"]}
    assert {"preview", "propagate", "corrected", "show"} <= set(again) and all(shown[name] == output for name, output in again.items())
