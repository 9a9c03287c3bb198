"""Inside ComfyUI on a GPU: the real server in each of its memory modes against its CPU mode, and cases of tests/host in its own Python."""

from __future__ import annotations

import ast
import os
import re
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
from comfy_base import make_base
from comfy_cases import Cases
from comfy_host import PACK, Host, HostBroken, Server, check_requirements, find_host
from PIL import Image

from .machine import Machine
from .promises import AT_LEAST, AT_MOST, TOLD, Check, Promise, Unsuitable

HOST_TESTS = PACK / "tests" / "host"

MODES = {
    "dynamic memory": ("--enable-dynamic-vram",),
    "--lowvram": ("--lowvram", "--disable-dynamic-vram"),
    "--novram": ("--novram",),
    "--highvram": ("--highvram",),
}

WHERE = re.compile(r"on cuda|to cuda|streamed from host memory")
"""What the log says of a model that a GPU computes."""

CORE_CASES = (
    "case_core_maps_of_a_clip_are_those_of_transformers",
    "case_core_maps_of_one_image_are_those_of_transformers",
    "case_core_maps_of_fp8_weights_are_those_of_the_dequantised",
    "case_core_maps_of_a_partly_loaded_model_are_the_same",
    "case_core_lora_on_the_clip_counts_like_one_that_is_merged",
)


def _host() -> Host:
    """Unsuitable: there is no ComfyUI here that runs."""
    found = find_host()
    if isinstance(found, str):
        raise Unsuitable(found)
    try:
        check_requirements(found)
    except HostBroken as reason:
        raise Unsuitable(str(reason)) from None
    return found


# -- the server --------------------------------------------------------------------------------------------------------------------------------


def server_promises(toy: bool) -> dict[str, Promise]:
    found = {}
    for mode in ("--cpu again",) if toy else MODES:
        found[f"{mode}: share of the heat maps' pixels that differ"] = Promise(0.001, AT_MOST, "error", "rounding")
        found[f"{mode}: share of the masks' pixels that differ"] = Promise(0.001, AT_MOST, "error", "rounding")
        found[f"{mode}: the log says that the GPU computes"] = Promise(1, TOLD if toy else AT_LEAST)
    return found


def server(machine: Machine) -> dict[str, float]:
    host, found = _host(), {}
    with tempfile.TemporaryDirectory() as folder:
        expected, _ = _pictures(host, Path(folder) / "cpu", ("--cpu",))
        modes = {"--cpu again": ("--cpu",)} if machine.toy else MODES
        for number, (mode, device) in enumerate(modes.items()):
            pictures, log = _pictures(host, Path(folder) / str(number), device)
            for kind, name in (("shown", "heat maps"), ("masks", "masks")):
                found[f"{mode}: share of the {name}' pixels that differ"] = differing(pictures[kind], expected[kind])
            found[f"{mode}: the log says that the GPU computes"] = bool(WHERE.search(log))
    return found


def differing(pictures: np.ndarray, others: np.ndarray) -> float:
    """Share of the numbers (0..255) that differ by more than a level, which rounding may."""
    if pictures.shape != others.shape:
        return 1.0
    return float((np.abs(pictures.astype(int) - others.astype(int)) > 1).mean())


def _pictures(host: Host, base: Path, device: tuple[str, ...]) -> tuple[dict[str, np.ndarray], str]:
    """Pictures (n, H, W, 3) that the nodes showed, by the key of the node in the graph, and the server's log."""
    # Convolutions in TF32, which PyTorch allows, would move the masks' edges.
    with patch.dict(os.environ, {"NVIDIA_TF32_OVERRIDE": "0"}), Server(host, base, device=device) as running:
        outputs = running.run(graph())
        pictures = {
            key: np.stack([np.asarray(Image.open(base / one["type"] / one["subfolder"] / one["filename"]).convert("RGB")) for one in out["images"]])
            for key, out in outputs.items()
            if key in ("shown", "masks")
        }
        return pictures, running.log


def graph() -> dict:
    """The whole method with the bundled models in float32, in ComfyUI's API form."""
    nodes = {
        "clip": ("DecAFSampleClip", {"clip_seed": 3, "kind": "any", "frames": 6}),
        "mllm": ("LoadMLLM", {"model": "bundled", "dtype": "fp32"}),
        "sam2": ("DecAFLoadSAM2", {"model": "bundled", "precision": "fp32"}),
        "extract": (
            "ExtractRolloutAttention",
            {
                "mllm": ["mllm", 0],
                "frames": ["clip", 0],
                "query": ["clip", 1],
                "setting": "expression",
                "max_key_frames": 16,
                "tokens_per_frame": 400,
            },
        ),
        "contrast": ("ObjectBackgroundFusion", {"object": ["extract", 0], "background": ["extract", 1]}),
        "fused": ("FrameFusion", {"attention": ["contrast", 0]}),
        "prompts": ("AttentionToSAM2Prompts", {"fused": ["fused", 0], "threshold": 0.8, "presence_threshold": 0.0}),
        "shown": ("DecAFAttentionPreview", {"frames": ["clip", 0], "fused": ["fused", 0], "prompts": ["prompts", 0]}),
        "propagate": (
            "SAM2VideoPropagate",
            {"sam2": ["sam2", 0], "frames": ["clip", 0], "prompts": ["prompts", 0], "score_threshold": 0.8},
        ),
        "mask": ("MaskToImage", {"mask": ["propagate", 0]}),
        "masks": ("PreviewImage", {"images": ["mask", 0]}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


# -- ComfyUI's own models ----------------------------------------------------------------------------------------------------------------------


def cases_promises(names: tuple[str, ...], toy: bool) -> dict[str, Promise]:
    return {f"{name.removeprefix('case_').replace('_', ' ')}": Promise(1, AT_LEAST) for name in names}


def cases(names: tuple[str, ...], machine: Machine) -> dict[str, float]:
    """Whether each of them passes, in float32, where both sides of its comparison are on the same device."""
    host, there = _host(), known_cases()
    if missing := [name for name in names if name not in there]:
        raise Unsuitable(f"tests/host has no {missing[0]}")
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        settings = {"pack": str(PACK), "base": str(base), "scratch": folder, "gpu": not machine.toy, "flags": ["force_fp32", "fp32_text_enc"]}
        inside = Cases([host.python, HOST_TESTS / "inside.py"], names, settings, Path(folder), env=host.environment())
        try:
            errors = {name: inside.error(name) for name in names}
        finally:
            inside.close()
    for name, error in errors.items():
        if error is not None:
            print(f"{name}: {error}")
    return {f"{name.removeprefix('case_').replace('_', ' ')}": float(errors[name] is None) for name in names}


def known_cases() -> set[str]:
    return {
        item.name
        for file in HOST_TESTS.glob("cases_*.py")
        for item in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(item, ast.FunctionDef) and item.name.startswith("case_")
    }


CHECKS = [
    Check("comfyui server", "ComfyUI's server with the bundled models in each memory mode, against --cpu", server_promises, server, 180),
    Check(
        "comfyui core",
        "ComfyUI's own language models on the GPU, against transformers",
        partial(cases_promises, CORE_CASES),
        partial(cases, CORE_CASES),
    ),
]
