"""Builds workflows/*.json and their pictures in ComfyUI's own page: `uv run python tests/support/make_workflows.py`."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from comfy_host import WORKFLOWS, Server, find_host
from comfy_page import fit_view, load_workflow, open_browser, open_page, press_run, screenshot_graph, set_widgets
from PIL import Image
from playwright.sync_api import Page
from workflow_specs import WORKFLOWS as SPECS

from decaf.clips import write_video
from decaf.demo.scenes import make_scene

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SPECS), help="of workflows; without any, all are built")
    parser.add_argument("--seed", type=int, default=3, help="of the sample clip that the pictures are made of")
    options = parser.parse_args()
    scene = make_scene(options.seed, length=24)
    host = find_host()
    if isinstance(host, str):
        raise SystemExit(host)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        _fill(base, torch.from_numpy(scene.frames))
        with Server(host, base) as server, open_browser() as browser:
            for name in options.names:
                file = WORKFLOWS / f"{name}.json"
                with open_page(browser, server.url, (2600, 1400)) as page:
                    file.write_text(json.dumps(build(page, name), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                with open_page(browser, server.url, (2600, 1400)) as page:
                    load_workflow(page, file)
                    set_widgets(page, PICTURED | ({} if name == QUICK else {"ExtractRolloutAttention": {"query": scene.queries[0].text}}))
                    if not any(node.type in NOT_HERE for column in SPECS[name].columns.values() for node in column.values()):
                        problems = press_run(page)
                        if problems:
                            raise SystemExit(f"{name}: {problems}")
                    fit_view(page)
                    screenshot_graph(page, file.with_suffix(".jpg"), 1600)


# What a person chooses in the workflows: widget values by node type. For the pictures the models that come with the pack.
CHOICES = {
    "LoadMLLM": {"model": "tiny_qwen2_5_vl"},
    "CLIPLoader": {"clip_name": "small_qwen3_vl_8b.safetensors"},
    "DecAFLoadSAM2": {"model": "tiny_sam2.safetensors"},
    "LoadVideo": {"file": "clip.mp4"},
    "LoadImage": {"image": "example.png"},
}
PICTURED = {kind: values for kind, values in CHOICES.items() if kind != "CLIPLoader"} | {
    "LoadMLLM": {"model": "bundled"},
    "DecAFLoadSAM2": {"model": "bundled"},
}

NOT_HERE = ("CheckpointLoaderSimple", "CLIPLoader")
"""Loaders of models of which no small one knows the sample clip: their workflows are pictured as they open."""

QUICK = "decaf_quick_start"
"""Runs as it is saved: nothing is to be chosen in it."""


def _fill(base: Path, clip: torch.Tensor) -> None:
    """A clip and a picture, in the names of `CHOICES`."""
    inputs = base / "input"
    inputs.mkdir()
    write_video(inputs / "clip.mp4", clip, 12, clip.shape[1:3])
    Image.fromarray(clip[8].numpy()).save(inputs / "example.png")


def red_square(frames: int, height: int, width: int) -> torch.Tensor:
    """(frames, height, width, 3) uint8: a red square that crosses a grey gradient."""
    ramp = torch.linspace(60, 180, width).to(torch.uint8)
    clip = ramp[None, None, :, None].repeat(frames, height, 1, 3)
    side, step = height // 3, (width - height // 3) / max(frames, 2)
    for index in range(frames):
        left = int(index * step)
        clip[index, height // 3 : height // 3 + side, left : left + side] = torch.tensor([220, 30, 30], dtype=torch.uint8)
    return clip


if __name__ == "__main__":
    main()
