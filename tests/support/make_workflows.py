"""Builds subgraphs/*.json, workflows/*.json and pictures of what these make in ComfyUI's page: `uv run python tests/support/make_workflows.py`."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import uuid
from dataclasses import asdict
from pathlib import Path

import torch
from comfy_host import PACK, WORKFLOWS, Server, find_host
from comfy_page import fit_view, open_browser, open_page
from PIL import Image
from playwright.sync_api import Page
from thumbnails import draw_thumbnail
from workflow_specs import ALIASES, BOXES
from workflow_specs import WORKFLOWS as SPECS

from decaf.clips import write_video
from decaf.demo.scenes import make_scene

SUBGRAPHS = PACK / "subgraphs"
_BUILD = Path(__file__).with_name("build_workflow.js").read_text(encoding="utf-8")
_IDS = uuid.UUID("6ad0a7b4-6d0f-4c7e-9a43-5d4f0d1d1b5e")


def build(page: Page, name: str) -> dict:
    """The workflow in UI format, as the page saves it."""
    return _built(page, name, {"workflow": asdict(SPECS[name]), "boxes": _boxes()})


def build_box(page: Page, title: str) -> dict:
    """A blueprint: a workflow whose one node is the box."""
    made = _built(page, title, {"workflow": None, "boxes": {title: _boxes()[title]}})
    return made | {"extra": {"BlueprintDescription": BOXES[title].description, "BlueprintSearchAliases": list(ALIASES)}}


def _boxes() -> dict:
    return {title: asdict(box) for title, box in BOXES.items()}


def _built(page: Page, name: str, wanted: dict) -> dict:
    page.evaluate(_BUILD, wanted)
    page.wait_for_timeout(1000)
    fit_view(page)
    text = page.evaluate("JSON.stringify(window.app.graph.serialize())")
    # The page draws ids by lot; files that are made again shall differ only where something has changed.
    drawn = dict.fromkeys(re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", text))
    for place, one in enumerate(drawn):
        text = text.replace(one, str(uuid.uuid5(_IDS, f"{name}/{place}")))
    made = json.loads(text)
    boxes = {one["id"]: one for one in made.get("definitions", {}).get("subgraphs", ())}
    for node in made["nodes"]:
        if node["type"] in boxes:
            _show_inside(node, boxes[node["type"]])
    return made


def _show_inside(node: dict, box: dict) -> None:
    """Has a box show what a node in it shows. The page has no function for it that a script could call."""
    spec = BOXES[box["name"]]
    shows = next(column[spec.shows].type for column in spec.columns.values() if spec.shows in column)
    (inner,) = [str(one["id"]) for one in box["nodes"] if one["type"] == shows]
    preview = "$$canvas-image-preview"
    node["properties"]["previewExposures"] = [{"name": preview, "sourceNodeId": inner, "sourcePreviewName": preview}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of workflows; without any, all are built, and the boxes")
    options = parser.parse_args()
    host = find_host()
    if isinstance(host, str):
        raise SystemExit(host)
    scene = make_scene(SEED, length=24)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        _fill(base, torch.from_numpy(scene.frames))
        with Server(host, base) as server, open_browser() as browser:
            for title in () if options.names else BOXES:
                with open_page(browser, server.url) as page:
                    _write(SUBGRAPHS / f"{title}.json", build_box(page, title))
            for name in options.names or SPECS:
                with open_page(browser, server.url) as page:
                    _write(WORKFLOWS / f"{name}.json", build(page, name))
                    prompt = page.evaluate("window.app.graphToPrompt().then(made => made.output)")
                draw_thumbnail(server, name, prompt, scene, WORKFLOWS / f"{name}.jpg")


def _write(file: Path, made: dict) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# What a person chooses in the workflows: widget values by node type.
CHOICES = {
    "LoadMLLM": {"model": "tiny_qwen2_5_vl"},
    "CLIPLoader": {"clip_name": "small_qwen3_vl_8b.safetensors"},
    "DecAFLoadSAM2": {"model": "tiny_sam2.safetensors"},
    "LoadVideo": {"file": "clip.mp4"},
    "LoadImage": {"image": "example.png"},
}

QUICK = "A First Try (No Download)"
"""Runs as it is saved: nothing is to be chosen in it."""

SEED = 3
"""Of the sample clip that the pictures show."""


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
