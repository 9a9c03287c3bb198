"""What Save Video with Alpha has written is dragged into the page, and its workflow is there again."""

from __future__ import annotations

import base64

import pytest
from comfy_host import WORKFLOWS
from comfy_page import DESIGNS, load_workflow, open_page, press_run, set_widgets
from make_workflows import QUICK

pytestmark = pytest.mark.slow

QUERY = "the blue square"


def drop(page, file) -> None:
    """From the desktop onto the canvas."""
    page.evaluate(
        """({name, type, data}) => {
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0))
            const dataTransfer = new DataTransfer()
            dataTransfer.items.add(new File([bytes], name, {type}))
            const canvas = window.app.canvas.canvas
            for (const kind of ['dragenter', 'dragover', 'drop'])
                canvas.dispatchEvent(new DragEvent(kind, {dataTransfer, bubbles: true, cancelable: true, clientX: 60, clientY: 500}))
        }""",
        {
            "name": file.name,
            "type": {".mov": "video/quicktime", ".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png"}[file.suffix],
            "data": base64.b64encode(file.read_bytes()).decode(),
        },
    )


def queries(page) -> list[str]:
    """Of all nodes that have one, those in boxes too."""
    return page.evaluate(
        """() => {
            const all = nodes => nodes.flatMap(node => [node, ...(node.subgraph ? all(node.subgraph.nodes) : [])])
            return all(window.app.graph._nodes).flatMap(node =>
                (node.widgets ?? []).filter(widget => widget.name === 'query').map(widget => widget.value))
        }"""
    )


def test_a_saved_file_opens_as_its_workflow(server, browser, base):
    folder = base / "output" / "dropped"
    with open_page(browser, server.url, design=DESIGNS[0]) as page:
        load_workflow(page, WORKFLOWS / f"{QUICK}.json")
        count = page.evaluate("() => window.app.graph._nodes.length")
        box = page.evaluate("() => window.app.graph._nodes.find(node => node.subgraph)?.title")
        for name, apply, save in (
            ("mov", {}, {}),
            ("webm", {"format": "webm (VP9)"}, {}),
            ("mp4", {"format": "auto", "effect": "blur"}, {}),
            ("png", {}, {"format": "PNG pictures"}),
        ):
            asked = {kind: {"query": QUERY} for kind in filter(None, [box, "ExtractRolloutAttention"])}
            set_widgets(page, asked | {"DecAFApplyMask": apply, "DecAFSaveCutOut": {"filename_prefix": f"dropped/{name}"} | save})
            assert press_run(page) == []
    for name in ("mov", "webm", "mp4", "png"):
        file = next(folder.glob(f"{name}_*"))
        with open_page(browser, server.url, design=DESIGNS[0]) as page:
            page.evaluate("() => window.app.graph.clear()")
            drop(page, file / "00000.png" if file.is_dir() else file)
            page.wait_for_function("count => window.app.graph._nodes.length === count", arg=count, timeout=20_000)
            assert QUERY in queries(page), name
            prefixes = page.evaluate(
                "() => window.app.graph._nodes.filter(node => node.type === 'DecAFSaveCutOut').map(node => node.widgets[0].value)"
            )
            assert prefixes == [f"dropped/{name}"]
