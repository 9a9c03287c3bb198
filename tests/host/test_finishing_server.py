"""Refine, apply and save in a running server: over its own check of links, and the second time without running anything."""

from __future__ import annotations

import json

import av
import pytest
from comfy_graph import node
from sounding_clips import heard, times_of, write_clip

SIZE = (72, 96)


@pytest.fixture(scope="module")
def loud(base):
    return write_clip(base / "input" / "loud.mp4", 24, size=SIZE)


def graph(grow: int = 1, prefix: str = "finished/cut") -> dict:
    """A mask from core's own nodes, one for all frames."""
    return {
        "video": node("LoadVideo", file="loud.mp4"),
        "one": node("SolidMask", value=0.0, width=SIZE[1], height=SIZE[0]),
        "square": node("SolidMask", value=1.0, width=40, height=30),
        "mask": node("MaskComposite", destination=["one", 0], source=["square", 0], x=20, y=20, operation="add"),
        "refined": node("DecAFRefineMask", masks=["mask", 0], grow=grow, feather=2.0, holes=0, specks=0, smooth=0),
        "applied": node(
            "DecAFApplyMask", frames=["video", 0], masks=["refined", 0], effect="cut out", invert=False, strength=0.5, format="auto"
        ),
        "saved": node("DecAFSaveCutOut", video=["applied", 0], filename_prefix=prefix, format="as it is"),
    }


def executed(server, prompt) -> set[str]:
    """The nodes that ran, and were not taken from the cache."""
    entry = server.result(server.queue(prompt))
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    cached = {name for kind, told in entry["status"]["messages"] if kind == "execution_cached" for name in told["nodes"]}
    return set(prompt) - cached


def test_a_cut_out_is_saved_with_its_sound(server, base, loud):
    assert len(server.run(graph())["saved"]["images"]) == 1
    (saved,) = (base / "output" / "finished").glob("cut_*.mov")
    assert times_of(saved)[0] == times_of(loud)[0] and (heard(saved)[1] == heard(loud)[1]).all()
    with av.open(str(saved)) as file:
        assert file.streams.video[0].codec_context.pix_fmt.startswith("yuva444p")
        assert json.loads(file.metadata["prompt"])["saved"]["inputs"]["filename_prefix"] == "finished/cut"


def test_nothing_runs_twice(server, loud):
    """And a change of the finishing runs what is behind it alone."""
    server.run(graph(prefix="finished/twice"))
    assert executed(server, graph(prefix="finished/twice")) == set()
    assert executed(server, graph(grow=3, prefix="finished/twice")) == {"refined", "applied", "saved"}
