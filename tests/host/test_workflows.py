"""The example workflows on the real server and in the real page: opened by the menu, run by the Run button, and executed in API form."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from comfy_host import WORKFLOWS
from comfy_page import fit_view, load_workflow, open_page, press_run, set_widgets
from make_workflows import CHOICES, QUICK, build
from workflow_specs import WORKFLOWS as SPECS

HERE = Path(__file__).parent
QUERY = "the red square"


@pytest.fixture(scope="module", params=SPECS)
def opened(request, server, browser):
    """(name, page): the page right after the workflow was opened in it."""
    with open_page(browser, server.url) as page:
        load_workflow(page, WORKFLOWS / f"{request.param}.json")
        fit_view(page)
        yield request.param, page


def test_it_opens_without_complaint(opened):
    name, page = opened
    state = page.evaluate(
        """() => {
            const {app, LiteGraph} = window, nodes = app.graph._nodes
            return {
                types: nodes.filter(node => !LiteGraph.registered_node_types[node.type]).map(node => node.type),
                errors: nodes.filter(node => node.has_errors).map(node => node.type),
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
    assert "missing" not in page.locator("body").inner_text().lower()
    boxes = state["boxes"]
    for place, (one, x, y, width, height) in enumerate(boxes):
        for other, left, top, wide, high in boxes[place + 1 :]:
            assert x + width <= left or left + wide <= x or y + height <= top or top + high <= y, f"{one} lies on {other}"
        assert one == "MarkdownNote" or any(
            gx <= x and gy <= y and x + width <= gx + gw and y + height <= gy + gh for _, gx, gy, gw, gh in state["groups"]
        ), f"{one} is in no group"
    lefts = [group[1] for group in state["groups"]]
    assert lefts == sorted(lefts) and all(group[0][0].isdigit() for group in state["groups"])


def test_what_was_not_chosen_is_said_at_the_node(opened):
    name, page = opened
    set_widgets(
        page, {kind: choice for kind, choice in CHOICES.items() if kind.startswith("Load")} | {"LoadMLLM": {"model": "choose a model"}}
    )
    said = press_run(page)
    kind, folder = ("LoadMLLM", "models/LLM") if "LoadMLLM" in _types(name) else ("DecAFLoadSAM2", "models/sam2")
    assert any(folder in line and kind in line for line in said), said


def test_run_shows_the_result(opened):
    name, page = opened
    if "SAM3_Detect" in _types(name):
        pytest.skip(
            "ComfyUI fixes the sizes of SAM 3 in code: it cannot be tiny, and a frame takes minutes here; see case_sam3_takes_our_points"
        )
    # A random model may well say that it does not see it.
    prompts = {"AttentionToSAM2Prompts": {"threshold": 0.95, "presence_threshold": 0}}
    more = {"ExtractRolloutAttention": {"query": QUERY, "tokens_per_frame": 64}} | prompts
    set_widgets(page, {"LoadMLLM": {"model": "bundled"}} if name == QUICK else CHOICES | more)  # the test before chose no model
    assert press_run(page) == []
    shown = page.evaluate(
        """() => Object.fromEntries(window.app.graph._nodes.filter(node => node.imgs?.length || node.videoContainer?.childNodes.length)
            .map(node => [node.type, node.imgs?.[0]?.naturalWidth ?? 1]))"""
    )
    wanted = {"DecAFAttentionPreview"} | ({"DecAFShowObjects"} if "DecAFLoadSAM2" in _types(name) else {"MaskPreview"})
    assert wanted <= set(shown) and all(shown.values()), shown
    texts = page.evaluate(
        "window.app.graph._nodes.filter(node => node.type === 'PreviewAny').map(node => node.widgets.map(w => String(w.value)).join(' '))"
    )
    assert any(("object 0: score" if name == QUICK else QUERY) in text for text in texts), texts


def test_a_second_run_executes_nothing(opened, server):
    """After the test before has run it. Core's own Save Video runs again, once: it shows what it has saved, which the page takes for an
    input."""
    name, page = opened
    if "SAM3_Detect" in _types(name):
        pytest.skip("nothing was run before")
    ran = _executed(page, server)
    assert ran <= {"SaveVideo"}, ran
    if ran:
        assert _executed(page, server) == set()


def _executed(page, server) -> set[str]:
    """Presses Run: the types of the nodes that were not cached."""
    assert press_run(page) == []
    history = server.get("/history")
    entry = max(history.values(), key=lambda entry: entry["prompt"][0])
    messages = dict(entry["status"]["messages"])
    prompt, cached = entry["prompt"][2], messages["execution_cached"]["nodes"]
    return {node["class_type"] for key, node in prompt.items() if key not in cached}


def test_a_correction_runs_only_what_is_behind_it(browser, server):
    """In the quick start: Correct Objects between the objects and what shows them, a point typed into it, then another style and a pick."""
    with open_page(browser, server.url) as page:
        load_workflow(page, WORKFLOWS / f"{QUICK}.json")
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


def test_a_workflow_of_version_0_1_0_opens_and_runs(browser, server):
    with open_page(browser, server.url) as page:
        load_workflow(page, HERE / "saved" / "decaf_video_to_mask_0.1.0.json")
        more = {"ExtractRolloutAttention": {"query": QUERY, "tokens_per_frame": 64}, "AttentionToSAM2Prompts": {"threshold": 0.95}}
        set_widgets(page, CHOICES | more)
        assert press_run(page) == []
        assert _executed(page, server) <= {"SaveVideo"}, "its node of SAM 2 shows nothing any more"


def test_the_server_executes_it_anew(opened, server):
    name, page = opened
    set_widgets(page, {} if name == QUICK else CHOICES | {"ExtractRolloutAttention": {"query": QUERY, "tokens_per_frame": 64}})
    prompt = page.evaluate("window.app.graphToPrompt().then(made => made.output)")
    if "SAM3_Detect" in _types(name):
        prompt = _up_to_sam3(prompt)
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


def _up_to_sam3(prompt: dict) -> dict:
    """The workflow with the picture that SAM3 Detect would get shown in its place."""
    detect = next(node for node in prompt.values() if node["class_type"] == "SAM3_Detect")
    kept = {key: node for key, node in prompt.items() if node["class_type"] not in ("SAM3_Detect", "CheckpointLoaderSimple", "MaskPreview")}
    return kept | {"shown": {"class_type": "PreviewImage", "inputs": {"images": detect["inputs"]["image"]}}}


def _types(name: str) -> set[str]:
    return {node.type for column in SPECS[name].columns.values() for node in column.values()}


@pytest.mark.parametrize("name", SPECS)
def test_the_file_is_what_the_page_builds(browser, server, name):
    with open_page(browser, server.url) as page:
        made = build(page, name)
    stored = json.loads((WORKFLOWS / f"{name}.json").read_text())
    look = lambda graph: [(node["type"], node.get("widgets_values")) for node in sorted(graph["nodes"], key=lambda node: node["id"])]  # noqa: E731
    assert look(made) == look(stored) and len(made["links"]) == len(stored["links"])


def test_the_host_serves_templates_and_help(server):
    assert set(server.get("/workflow_templates")["ComfyUI-DecAF"]) == set(SPECS)
    for path in (f"/api/workflow_templates/ComfyUI-DecAF/{next(iter(SPECS))}.jpg", "/extensions/ComfyUI-DecAF/docs/LoadMLLM.md"):
        with urllib.request.urlopen(server.url + path) as answer:
            assert answer.status == 200 and answer.read()
    for name in SPECS:
        assert (WORKFLOWS / f"{name}.jpg").stat().st_size < 200_000
