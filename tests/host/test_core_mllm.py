"""A text encoder of ComfyUI as the multimodal LLM, in the real server: Load CLIP -> Extract Rollout Attention -> masks."""

from __future__ import annotations

import time

import pytest
from comfy_graph import node, whole_graph
from slow import slow_but
from small_core import FILES, folder_of


def graph(name: str, loader: str, query: str = "it") -> dict:
    """Every node of the pack at work, on the model from ComfyUI's loader, from ours by the file's name, or through transformers."""
    whole = whole_graph(["clip", 0])
    whole["mllm"] = {
        "clip": node("CLIPLoader", clip_name=FILES[name], type="qwen_image", device="default"),
        "file": node("LoadMLLM", model=FILES[name], dtype="auto"),
        "transformers": node("LoadMLLM", model=folder_of(name), dtype="fp32"),
    }[loader]
    whole["extract"]["inputs"]["query"] = query
    whole["said"] = node("PreviewAny", source=["extract", 2])
    return whole


@pytest.mark.parametrize("name", slow_but(FILES, list(FILES)[:1]))
def test_load_clip_to_masks(server, name):
    said = {}
    for loader in ("clip", "file", "transformers"):
        outputs = server.run(graph(name, loader))
        files = [file for key in ("shown", "mask") for file in outputs[key]["images"]]
        assert files and all((server.base / file["type"] / file["subfolder"] / file["filename"]).stat().st_size for file in files)
        said[loader] = outputs["said"]["text"]
    assert said["clip"] == said["file"] == said["transformers"] and "presence" in said["clip"][0]


def test_the_server_says_what_the_files_are(server):
    (options, more) = server.get("/object_info/LoadMLLM")["LoadMLLM"]["input"]["required"]["model"][:2]
    options = more.get("options", options)
    for name, file in FILES.items():
        family = "Qwen2.5-VL" if name == "qwen2_5_vl" else "Qwen3-VL"
        assert file in options and f"{file}: {family}" in more["tooltip"], more["tooltip"]
    assert server.get("/object_info/ExtractRolloutAttention")["ExtractRolloutAttention"]["input"]["required"]["mllm"][0] == "DECAF_MLLM,CLIP"


def test_another_encoder_is_refused_at_the_node(server):
    prompt = graph("qwen3_vl_8b", "clip")
    prompt["mllm"]["inputs"]["type"] = "flux2"
    entry = server.result(server.queue(prompt))
    (error,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    assert error["node_id"] == "extract" and error["exception_type"].endswith("DecafError")
    assert FILES["qwen3_vl_8b"] in error["exception_message"] and "qwen_image" in error["exception_message"]


@pytest.mark.slow
def test_a_loaded_model_goes_and_comes_back(server, request):
    """Load, run, unload, another model, and again: memory stays what it was, and ComfyUI's list of models shows ours."""
    cycles = 20 if request.config.getoption("--long") else 4
    held = []
    for cycle in range(cycles):
        for name in ("qwen3_vl_8b", "qwen2_5_vl"):
            server.run(graph(name, ("clip", "file")[cycle % 2], query=f"the {cycle}th square"))
        server.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1.5)
        held.append(resident(server))
    assert held[-1] - held[1] < 50, held


def resident(server) -> float:
    """Megabytes that the server's process has in memory."""
    with open(f"/proc/{server.process.pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
