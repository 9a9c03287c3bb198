"""Square pictures of what a workflow makes, for the page's list of templates: from a real run with the bundled models."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from comfy_host import Server
from PIL import Image, ImageDraw, ImageFont
from workflow_specs import WORKFLOWS as SPECS

from decaf.demo.scenes import Scene
from decaf.finishing import read_with_alpha
from decaf.pictures.styles import on_checkerboard

SIDE = 400
FRAME = 8
_CHOSEN = {
    "LoadMLLM": {"model": "bundled"},
    "DecAFLoadSAM2": {"model": "bundled"},
    "LoadVideo": {"file": "clip.mp4"},
    "LoadImage": {"image": "example.png"},
}
_NOT_HERE = ("SAM3_Detect", "CheckpointLoaderSimple", "MaskPreview")


def draw_thumbnail(server: Server, name: str, prompt: dict, scene: Scene, path: Path) -> None:
    """Runs the workflow `prompt`, in API form, on the sample clip, and writes one frame of the result with the query below it."""
    query, shows = SPECS[name].query, SPECS[name].shows
    prompt = {key: node for key, node in prompt.items() if node["class_type"] not in _NOT_HERE}
    point = None
    for node in prompt.values():
        if node["class_type"] == "CLIPLoader":
            node.update(class_type="LoadMLLM", inputs={"dtype": "auto"})
        node["inputs"] |= _CHOSEN.get(node["class_type"], {})
        if "query" in node["inputs"]:
            node["inputs"]["query"] = query
        if node["class_type"] == "DecAFCorrectObjects":
            point = _middle(scene, "the yellow circle")
            marked = json.dumps([{"x": point[0], "y": point[1]}])
            node["inputs"] |= {"object": -1, "frame": FRAME, "positive_points": marked}
    outputs = server.run(prompt)
    keys = [key for key, node in prompt.items() if node["class_type"] == shows]
    key = min(keys, key=lambda key: ":" in key)  # rather one that is in no box
    if shows == "DecAFSaveCutOut":  # which shows the first frame of the file that it has saved
        file = max((server.base / "output" / "video").glob("*.mov"), key=lambda file: file.stat().st_mtime)
    else:
        made = outputs[key]["images"]
        one = made[min(FRAME, len(made) - 1)]
        file = server.base / one["type"] / one["subfolder"] / one["filename"]
    picture = _frame(file)
    if point:
        x, y = point
        ImageDraw.Draw(picture).ellipse((x - 6, y - 6, x + 6, y + 6), fill="#00b140", outline="white", width=2)
    _captioned(picture, query).save(path, quality=85, optimize=True)


def _frame(file: Path) -> Image.Image:
    """A picture, or a frame of a video; what is transparent on a checkerboard."""
    if file.suffix == ".png":
        pixels = np.array(Image.open(file))
    else:
        pixels = next(islice(read_with_alpha(file), FRAME, None))
    return Image.fromarray(on_checkerboard(torch.from_numpy(pixels)).numpy())


def _middle(scene: Scene, text: str) -> tuple[int, int]:
    """A point (x, y) in pixels on the object that is called so."""
    mask = scene.truth(next(query for query in scene.queries if query.text == text))[FRAME]
    ys, xs = mask.nonzero()
    return int(np.median(xs)), int(np.median(ys))


def _captioned(picture: Image.Image, query: str) -> Image.Image:
    square = Image.new("RGB", (SIDE, SIDE), "#16181d")
    height = round(picture.height * SIDE / picture.width)
    square.paste(picture.resize((SIDE, height), Image.Resampling.LANCZOS), (0, 0))
    font = ImageFont.load_default(size=30)
    ImageDraw.Draw(square).text((SIDE / 2, (SIDE + height) / 2), f"“{query}”", fill="white", font=font, anchor="mm")
    return square
