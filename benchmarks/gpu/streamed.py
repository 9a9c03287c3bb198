"""A model that is larger than its memory budget: weights come from host memory layer by layer, and the maps stay what they are."""

from __future__ import annotations

from unittest.mock import patch

import torch

from decaf.attention import batches
from decaf.attention.extract import extract_attention
from decaf.mllm.streaming import Streaming
from decaf.settings import MODES

from .. import mllm as stage
from .full_card import difference
from .machine import Machine
from .models import TOY, attention_needed, made, make_clip, settings_of, weight_bytes, without_weights
from .promises import AT_MOST, TOLD, Check, Promise

SHAPE = "7b"
BUDGET = 10_000_000_000
"""Bytes: what is left of a card of 12 GB beside a desktop and PyTorch itself. The weights alone are 17 GB."""


def promises(toy: bool) -> dict[str, Promise]:
    return {
        "peak, weights included": Promise(_toy_budget() if toy else BUDGET, AT_MOST, "bytes", "the budget"),
        "relative error of a map against the same model whole": Promise(1e-6, AT_MOST, "error", "equal to the bit"),
        "seconds": Promise(None, TOLD, "s"),
        "seconds over those of the model whole": Promise(None, TOLD, "times"),
    }


def _smallest_batches():
    """Within it, batches are as small as they may be: those of another size round otherwise."""
    return patch.multiple(batches, ENOUGH_TOKENS=0, ENOUGH_TOKENS_ON_CPU=0)


def _toy_budget() -> int:
    """Room for what the pass needs and the whole model, which is more than is needed."""
    empty = without_weights("toy", torch.float32)
    return attention_needed(empty, TOY, MODES[0], torch.device("cpu")) + weight_bytes(empty.model)


def run(machine: Machine) -> dict[str, float]:
    shape, dtype = (TOY, torch.float32) if machine.toy else (stage.SHAPES[SHAPE], torch.bfloat16)
    empty = without_weights("toy" if machine.toy else SHAPE, dtype)
    with _smallest_batches():
        needed = attention_needed(empty, shape, MODES[0], machine.device)
    machine.need(weight_bytes(empty.model) + needed)
    mllm, clip, settings = made(shape, machine.device, dtype), make_clip(shape), settings_of(shape, MODES[0])

    def attention():
        with _smallest_batches():
            return extract_attention(mllm, clip, stage.QUERY, settings)

    expected = attention()
    whole = machine.seconds(attention)
    mllm.model.to("cpu")
    with machine.memory.peak() as peak:
        mllm.streaming = Streaming(mllm.model, machine.device)
        # On a CPU the toy's layers are streamed one and all: there is no card on which some could stay.
        mllm.memory_budget = mllm.streaming.least_bytes + needed if machine.toy else BUDGET
        found = attention()
    seconds = machine.seconds(attention)
    return {
        "peak, weights included": peak.bytes,
        "relative error of a map against the same model whole": difference(found, expected),
        "seconds": seconds,
        "seconds over those of the model whole": seconds / whole,
    }


CHECKS = [
    Check(
        f"streamed {SHAPE}",
        f"MLLM stage of a Qwen2.5-VL-{SHAPE.upper()} with random weights in bfloat16 within a memory budget of {BUDGET / 1e9:.0f} GB",
        promises,
        run,
        200,
    )
]
