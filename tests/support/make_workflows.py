"""Builds workflows/*.json and their pictures in ComfyUI's own page: `uv run python tests/support/make_workflows.py`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from comfy_host import WORKFLOWS, Server, find_host
from comfy_page import fit_view, open_page
from playwright.sync_api import Page
from workflow_specs import WORKFLOWS as SPECS

# Nodes stand in columns, one group each; LiteGraph's node position is below its title bar of 30 pixels.
_BUILD = """
async spec => {
    const {app, LiteGraph} = window
    app.graph.clear()
    const TITLE = 30, GAP = 40, PAD = 24, nodes = {}
    let x = 0
    const place = (node, x, y) => { node.pos = [x, y + TITLE]; return y + TITLE + node.size[1] + GAP }
    const note = LiteGraph.createNode('MarkdownNote')
    app.graph.add(note)
    note.title = spec.title
    note.widgets[0].value = spec.note
    note.size = [320, 420]
    place(note, x, 0)
    x += 320 + GAP + PAD
    for (const [title, column] of Object.entries(spec.columns)) {
        let y = PAD + TITLE, width = 0, inside = []
        for (const [key, wanted] of Object.entries(column)) {
            const node = LiteGraph.createNode(wanted.type)
            if (!node) throw new Error('no node type ' + wanted.type)
            app.graph.add(node)
            for (const [name, value] of Object.entries(wanted.widgets)) {
                const widget = node.widgets.find(widget => widget.name === name)
                if (!widget) throw new Error(`${wanted.type} has no widget ${name}`)
                widget.value = value
            }
            const least = node.computeSize()
            node.setSize([Math.max(least[0], wanted.size[0]), Math.max(least[1], wanted.size[1])])
            width = Math.max(width, node.size[0])
            nodes[key] = node
            inside.push(node)
            y = place(node, x, y)
        }
        for (const node of inside) node.setSize([width, node.size[1]])
        const group = new LiteGraph.LGraphGroup(title)
        group.pos = [x - PAD, 0 - PAD + TITLE]
        group.size = [width + 2 * PAD, y - GAP + 2 * PAD - TITLE]
        app.graph.add(group)
        x += width + GAP + 2 * PAD
    }
    for (const link of spec.links) {
        const [[from, output], [to, input]] = link.split(' > ').map(end => end.split('.'))
        const source = nodes[from].outputs.findIndex(slot => slot.name === output || slot.label === output)
        const target = nodes[to].inputs.findIndex(slot => slot.name === input)
        if (source < 0 || target < 0 || !nodes[from].connect(source, nodes[to], target)) throw new Error('cannot link ' + link)
    }
    return nodes && Object.keys(nodes).length
}
"""


def build(page: Page, name: str) -> dict:
    """The workflow in UI format, as the page saves it."""
    page.evaluate(_BUILD, asdict(SPECS[name]))
    page.wait_for_timeout(1000)
    fit_view(page)
    return page.evaluate("window.app.graph.serialize()")


def main() -> None:
    host = find_host()
    if isinstance(host, str):
        raise SystemExit(host)
    with tempfile.TemporaryDirectory() as base, Server(host, Path(base)) as server, open_page(server.url) as page:
        for name in SPECS:
            (WORKFLOWS / f"{name}.json").write_text(json.dumps(build(page, name), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
