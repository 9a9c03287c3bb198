"""The workflows around ComfyUI's SAM 3: built in the real page, and executed on the real server by core's own nodes over a model that knows the
sample scene. The real one is fixed at a size that is too large for a test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfy_page import open_page, set_widgets
from make_workflows import build
from PIL import Image
from workflow_specs_sam3 import PICK
from workflow_specs_sam3 import WORKFLOWS as SPECS

from decaf.clips import write_video
from decaf.demo.scenes import make_scene

pytestmark = pytest.mark.slow

SEED, LENGTH = 12, 12


@pytest.fixture(scope="module")
def scene(base):
    made = make_scene(SEED, length=LENGTH)
    write_video(base / "input" / "scene.mp4", torch.from_numpy(made.frames), 12, made.frames.shape[1:3])
    return made


def prompt_of(browser, server, name, query):
    """The workflow in API form, as the page makes it of the graph: with a stand-in for the checkpoint."""
    with open_page(browser, server.url) as page:
        build(page, name)
        choices = {
            "LoadMLLM": {"model": "bundled"},
            "LoadVideo": {"file": "scene.mp4"},
            "ExtractRolloutAttention": {"query": query},
            "AttentionToSAM2Prompts": {"presence_threshold": 0},
            "DecAFPickTracks": {"presence_threshold": 0},
        }
        set_widgets(page, choices)
        prompt = page.evaluate("window.app.graphToPrompt().then(made => made.output)")
    for node in prompt.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            node |= {"class_type": "SceneSAM3", "inputs": {"seed": SEED, "length": LENGTH}}
        elif node["class_type"] == "CLIPTextEncode":
            assert isinstance(node["inputs"]["text"], list), "the class name is linked"
            node |= {"class_type": "SceneText", "inputs": {"text": node["inputs"]["text"]}}
    return prompt


def key_of(prompt, kind):
    (key,) = (key for key, node in prompt.items() if node["class_type"] == kind)
    return key


def masks_shown(server, outputs, key):
    files = outputs[key]["images"]
    return np.stack([np.asarray(Image.open(server.base / one["type"] / one["subfolder"] / one["filename"]).convert("L")) for one in files]) > 127


@pytest.mark.parametrize("name", SPECS)
def test_it_masks_what_the_query_means(browser, server, scene, name):
    """From the sentence to the mask of the clip: the true mask of the query's target, in every frame."""
    query = next(query for query in scene.queries if query.kind == "colour")
    prompt = prompt_of(browser, server, name, query.text)
    prompt["mask"] = {"class_type": "MaskPreview", "inputs": {"mask": [key_of(prompt, "DecAFPickTracks"), 0]}}
    outputs = server.run(prompt)
    found, truth = masks_shown(server, outputs, "mask"), scene.truth(query)
    assert found.shape == truth.shape
    iou = (found & truth).sum() / (found | truth).sum()
    assert iou > 0.97, f"J {iou:.3f}"
    told = [text for output in outputs.values() for text in output.get("text", [])]
    assert any(text.startswith("Picked object") and "match" in text for text in told), told
    videos = [output for output in outputs.values() if output.get("images") or output.get("video")]
    assert len(videos) >= 3, "the heat map, the objects, what was saved"


def test_another_query_picks_another_object_and_tracks_nothing_again(browser, server, scene):
    """SAM 3 runs again only if the name of the thing changes: its images, its model and its tracks do not depend on the sentence."""
    first, second = [query for query in scene.queries if query.kind == "colour"][:2]
    assert first.targets != second.targets
    prompt = prompt_of(browser, server, PICK, first.text)
    mask = {"class_type": "MaskPreview", "inputs": {"mask": [key_of(prompt, "DecAFPickTracks"), 0]}}
    text = key_of(prompt, "SceneText")
    prompt[text]["inputs"]["text"] = "shape"
    prompt["mask"] = mask
    server.run(prompt)
    prompt[key_of(prompt, "ExtractRolloutAttention")]["inputs"]["query"] = second.text
    entry = server.result(server.queue(prompt))
    assert entry["status"]["status_str"] == "success"
    cached = next(message[1]["nodes"] for message in entry["status"]["messages"] if message[0] == "execution_cached")
    assert {key_of(prompt, "SAM3_VideoTrack"), key_of(prompt, "DecAFFrameOfVideo"), text} <= set(cached)
    found, truth = masks_shown(server, entry["outputs"], "mask"), scene.truth(second)
    assert (found & truth).sum() / (found | truth).sum() > 0.97
