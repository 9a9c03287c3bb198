"""Real shapes with random weights: what a stage takes and how long, against what is computed."""

from __future__ import annotations

import logging
from functools import cache, partial

import torch
from torch import nn

from decaf.attention.batches import ENOUGH_TOKENS, ENOUGH_TOKENS_ON_CPU, FEW_TEXT_TOKENS, memory_needed, pass_bytes
from decaf.attention.extract import extract_attention
from decaf.clips.base import Clip, clip_from_images
from decaf.demo.scenes import make_scene
from decaf.mllm import MLLM
from decaf.mllm.engine import ATTENTION
from decaf.settings import MODES, AttentionSettings
from decaf.tracking import memory_needed as tracking_memory_needed

from .. import mllm as stage
from .. import sam2
from .machine import Machine
from .promises import ABOUT, AT_MOST, TOLD, Check, Promise

TOY = stage.Shape(
    {"intermediate_size": 128, "vocab_size": 1024},
    {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "fullatt_block_indexes": [1]},
    4, 4, 2, 64, tokens_per_frame=12, frame_size=(84, 112), frames=3,
)  # fmt: skip

OVER_PREFILL = 1.5
"""The MLLM stage over a plain prefill of its pictures. On a CPU it was 1.13 with a small model and short prompts."""


class SecondTries(logging.Handler):
    """`with SecondTries() as tries:` counts how often a stage of decaf went on with less because memory had run out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += any(words in record.getMessage() for words in ("Memory ran out", "ran out of memory"))

    def __enter__(self) -> SecondTries:
        logging.getLogger("decaf").addHandler(self)
        return self

    def __exit__(self, *_) -> None:
        logging.getLogger("decaf").removeHandler(self)


def make_clip(shape: stage.Shape) -> Clip:
    return clip_from_images(torch.from_numpy(make_scene(1, size=shape.frame_size, length=shape.frames, lively=False).frames))


def made(shape: stage.Shape, device: torch.device, dtype: torch.dtype) -> MLLM:
    """A random model, prepared as a loaded one."""
    mllm = stage.build(shape, str(device), ATTENTION, dtype)
    mllm.family.prepare(mllm.model)
    return mllm


@cache
def without_weights(shape_name: str, dtype: torch.dtype = torch.bfloat16) -> MLLM:
    shape = TOY if shape_name == "toy" else stage.SHAPES[shape_name]
    return stage.build(shape, "meta", ATTENTION, dtype)


def weight_bytes(model: nn.Module) -> int:
    return sum(one.nbytes for one in model.parameters())


def settings_of(shape: stage.Shape, setting: str) -> AttentionSettings:
    return AttentionSettings(setting=setting, max_key_frames=shape.frames, tokens_per_frame=shape.tokens_per_frame)


def attention_needed(mllm: MLLM, shape: stage.Shape, setting: str, device: torch.device) -> int:
    """Bytes that are said to be needed on the device; `mllm` may be one without weights."""
    return memory_needed(mllm, shape.frames, shape.frame_size, settings_of(shape, setting), queries=[stage.QUERY], device=device)


def attention_at_most(mllm: MLLM, shape: stage.Shape, setting: str, device: torch.device) -> int:
    """Bytes that it takes where nothing is short: key frames go through the model in batches as large as they ever are."""
    enough = ENOUGH_TOKENS_ON_CPU if device.type == "cpu" else ENOUGH_TOKENS
    video = mllm.family.video_layout(mllm.vision, shape.frame_size, [0.0] * shape.frames, shape.tokens_per_frame)
    one = mllm.family.image_layout(mllm.vision, shape.frame_size, 1, shape.tokens_per_frame)
    frames = min(shape.frames, max(1, max(video.tokens, enough) // one.tokens))
    images = mllm.family.image_layout(mllm.vision, shape.frame_size, frames, shape.tokens_per_frame)
    keep, start = setting != MODES[0], mllm.layers // 2
    passes = [pass_bytes(mllm, layout, FEW_TEXT_TOKENS, start, 1, keep=keep, device=device) for layout in (video, images)]
    # On a CPU what waits for the background question is in the same memory.
    return max(passes) + (attention_needed(mllm, shape, setting, device) if keep and device.type == "cpu" else 0)


# -- the MLLM stage ----------------------------------------------------------------------------------------------------------------------------


def _shape(name: str, toy: bool) -> tuple[str, stage.Shape]:
    return ("toy", TOY) if toy else (name, stage.SHAPES[name])


def attention_promises(name: str, toy: bool) -> dict[str, Promise]:
    name, shape = _shape(name, toy)
    dtype = torch.float32 if toy else torch.bfloat16
    mllm = without_weights(name, dtype)
    device, estimate = (torch.device("cpu"), AT_MOST) if toy else (torch.device("cuda"), ABOUT)
    found = {
        "weights": Promise(weight_bytes(mllm.model), ABOUT, "bytes", "sizes of the tensors"),
        "seconds": Promise(None, TOLD, "s"),
        "seconds of a plain prefill of the pictures": Promise(None, TOLD, "s"),
        # Toy prompts are nearly all question.
        "seconds over those of the prefill": Promise(OVER_PREFILL, TOLD if toy else AT_MOST, "times", "1.13 on a CPU"),
    }
    for setting in MODES:
        found |= {
            f"{setting}: peak beside the weights, in the room that is asked for": Promise(
                attention_needed(mllm, shape, setting, device), estimate, "bytes", "decaf.attention.batches.memory_needed"
            ),
            f"{setting}: second tries in that room": Promise(0, AT_MOST),
            f"{setting}: peak beside the weights, on a free card": Promise(
                attention_at_most(mllm, shape, setting, device), AT_MOST, "bytes", "batches of ENOUGH_TOKENS"
            ),
        }
    return found


def attention(name: str, machine: Machine) -> dict[str, float]:
    name, shape = _shape(name, machine.toy)
    dtype = torch.float32 if machine.toy else torch.bfloat16
    empty = without_weights(name, dtype)
    needed = {setting: attention_needed(empty, shape, setting, machine.device) for setting in MODES}
    machine.need(weight_bytes(empty.model) + max(needed.values()))
    clip, found = make_clip(shape), {}
    with machine.memory.peak() as peak:
        mllm = made(shape, machine.device, dtype)
    found["weights"] = weight_bytes(mllm.model)
    if not machine.toy and peak.bytes < found["weights"]:
        raise AssertionError("the weights are not on the GPU")

    def run(setting: str) -> None:
        extract_attention(mllm, clip, stage.QUERY, settings_of(shape, setting))

    for setting in MODES:
        run(setting)  # kernels are compiled and libraries loaded by the first call
        with machine.memory.peak() as peak:
            run(setting)
        found[f"{setting}: peak beside the weights, on a free card"] = peak.bytes
        with SecondTries() as tries, machine.memory.leave(needed[setting]), machine.memory.peak() as peak:
            run(setting)
        found[f"{setting}: peak beside the weights, in the room that is asked for"] = peak.bytes
        found[f"{setting}: second tries in that room"] = tries.count
    found["seconds"] = machine.seconds(run, MODES[0])
    mllm.engine.text_tower.set_attn_implementation("sdpa")
    stage.prefill(mllm, clip, shape)
    plain = found["seconds of a plain prefill of the pictures"] = machine.seconds(stage.prefill, mllm, clip, shape)
    found["seconds over those of the prefill"] = found["seconds"] / plain
    return found


# -- the SAM 2 stage ---------------------------------------------------------------------------------------------------------------------------


def _case(name: str, toy: bool) -> sam2.Case:
    return sam2.Case("bundled", 4, 2, (64, 80)) if toy else sam2.Case(name, 32 if name == "large" else 100, 3, (480, 854))


@cache
def _sam2_needed(shape: str, length: int, device: str) -> int:
    return tracking_memory_needed(sam2.build(shape, "cpu"), torch.device(device), length)


def sam2_promises(name: str, toy: bool) -> dict[str, Promise]:
    case = _case(name, toy)
    needed = _sam2_needed(case.shape, case.length, "cpu" if toy else "cuda")
    return {
        "seconds": Promise(None, TOLD, "s"),
        "peak beside the weights, in the room that is asked for": Promise(
            needed, AT_MOST if toy else ABOUT, "bytes", "decaf.tracking.memory_needed"
        ),
        "second tries in that room": Promise(0, AT_MOST),
        "peak beside the weights, on a free card": Promise(needed, AT_MOST, "bytes"),
    }


def segmenter(name: str, machine: Machine) -> dict[str, float]:
    case = _case(name, machine.toy)
    needed = _sam2_needed(case.shape, case.length, str(machine.device))
    machine.need(needed)
    inputs, found = sam2.prepare_ours(str(machine.device), case), {}
    sam2.ours(*inputs)  # the first call tries the fast steps as well
    with machine.memory.peak() as peak:
        sam2.ours(*inputs)
    found["peak beside the weights, on a free card"] = peak.bytes
    found["seconds"] = machine.seconds(sam2.ours, *inputs)
    with SecondTries() as tries, machine.memory.leave(needed), machine.memory.peak() as peak:
        sam2.ours(*inputs)
    found["peak beside the weights, in the room that is asked for"] = peak.bytes
    found["second tries in that room"] = tries.count
    return found


def _check(kind: str, name: str, title: str, promises, run, seconds: int = 120) -> Check:
    return Check(f"{kind} {name}", title, partial(promises, name), partial(run, name), seconds)


CHECKS = [
    *(
        _check(
            "attention", name, f"MLLM stage of a Qwen2.5-VL-{name.upper()} with random weights in bfloat16: 16 key frames of 720p, 400 tokens each",
            attention_promises, attention, 200,
        )  # fmt: skip
        for name in ("3b", "7b")
    ),
    *(
        _check(
            "sam2", name, f"SAM 2 stage of a SAM 2.1 {name} with random weights: {_case(name, False).length} frames of 480 x 854, 3 tracklets",
            sam2_promises, segmenter,
        )  # fmt: skip
        for name in ("tiny", "large")
    ),
]
