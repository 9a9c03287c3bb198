"""Corrections by clicking: the editor on Correct Objects, in both designs of the page."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
from comfy_host import WORKFLOWS, Server, running
from comfy_page import DESIGNS, IN_EACH_DESIGN, load_workflow, open_page, press_run, set_widgets
from sounding_clips import write_clip
from workflow_specs import VIDEO_BOX

from decaf.demo.scenes import make_scene
from decaf.finishing import read_with_alpha

pytestmark = pytest.mark.slow

SEED, LENGTH, QUERY = 377, 12, "the orange square"
FRAME, SPILL = 2, (168, 221)
"""A point on the neighbour that the first mask takes in as well."""
KIND = "DecAFCorrectObjects"
FIRST = "Run once, then click on what belongs to the object; shift-click what does not."

_NODE = "window.app.graph._nodes.find(node => node.type === 'DecAFCorrectObjects')"
_VALUES = f"() => Object.fromEntries({_NODE}.widgets.map(widget => [widget.name, widget.value]))"
_ZOOM = f"""
scale => {{
    const {{canvas}} = window.app, [x, y] = {_NODE}.pos
    canvas.ds.scale = scale
    canvas.ds.offset[0] = 300 / scale - x
    canvas.ds.offset[1] = 120 / scale - y
    canvas.setDirty(true, true)
}}
"""
_LISTEN = """
() => {
    window.started ??= (window.app.api.addEventListener('executing', ({detail}) => detail && window.started.push(String(detail))), [])
    window.started.length = 0
}
"""


@pytest.fixture(scope="module")
def scene():
    return make_scene(SEED, length=LENGTH)


@pytest.fixture(scope="module")
def server(host, scene, tmp_path_factory):
    base = tmp_path_factory.mktemp("points")
    (base / "input").mkdir()
    write_clip(base / "input" / "clip.mp4", scene.frames, rate=12)
    with running(Server(host, base), tmp_path_factory.mktemp("bare")) as server:
        yield server


class Person:
    """Somebody who corrects a mask in the page."""

    def __init__(self, page, server, size):
        self.page, self.server, (self.height, self.width) = page, server, size
        self.picture, self.words = page.locator(".decaf-points .picture"), page.locator(".decaf-points .said")

    def zoom(self, scale: float) -> None:
        self.page.evaluate(_ZOOM, scale)
        self.page.wait_for_timeout(600)

    def click(self, x: int, y: int, **how) -> None:
        """On the middle of a pixel of the clip, wherever the screen shows it."""
        box = self.picture.bounding_box()
        place = {"x": (x + 0.5) / self.width * box["width"], "y": (y + 0.5) / self.height * box["height"]}
        self.picture.click(position=place, force=True, **how)
        self.page.wait_for_timeout(200)

    def points(self, sign: str) -> list[tuple[int, int]]:
        text = self.page.evaluate(_VALUES)[f"{sign}_points"]
        return [(point["x"], point["y"]) for point in json.loads(text)] if text else []

    def marks(self, sign: str) -> int:
        return self.page.locator(f".decaf-points .mark[data-sign={sign}]").count()

    def run(self) -> set[str]:
        """Types of the nodes that were executed."""
        self.page.evaluate(_LISTEN)
        assert press_run(self.page) == []
        prompt = max(self.server.get("/history").values(), key=lambda entry: entry["prompt"][0])["prompt"][2]
        return {prompt[node]["class_type"] for node in self.page.evaluate("window.started")}

    def shown(self) -> dict:
        """What the server has told the editor."""
        return self.page.evaluate(f"() => window.app.nodeOutputs[{_NODE}.id].decaf_points.at(-1)")


@contextmanager
def correcting(browser, server, scene, design):
    """(person, console) at the template for corrections, with the demo's models and nothing run yet."""
    console = []
    with open_page(browser, server.url, design=design) as page:
        page.on("console", lambda line: console.append(f"{line.text} {line.location.get('url')}") if line.type == "error" else None)
        page.on("pageerror", lambda error: console.append(f"{error} {error.stack}"))
        load_workflow(page, WORKFLOWS / "Correct a Mask (Video).json")
        models = {"LoadMLLM": {"model": "bundled"}, "DecAFLoadSAM2": {"model": "bundled"}}
        set_widgets(page, models | {"LoadVideo": {"file": "clip.mp4"}, VIDEO_BOX: {"query": QUERY}, KIND: {"frame": FRAME}})
        person = Person(page, server, scene.frames.shape[1:3])
        person.zoom(1.0)
        yield person, console


def opaque(server) -> np.ndarray:
    """(frames, height, width) bool of the cut-out that was saved last."""
    file = max((server.base / "output").rglob("*.mov"), key=lambda file: file.stat().st_mtime_ns)
    return np.stack([frame[..., 3] for frame in read_with_alpha(file)]) >= 128


def near(points, *expected) -> bool:
    return len(points) == len(expected) and np.abs(np.subtract(points, expected)).max(initial=0) <= 2


@IN_EACH_DESIGN
def test_a_click_corrects(browser, server, scene, design):
    x, y = SPILL
    with correcting(browser, server, scene, design) as (me, console):
        page = me.page
        assert page.locator(".decaf-points").get_by_text(FIRST).is_visible() and not me.picture.is_visible()
        assert KIND in me.run()
        told = me.shown()
        height, width = scene.frames.shape[1:3]
        assert {name: told[name] for name in ("frame", "width", "height", "frames")} == {
            "frame": FRAME, "width": width, "height": height, "frames": LENGTH,
        }  # fmt: skip
        assert me.picture.is_visible() and page.evaluate("document.querySelector('.decaf-points img').naturalWidth") == width
        box = me.picture.bounding_box()
        assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.01)
        assert opaque(server)[FRAME, y, x], "the first mask is right already: choose another clip"

        me.click(x, y, modifiers=["Shift"])
        assert near(me.points("negative"), SPILL) and me.points("positive") == [] and me.marks("negative") == 1
        assert {KIND, "DecAFSaveCutOut"} <= (ran := me.run()) and not {"SAM2VideoPropagate", "LoadMLLM"} & ran, ran
        assert not opaque(server)[FRAME, y, x]
        assert me.shown()["filename"] != told["filename"] and me.marks("negative") == 1
        assert page.locator("[data-node-id]:has(.decaf-points) img:visible").count() == (design == DESIGNS[1]), "one picture, not one of the work too"
        assert not page.evaluate(f"() => {_NODE}.widgets.some(widget => widget.name.includes('image-preview'))")
        assert me.run() == set(), "what the page shows is no input"

        me.click(x, y)
        assert me.points("negative") == [] == me.points("positive") and me.marks("negative") == 0, "a click on a mark removes it"
        # At every scale of the canvas and size of the node; the two points lie well apart on the smallest.
        for scale, size in ((0.6, None), (1.5, None), (1.0, [760, 900])):
            if size:
                page.evaluate(f"size => {_NODE}.setSize(size)", size)
            me.zoom(scale)
            me.click(60, 40)
            me.click(300, 200, button="right")
            assert near(me.points("positive"), (60, 40)) and near(me.points("negative"), (300, 200)), scale
            assert page.locator(".p-contextmenu, .litecontextmenu").count() == 0
            page.locator(".decaf-points").get_by_role("button", name="clear").click()
            assert me.points("positive") == me.points("negative") == []

        saved = page.evaluate(f"() => {_NODE}.serialize()")
        assert saved["widgets_values"] == [0, FRAME, "refine", "", ""], "a workflow is saved as without the editor"
    assert [line for line in console if "DecAF" in line or "TypeError" in line or "ReferenceError" in line] == []


@IN_EACH_DESIGN
def test_what_the_editor_says(browser, server, scene, design):
    with correcting(browser, server, scene, design) as (me, console):
        page = me.page
        me.run()
        assert "Shift- or right-click" in me.words.inner_text()
        set_widgets(page, {KIND: {"positive_points": '[{"x": 20, "y": 30}, {"x": 90.5, "y": 31}]'}})
        assert me.marks("positive") == 2, "typed points are marks"
        page.locator(".decaf-points input").fill("5")
        assert page.evaluate(_VALUES)["frame"] == 5
        assert f"This is frame {FRAME}; the picture of frame 5 comes with the next Run." in me.words.inner_text()
        assert "count for frame 5" in me.words.inner_text(), "the marks are of one frame"
        me.click(150, 100)
        assert len(me.points("positive")) == 2, "a click on the picture of another frame would be a wrong point"
        page.locator(".decaf-points .mark").first.focus()
        page.keyboard.press("Delete")
        assert me.points("positive") == [(90.5, 31)] and page.evaluate(f"() => Boolean({_NODE})"), "the mark went, not the node"
        set_widgets(page, {KIND: {"positive_points": "", "frame": 99}})
        assert me.run() >= {KIND} and f"frames 0 to {LENGTH - 1}" in me.words.inner_text()
        set_widgets(page, {KIND: {"negative_points": "the dog"}})
        assert "negative_points: these are no points" in me.words.inner_text()
        set_widgets(page, {KIND: {"negative_points": "", "frame": FRAME}})
        page.evaluate(
            f"""() => {{
                const text = window.LiteGraph.createNode('PrimitiveString'), node = {_NODE}
                window.app.graph.add(text)
                text.connect(0, node, node.inputs.findIndex(input => input.name === 'positive_points'))
            }}"""
        )
        me.run()
        assert "positive_points comes from another node" in me.words.inner_text()
        me.click(150, 100)
        assert page.evaluate(_VALUES)["positive_points"] == "", "nothing is written where another node writes"
        me.click(150, 100, modifiers=["Shift"])
        assert near(me.points("negative"), (150, 100))
    assert [line for line in console if "DecAF" in line or "TypeError" in line or "ReferenceError" in line] == []
