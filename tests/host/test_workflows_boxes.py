"""The boxes that the page offers beside the nodes: found by what people type, added by a click, connected and run, in both designs."""

from __future__ import annotations

import pytest
from comfy_page import IN_EACH_DESIGN, open_page, press_run, search_nodes, set_widgets
from make_workflows import CHOICES
from workflow_specs import ALIASES, IMAGE_BOX, VIDEO_BOX

QUERY = "the red square"

_CONNECT = """
([title, loader]) => {
    const {app, LiteGraph} = window, made = {}
    const box = app.graph._nodes.find(node => node.title === title)
    for (const type of [loader, 'LoadMLLM', 'DecAFLoadSAM2', 'MaskPreview', 'PreviewAny', 'PreviewImage'])
        app.graph.add(made[type] = LiteGraph.createNode(type))
    const into = name => box.inputs.findIndex(one => one.name === name), out = name => box.outputs.findIndex(one => one.name === name)
    made[loader].connect(0, box, into('frames'))
    made.LoadMLLM.connect(0, box, into('mllm'))
    made.DecAFLoadSAM2.connect(0, box, into('sam2'))
    box.connect(out('mask'), made.MaskPreview, 0)
    box.connect(out('report'), made.PreviewAny, 0)
    if (loader === 'LoadImage') box.connect(out('overlay'), made.PreviewImage, 0)
    else app.graph.remove(made.PreviewImage)
    return {widgets: box.widgets.map(widget => widget.name), outputs: box.outputs.map(one => one.name)}
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("title, loader", [(VIDEO_BOX, "LoadVideo"), (IMAGE_BOX, "LoadImage")])
@IN_EACH_DESIGN
def test_a_box_is_found_added_and_run(browser, server, design, title, loader):
    with open_page(browser, server.url, design=design) as page:
        page.evaluate("window.app.graph.clear()")
        assert title in search_nodes(page, "mask by text")[:2]
        page.get_by_test_id("result-item").filter(has_text=title).first.click()
        page.wait_for_timeout(1000)
        page.mouse.click(1200, 700)  # the page lets go of the node where one clicks
        page.wait_for_function("title => window.app.graph._nodes.some(node => node.title === title)", arg=title)
        found = page.evaluate(_CONNECT, [title, loader])
        assert found["widgets"] == ["query", "not_this", "targets", "score_threshold", "max_objects", "grow", "feather"]
        assert found["outputs"] == ["mask", "overlay", "cut_out", "refined", "tracks", "report"]
        inside = {"ExtractRolloutAttention": {"tokens_per_frame": 64}, "AttentionToSAM2Prompts": {"threshold": 0.95, "presence_threshold": 0}}
        set_widgets(page, CHOICES | inside | {title: {"query": QUERY, "feather": 3}})
        assert press_run(page) == []
        entry = max(server.get("/history").values(), key=lambda entry: entry["prompt"][0])
        prompt = {node["class_type"]: node["inputs"] for node in entry["prompt"][2].values()}
        assert prompt["ExtractRolloutAttention"]["query"] == QUERY and prompt["DecAFRefineMask"]["feather"] == 3
        reports = [text for output in entry["outputs"].values() for text in output.get("text", ())]
        assert any("object 0: score" in str(text) for text in reports), reports
        assert "DecAFApplyMask" not in prompt or loader == "LoadVideo"
        # Nobody takes the cut-out, so none is made.
        assert not any(key for key, value in entry["outputs"].items() if entry["prompt"][2][key]["class_type"] == "DecAFApplyMask")


FIRST = {"matte": 14}
"""How far down the page's list ours may begin. The page puts often used nodes of ComfyUI whose names look like the word, such as "Math Expression",
before whatever has the word itself as an alias; of "matte" there are ten."""


@pytest.mark.slow
def test_what_people_type_finds_one_of_ours(browser, server):
    ours = {one["display_name"] for one in server.get("/object_info").values() if one["category"].startswith("DecAF")} | {VIDEO_BOX, IMAGE_BOX}
    with open_page(browser, server.url) as page:
        page.evaluate("window.app.graph.clear()")
        found = {words: search_nodes(page, words)[: FIRST.get(words, 10)] for words in ALIASES}
    assert [words for words, titles in found.items() if not ours & set(titles)] == [], found
    both = ("rotoscope", "cut out", "remove background", "video segmentation", "prompt to mask", "find object", "text to mask")
    assert [words for words in both if not {VIDEO_BOX, IMAGE_BOX} <= set(found[words])] == [], found
