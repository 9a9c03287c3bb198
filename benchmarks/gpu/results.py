"""What a GPU computes, against the CPU: the whole method with the bundled models, and the fused kernel of the rollout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from dense_rollout import relative
from torch import Tensor

from decaf import segment_clip
from decaf.attention import rollout
from decaf.attention.extract import extract_attention
from decaf.clips.base import clip_from_images
from decaf.demo import MLLM_FOLDER, SAM2_FILE
from decaf.demo.scenes import make_scene
from decaf.mllm import load_mllm
from decaf.pipeline import Result
from decaf.sam2 import load_sam2

from .machine import Machine
from .promises import AT_LEAST, AT_MOST, Check, Promise, Unsuitable

SCENE = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("float32", "float32, TF32 in convolutions", "bfloat16")
"""PyTorch lets convolutions round to TF32 unless it is told otherwise; the first mode forbids it."""

_MAPS = {"float32": 1e-4, "float32, TF32 in convolutions": 0.01, "bfloat16": 0.02}
_MASKS = {"float32": 0.999, "float32, TF32 in convolutions": 0.99, "bfloat16": 0.99}


def _scene(toy: bool):
    scene = make_scene(SCENE, length=4 if toy else 10)
    return clip_from_images(torch.from_numpy(scene.frames)), scene.queries[0].text


def _segmented(device: torch.device, dtype: torch.dtype, toy: bool) -> Result:
    clip, query = _scene(toy)
    mllm, sam2 = load_mllm(MLLM_FOLDER, device=device, dtype=dtype), load_sam2(SAM2_FILE, device=device, dtype=dtype)
    return segment_clip(mllm, sam2, clip, query)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def overlap(masks: Tensor, others: Tensor) -> float:
    """Intersection over union of (T, H, W) bool over the whole clip."""
    return float((masks & others).sum() / (masks | others).sum())


def pipeline_promises(toy: bool) -> dict[str, Promise]:
    found = {}
    for mode in MODES:
        bound = "bfloat16 on a CPU, 0.006" if mode == "bfloat16" else "rounding"
        found[f"{mode}: relative error of the fused map"] = Promise(_MAPS[mode], AT_MOST, "error", bound)
        bound = "bfloat16 on a CPU, 0.9994" if mode == "bfloat16" else "rounding"
        found[f"{mode}: overlap of the masks"] = Promise(_MASKS[mode], AT_LEAST, "share", bound)
        found[f"{mode}: difference of the presence"] = Promise(0.01, AT_MOST, "share")
    return found


def pipeline(machine: Machine) -> dict[str, float]:
    expected = _segmented(torch.device("cpu"), torch.float32, machine.toy)
    found = {}
    for mode in MODES:
        with _tf32("TF32" in mode):
            result = _segmented(machine.device, DTYPES[mode.split(",")[0]], machine.toy)
        found[f"{mode}: relative error of the fused map"] = relative(result.fused.map, expected.fused.map)
        found[f"{mode}: overlap of the masks"] = overlap(result.tracks.union(), expected.tracks.union())
        found[f"{mode}: difference of the presence"] = abs(result.object.presence - expected.object.presence)
    return found


def kernel_promises(toy: bool) -> dict[str, Promise]:
    return {
        **{f"{dtype}: relative error of a map, kernel against PyTorch": Promise(1e-4, AT_MOST, "error", "interpreter, 1e-6") for dtype in DTYPES},
        **{f"{dtype}: rollouts that the kernel made": Promise(2, AT_LEAST, "", "one per batch of pictures") for dtype in DTYPES},
    }


def kernel(machine: Machine) -> dict[str, float]:
    """Maps of the bundled model with the kernel and without it, on the same device. On a CPU Triton must be interpreting."""
    try:
        from decaf.attention import rollout_triton
    except Exception as error:  # whatever Triton raises where it does not work
        raise Unsuitable(f"Triton cannot be used here ({type(error).__name__}: {error})") from None
    clip, query = _scene(machine.toy)
    size = {"tokens_per_frame": 16, "max_key_frames": 2} if machine.toy else {}
    found = {}
    for name, dtype in DTYPES.items():
        mllm, made = load_mllm(MLLM_FOLDER, device=machine.device, dtype=dtype), []

        def roll_out(*arguments, original=rollout_triton.roll_out, made=made):
            rows = original(*arguments)
            made.append(rows is not None)
            return rows

        with patch.object(rollout, "fused_kernel", lambda device: None):
            expected = extract_attention(mllm, clip, query, **size)
        usable = patch.object(rollout, "fused_kernel", lambda device: rollout_triton) if machine.toy else nullcontext()
        # Its trial of itself rolls out too, and is not counted.
        with usable, patch.object(rollout_triton, "roll_out", roll_out), patch.object(rollout_triton, "agrees", lambda *_: True):
            result = extract_attention(mllm, clip, query, **size)
        pairs = [(getattr(one, kind), getattr(other, kind)) for one, other in zip(result, expected, strict=True) for kind in ("video", "frame")]
        found[f"{name}: relative error of a map, kernel against PyTorch"] = max(relative(*pair) for pair in pairs)
        found[f"{name}: rollouts that the kernel made"] = sum(made)
    return found


CHECKS = [
    Check("pipeline", "The whole method with the bundled models on the demo's clip, against the CPU in float32", pipeline_promises, pipeline),
    Check("kernel", "Maps with the fused rollout kernel, against PyTorch's rollout on the same device", kernel_promises, kernel),
]
