"""The example workflows on the real server and in the real page: opened by the menu, run by the Run button, and executed in API form."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from comfy_host import WORKFLOWS
from comfy_page import DESIGNS, IN_EACH_DESIGN, fit_view, load_workflow, open_page, press_run, set_widgets
from make_workflows import CHOICES, QUICK, SPECS, SUBGRAPHS, build, build_box
from PIL import Image
from slow import slow_but
from workflow_specs import BOXES
from workflow_specs_sam3 import WORKFLOWS as SAM3_SPECS

HERE = Path(__file__).parent
QUERY = "the red square"
RUN = [name for name in SPECS if name not in SAM3_SPECS]  # those are executed in test_workflows_sam3.py, with a stand-in for SAM 3
SHOWS = {
    QUICK: {"DecAFSaveCutOut"},
    "Blur by Text (Video)": {"SaveVideo"},
    "Correct a Mask (Video)": {"DecAFShowObjects", "DecAFSaveCutOut"},
    "Cut Out by Text (Video)": {"DecAFSaveCutOut"},
    "Mask by Text (Image)": {"SaveImage", "MaskPreview"},
    "Step by Step (Video)": {"DecAFAttentionPreview", "DecAFShowObjects"},
}
"""Nodes that show the result of a workflow."""


def _chosen(name: str) -> dict:
    """What is chosen and written in a workflow; a random model may well say that it does not see it."""
    if name == QUICK:
        return {"LoadMLLM": {"model": "bundled"}, "DecAFLoadSAM2": {"model": "bundled"}}
    query = {"query": QUERY}
    more = {"ExtractRolloutAttention": {"tokens_per_frame": 64} | (query if name == "Step by Step (Video)" else {})}
    return CHOICES | more | {"AttentionToSAM2Prompts": {"threshold": 0.95, "presence_threshold": 0}} | dict.fromkeys(BOXES, query)


@pytest.fixture(scope="module", params=slow_but(SPECS, [QUICK]))
def opened(request, server, browser):
    """(name, page): the page right after the workflow was opened in it."""
    with open_page(browser, server.url) as page:
        load_workflow(page, WORKFLOWS / f"{request.param}.json")
        fit_view(page)
        yield request.param, page


@pytest.mark.slow
def test_it_opens_without_complaint(opened):
    name, page = opened
    state = page.evaluate(
        """() => {
            const {app, LiteGraph} = window, nodes = app.graph._nodes
            return {
                types: nodes.filter(node => !node.subgraph && !LiteGraph.registered_node_types[node.type]).map(node => node.type),
                errors: nodes.filter(node => node.has_errors && !node.properties.models).map(node => node.type),
                links: nodes.flatMap(node => (node.inputs ?? [])
                    .filter(input => input.link != null && !app.graph.links.get(input.link)).map(() => node.type)),
                loose: nodes.flatMap(node => (node.inputs ?? []).filter(input => input.link == null && !input.widget && !input.shape)
                    .map(input => node.type + '.' + input.name)),
                boxes: nodes.map(node => [node.type, ...node.boundingRect]),
                groups: app.graph._groups.map(group => [group.title, ...group.boundingRect]),
            }
        }"""
    )
    assert not state["types"] and not state["errors"] and not state["links"] and not state["loose"], state
    boxes = state["boxes"]
    for place, (one, x, y, width, height) in enumerate(boxes):
        for other, left, top, wide, high in boxes[place + 1 :]:
            assert x + width <= left or left + wide <= x or y + height <= top or top + high <= y, f"{one} lies on {other}"
        assert one == "MarkdownNote" or any(
            gx <= x and gy <= y and x + width <= gx + gw and y + height <= gy + gh for _, gx, gy, gw, gh in state["groups"]
        ), f"{one} is in no group"
    lefts = [group[1] for group in state["groups"]]
    assert lefts == sorted(lefts) and all(group[0][0].isdigit() for group in state["groups"])


def test_no_link_passes_under_a_node(opened):
    """Links as the page draws them: cubic curves that leave to the right and come in from the left, straight between reroutes."""
    name, page = opened
    hidden = page.evaluate(
        """() => {
            const {graph} = window.app, hit = []
            const away = (from, to) => 0.25 * Math.hypot(to[0] - from[0], to[1] - from[1])
            for (const link of graph.links.values()) {
                const from = graph.getNodeById(link.origin_id), to = graph.getNodeById(link.target_id), bends = []
                for (let id = link.parentId; id != null; id = graph.reroutes.get(id).parentId) bends.unshift(graph.reroutes.get(id).pos)
                const stops = [from.getOutputPos(link.origin_slot), ...bends, to.getInputPos(link.target_slot)]
                for (let place = 0; place + 1 < stops.length; place++) {
                    const [a, d] = [stops[place], stops[place + 1]]
                    const b = place ? a : [a[0] + away(a, d), a[1]], c = place + 2 < stops.length ? d : [d[0] - away(a, d), d[1]]
                    for (let t = 0.01; t < 1; t += 0.01) {
                        const s = 1 - t, at = [0, 1].map(k => s*s*s*a[k] + 3*s*s*t*b[k] + 3*s*t*t*c[k] + t*t*t*d[k])
                        for (const node of graph._nodes) {
                            const [x, y, w, h] = node.boundingRect
                            const rim = node === from || node === to ? 30 : 4  // its slots lie in its rim
                            if (at[0] > x + rim && at[0] < x + w - rim && at[1] > y && at[1] < y + h)
                                hit.push(`${from.title} > ${to.title} under ${node.title}`)
                        }
                    }
                }
            }
            return [...new Set(hit)]
        }"""
    )
    assert hidden == []


def test_the_page_offers_the_models_that_are_missing(opened):
    name, page = opened
    wanted = {model.name for column in SPECS[name].columns.values() for node in column.values() for model in node.models}
    if name == QUICK:
        assert not wanted and page.get_by_text("View details").count() == 0
        return
    page.get_by_text("View details").click()
    page.wait_for_timeout(1500)
    told = page.locator("body").inner_text()
    assert wanted and all(one in told for one in wanted), told
    assert "Download" in told


def test_what_was_not_chosen_is_said_at_the_node(opened):
    name, page = opened
    kind, folder = ("LoadMLLM", "models/LLM") if "LoadMLLM" in _types(name) else ("DecAFLoadSAM2", "models/sam2")
    set_widgets(page, {one: choice for one, choice in CHOICES.items() if one != kind} | {kind: {"model": "choose a model"}})
    said = press_run(page)
    assert any(folder in line and kind in line for line in said), said


@pytest.mark.parametrize("name", slow_but(RUN, [QUICK]))
@IN_EACH_DESIGN
def test_run_shows_the_result_and_a_second_run_executes_nothing(browser, server, design, name):
    """Core's own Save Video runs again, once, in the classic canvas: it shows what it has saved, which the page takes for an input."""
    with open_page(browser, server.url, design=design) as page:
        load_workflow(page, WORKFLOWS / f"{name}.json")
        set_widgets(page, _chosen(name))
        assert press_run(page) == []
        told = page.evaluate(
            """() => window.app.graph._nodes.filter(node => Object.keys(window.app.nodeOutputs[node.id] ?? {}).length)
                .map(node => node.type)"""
        )
        assert SHOWS[name] <= set(told), told
        if name == "Step by Step (Video)":
            texts = page.evaluate("window.app.graph._nodes.flatMap(node => (node.widgets ?? []).map(one => String(one.value)))")
            assert any(f"{QUERY}" in text and "presence" in text for text in texts), texts
        ran = _executed(page, server)
        assert ran <= {"SaveVideo"}, ran
        if ran:
            assert _executed(page, server) == set()


@pytest.mark.slow
def test_a_box_shows_what_it_found_in_the_new_design(browser, server):
    with open_page(browser, server.url, design=DESIGNS[1]) as page:
        load_workflow(page, WORKFLOWS / f"{QUICK}.json")
        assert press_run(page) == []
        assert page.locator("video").evaluate_all("all => all.map(one => one.videoWidth)") == [364]
        assert page.get_by_text("failed to load").count() == 0


def _executed(page, server) -> set[str]:
    """Presses Run: the types of the nodes that ComfyUI began to execute. One that nobody needs is neither executed nor cached."""
    page.evaluate(
        """() => {
            window.begun ??= (window.app.api.addEventListener('executing', ({detail}) => detail && window.begun.push(String(detail))), [])
            window.begun.length = 0
        }"""
    )
    assert press_run(page) == []
    prompt = max(server.get("/history").values(), key=lambda entry: entry["prompt"][0])["prompt"][2]
    return {prompt[key]["class_type"] for key in page.evaluate("window.begun")}


@pytest.mark.slow
def test_a_correction_runs_only_what_is_behind_it(browser, server):
    """In the quick start, step by step: Correct Objects between the objects and what shows them, a point typed into it, then another style
    and a pick."""
    with open_page(browser, server.url) as page:
        load_workflow(page, HERE / "saved" / "decaf_quick_start.json")
        assert press_run(page) == []
        page.evaluate(
            """() => {
                const {app, LiteGraph} = window, node = type => app.graph._nodes.find(node => node.type === type)
                const link = (from, output, to, input) =>
                    from.connect(from.findOutputSlot(output), to, to.findInputSlot(input))
                for (const type of ['DecAFCorrectObjects', 'DecAFTracksToMask']) app.graph.add(LiteGraph.createNode(type))
                const correct = node('DecAFCorrectObjects'), pick = node('DecAFTracksToMask'), show = node('DecAFShowObjects')
                link(node('DecAFLoadSAM2'), 'sam2', correct, 'sam2')
                link(node('DecAFSampleClip'), 'images', correct, 'frames')
                link(node('SAM2VideoPropagate'), 'tracks', correct, 'tracks')
                link(correct, 'tracks', pick, 'tracks')
                link(pick, 'tracks', show, 'tracks')
            }"""
        )
        set_widgets(page, {"DecAFCorrectObjects": {"object": -1, "frame": 3, "positive_points": '[{"x": 150, "y": 120}]'}})
        assert _executed(page, server) == {"DecAFCorrectObjects", "DecAFTracksToMask", "DecAFShowObjects"}
        set_widgets(page, {"DecAFTracksToMask": {"max_objects": 1}})
        assert _executed(page, server) == {"DecAFTracksToMask", "DecAFShowObjects"}
        set_widgets(page, {"DecAFShowObjects": {"style": "tint"}})
        assert _executed(page, server) == {"DecAFShowObjects"}
        assert _executed(page, server) == set()
        set_widgets(page, {"DecAFCorrectObjects": {"frame": 999}})
        said = press_run(page)
        assert len(said) == 1 and "DecAFCorrectObjects" in said[0] and "There is no frame 999" in said[0], said


@pytest.mark.slow
def test_a_workflow_of_version_0_1_0_opens_and_runs(browser, server):
    with open_page(browser, server.url) as page:
        load_workflow(page, HERE / "saved" / "decaf_video_to_mask_0.1.0.json")
        more = {"ExtractRolloutAttention": {"query": QUERY, "tokens_per_frame": 64}, "AttentionToSAM2Prompts": {"threshold": 0.95}}
        set_widgets(page, CHOICES | more)
        assert press_run(page) == []
        assert _executed(page, server) <= {"SaveVideo"}, "its node of SAM 2 shows nothing any more"


@pytest.mark.slow
def test_the_server_executes_it_anew(opened, server):
    name, page = opened
    if name not in RUN:
        pytest.skip("executed in test_workflows_sam3.py")
    set_widgets(page, _chosen(name))
    prompt = page.evaluate("window.app.graphToPrompt().then(made => made.output)")
    server.post("/free", {"unload_models": True, "free_memory": True})
    outputs = server.run(prompt)
    files = [file for output in outputs.values() for file in output.get("images", [])]
    assert files and all((server.base / file["type"] / file["subfolder"] / file["filename"]).stat().st_size for file in files)
    server.run(prompt)  # "free" may have been carried out only after the first run
    for node in prompt.values():
        if node["class_type"] == "ExtractRolloutAttention":
            node["inputs"]["query"] = "the blue square"
    entry = server.result(server.queue(prompt))
    cached = next(message[1]["nodes"] for message in entry["status"]["messages"] if message[0] == "execution_cached")
    loaders = {key for key, node in prompt.items() if node["class_type"] in ("LoadMLLM", "CLIPLoader", "DecAFLoadSAM2")}
    assert loaders <= set(cached), "a second query must not read the models from disk again"


def _types(name: str) -> set[str]:
    return {node.type for column in SPECS[name].columns.values() for node in column.values()}


@pytest.mark.parametrize("name", slow_but([*SPECS, *(title for title in BOXES if title not in SPECS)], ["Mask by Text (Video)"]))
def test_the_file_is_what_the_page_builds(browser, server, name):
    for folder, make in ((WORKFLOWS, build), (SUBGRAPHS, build_box)):
        if name in (SPECS if folder == WORKFLOWS else BOXES):
            with open_page(browser, server.url) as page:  # a page keeps the values of a box, for the next one that gets its number
                made, stored = make(page, name), json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
                assert _look(made) == _look(stored)


def _look(graph: dict) -> list:
    """What stays of a workflow, and of the boxes in it, when sizes and places are left out."""
    parts = [graph, *graph.get("definitions", {}).get("subgraphs", ())]
    return [
        (
            part.get("name"),
            sorted((node["id"], node["type"], str(node.get("widgets_values")), str(node["properties"].get("models"))) for node in part["nodes"]),
            len(part["links"]),
            [[slot["name"] for slot in part.get(side, ())] for side in ("inputs", "outputs")],
        )
        for part in parts
    ]


def test_the_host_serves_templates_and_help(server):
    assert set(server.get("/workflow_templates")["ComfyUI-DecAF"]) == set(SPECS)
    names = [urllib.parse.quote(name) for name in SPECS]
    pictures = [f"/api/workflow_templates/ComfyUI-DecAF/{name}.jpg" for name in names]
    for path in (*pictures, "/extensions/ComfyUI-DecAF/docs/LoadMLLM.md"):
        with urllib.request.urlopen(server.url + path) as answer:
            assert answer.status == 200 and answer.read()
    for name in SPECS:
        file = WORKFLOWS / f"{name}.jpg"
        assert file.stat().st_size < 60_000 and Image.open(file).size == (400, 400)


def test_titles_put_the_first_thing_first():
    """The page sorts by title where it is asked to, and lists what begins with a digit last."""
    assert min(SPECS) == QUICK and not any(name[0].isdigit() for name in SPECS)
    assert {file.stem for file in WORKFLOWS.glob("*.json")} == set(SPECS) and {file.stem for file in SUBGRAPHS.glob("*.json")} == set(BOXES)
