"""What a person sees in the page, in both of its designs: words on nodes, colours, and the remedy when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfy_host import Server, running
from comfy_page import load_workflow, open_page, press_run, set_widgets

pytestmark = pytest.mark.slow

SAVED = Path(__file__).parent / "saved" / "decaf_quick_start.json"
"""The method node by node, on a made-up clip."""

ABSENT = "the green triangle"
LINE = "$$node-text-preview"


@pytest.fixture(scope="module")
def server(host, tmp_path_factory):
    """With the pack in a folder of the name that the registry gives it, by which nothing may recognise it."""
    with running(Server(host, tmp_path_factory.mktemp("registry"), folder="comfyui-decaf"), tmp_path_factory.mktemp("bare")) as server:
        yield server


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes2"])
def opened(request, server, browser):
    """(page, console): the quick start asked for what its clip does not hold, besides what it does; it has run."""
    console = []
    with open_page(browser, server.url) as page:
        page.on("console", lambda line: console.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: console.append(str(error)))
        page.evaluate("on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", request.param)
        load_workflow(page, SAVED)
        page.evaluate(
            """() => {
                const node = window.app.graph._nodes.find(node => node.type === 'ExtractRolloutAttention')
                node.disconnectInput(node.findInputSlot('query'))
            }"""
        )
        set_widgets(page, {"ExtractRolloutAttention": {"query": f"the red circle\n{ABSENT}"}})
        assert press_run(page) == []
        yield page, console
        page.evaluate("() => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def lines(page) -> dict[str, str]:
    """What stands on the nodes, by type."""
    return page.evaluate(
        """name => Object.fromEntries(window.app.graph._nodes.flatMap(node => (node.widgets ?? [])
            .filter(widget => widget.name === name).map(widget => [node.type, widget.value])))""",
        LINE,
    )


def test_what_is_not_in_the_clip_stands_on_the_nodes(opened):
    page, _ = opened
    said = lines(page)
    for kind in ("AttentionToSAM2Prompts", "SAM2VideoPropagate", "DecAFShowObjects", "DecAFAttentionPreview"):
        assert f'"{ABSENT}" is not in this clip: presence 0.' in said[kind], said
    for kind in ("AttentionToSAM2Prompts", "SAM2VideoPropagate"):
        assert said[kind].startswith('"the red circle": ') and len(said[kind].splitlines()) == 2, "and what is of each query"
    assert page.get_by_text("is not in this clip", exact=False).count() >= 3, "it is drawn"


def test_a_step_leaves_no_words_behind(opened):
    page, _ = opened
    assert not {"LoadMLLM", "DecAFLoadSAM2"} & set(lines(page))


def test_the_heat_map_came_before_sam2(opened):
    page, _ = opened
    shown = page.evaluate(
        """() => window.app.graph._nodes.filter(node => node.type === 'DecAFAttentionPreview')
            .map(node => window.app.nodeOutputs[node.id].images.length)"""
    )
    assert shown == [2], "a picture for each query"


def test_a_second_run_executes_nothing(opened, server):
    """What stands on a node is no input of it."""
    page, _ = opened
    assert press_run(page) == []
    entry = max(server.get("/history").values(), key=lambda entry: entry["prompt"][0])
    cached = dict(entry["status"]["messages"])["execution_cached"]["nodes"]
    assert set(entry["prompt"][2]) == set(cached)
    assert "is not in this clip" in lines(page)["SAM2VideoPropagate"], "and it still stands there"


def test_it_is_not_saved(opened):
    page, _ = opened
    saved = json.dumps(page.evaluate("() => window.app.graph.serialize()"))
    assert "is not in this clip" not in saved


def colours(page) -> dict:
    return page.evaluate(
        """() => {
            const types = ['MLLM', 'SAM2', 'ATTENTION', 'FUSED_ATTENTION', 'PROMPTS', 'TRACKS'].map(name => 'DECAF_' + name)
            const style = document.documentElement.style
            return {
                links: types.map(type => window.LGraphCanvas.link_type_colors[type]),
                dots: types.map(type => window.app.canvas.default_connection_color_byType[type]),
                slots: types.map(type => style.getPropertyValue('--color-datatype-' + type)),
                nodes: Object.fromEntries(window.app.graph._nodes.map(node => [node.type, node.color])),
            }
        }"""
    )


def test_colours_tell_the_roles_apart_in_every_theme(opened):
    page, _ = opened
    for theme in ("dark", "light", "nord", "dark"):
        page.evaluate("theme => window.app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
        page.wait_for_timeout(700)
        found = colours(page)
        assert len(set(found["links"])) == 6 and found["links"] == found["dots"] == found["slots"], (theme, found)
        assert all(found["links"])
    nodes = found["nodes"]
    assert nodes["LoadMLLM"] == nodes["DecAFLoadSAM2"] != nodes["FrameFusion"] == nodes["ExtractRolloutAttention"]
    assert len({nodes[kind] for kind in ("LoadMLLM", "FrameFusion", "AttentionToSAM2Prompts", "SAM2VideoPropagate")}) == 4


def test_every_node_has_the_colour_of_a_role(opened, server):
    page, _ = opened
    kinds = [kind for kind, one in server.get("/object_info").items() if one["category"].startswith("DecAF")]
    given = page.evaluate("kinds => Object.fromEntries(kinds.map(kind => [kind, window.LiteGraph.createNode(kind).color ?? null]))", kinds)
    assert len(given) >= 18 and not [kind for kind, colour in given.items() if not colour], given


def test_a_colour_that_somebody_chose_stays(opened):
    page, _ = opened
    kept = page.evaluate(
        """async () => {
            const {app} = window, graph = app.graph.serialize()
            for (const node of graph.nodes) if (node.type === 'FrameFusion') Object.assign(node, {color: '#322', bgcolor: '#533'})
            await app.loadGraphData(graph)
            return app.graph._nodes.filter(node => node.type === 'FrameFusion').map(node => [node.color, node.bgcolor])
        }"""
    )
    assert kept == [["#322", "#533"]]


def test_the_remedy_is_in_a_toast(opened):
    page, _ = opened
    set_widgets(page, {"ExtractRolloutAttention": {"query": " "}})
    assert len(press_run(page)) == 1
    toasts = page.locator(".p-toast-message").filter(has_text="Extract Rollout Attention")
    toasts.first.wait_for(timeout=5000)
    assert toasts.count() == 1, "one message for one mistake"
    assert "query" in toasts.first.inner_text().lower() and "custom_validation" not in toasts.first.inner_text()
    set_widgets(page, {"ExtractRolloutAttention": {"query": "the red circle", "object_question": "Where is it?"}})
    said = press_run(page)
    wrong = page.locator(".p-toast-message").filter(has_text="{query}")
    wrong.first.wait_for(timeout=5000)
    assert wrong.count() == 1 and "{query}" in said[0] and "DecafError" not in wrong.first.inner_text()


def test_the_console_is_free_of_errors_of_ours(opened):
    _, console = opened
    # The page itself writes there what the server refused, and what a node raised.
    ours = [line for line in console if "DecAF" in line and "extensions/" in line or "TypeError" in line or "ReferenceError" in line]
    assert not ours, ours
