"""Names and tooltips of the nodes in the language of the page, in both of its designs."""

import json
import urllib.request

import pytest
from comfy_host import WORKFLOWS
from comfy_page import load_workflow, open_page
from recorded import flat, read_texts

pytestmark = pytest.mark.slow

LANGUAGE = "fr"
SAVED = WORKFLOWS / "Step by Step (Video).json"


@pytest.fixture(params=[False, True], ids=["canvas", "new design"])
def page(request, server, browser):
    settings = {"Comfy.Locale": LANGUAGE, "Comfy.VueNodes.Enabled": request.param}
    store(server, settings)
    try:
        with open_page(browser, server.url) as page:
            load_workflow(page, SAVED)
            yield page
    finally:
        store(server, {"Comfy.Locale": "en", "Comfy.VueNodes.Enabled": False})


def store(server, settings):
    request = urllib.request.Request(f"{server.url}/settings", json.dumps(settings).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request).read()


def shown(page) -> dict:
    """What the page calls the nodes of the pack and their inputs and outputs, in the form of `nodeDefs.json`."""
    return page.evaluate(
        """() => {
            const name = slot => ({name: slot.label ?? slot.localized_name ?? slot.name})
            const ours = window.app.graph._nodes.filter(node => node.constructor.nodeData?.category === 'DecAF')
            return Object.fromEntries(ours.map(node => [node.type, {
                display_name: node.title,
                inputs: Object.fromEntries([
                    ...node.inputs.map(slot => [slot.name, name(slot)]),
                    ...(node.widgets ?? []).map(one => [one.name, {name: one.label ?? one.name}]),
                ]),
                outputs: Object.fromEntries(node.outputs.map((slot, number) => [number, name(slot)])),
            }]))
        }"""
    )


def test_a_saved_workflow_in_another_language(page):
    texts, found = read_texts(LANGUAGE), flat(shown(page))
    found = {path: text for path, text in found.items() if path in texts or path.endswith("_name")}
    assert len(found) > 60 and {path: (text, texts[path]) for path, text in found.items() if text != texts[path]} == {}


def test_a_name_that_the_user_gave_stays(page):
    page.evaluate(
        """async () => {
            const node = window.app.graph._nodes.find(node => node.type === 'DecAFShowObjects')
            node.inputs.find(input => input.name === 'frames').label = 'my clip'
            await window.app.loadGraphData(window.app.graph.serialize())
        }"""
    )
    assert shown(page)["DecAFShowObjects"]["inputs"]["frames"]["name"] == "my clip"
