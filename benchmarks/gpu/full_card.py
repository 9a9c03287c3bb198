"""What happens on a card that is really full: batches are halved and nothing else changes, or a sentence says what to lower."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch
from dense_rollout import relative

from decaf.attention import batches
from decaf.attention.extract import extract_attention
from decaf.clips.base import Clip
from decaf.devices import OutOfMemoryError
from decaf.mllm import MLLM
from decaf.settings import MODES, AttentionSettings

from .. import mllm as stage
from .. import sam2
from .machine import Machine
from .models import TOY, SecondTries, made, make_clip, settings_of, weight_bytes, without_weights
from .promises import AT_LEAST, AT_MOST, TOLD, Check, Promise, Unsuitable

SHAPE = "0.5b"
"""In float32, so that batches of another size round alike."""


# -- the MLLM stage ----------------------------------------------------------------------------------------------------------------------------


def attention_promises(toy: bool) -> dict[str, Promise]:
    return {
        "key frames in the first batch": Promise(2, AT_LEAST),
        "batches that did not fit": Promise(1, AT_LEAST),
        "key frames in the smallest batch": Promise(None, TOLD),
        "relative error of a map": Promise(1e-4, AT_MOST, "error", "rounding"),
        "where one key frame does not fit, a sentence says what to lower": Promise(1, AT_LEAST),
        "relative error of a map when there is room again": Promise(1e-5, AT_MOST, "error", "nothing is left of the failure"),
    }


class _Frames:  # watched where their pixels are made, which a CPU counts too
    """A run whose single frames are watched. `batches`: frames in each batch that was tried; `peak`: bytes from the first of them on."""

    def __init__(self, machine: Machine, mllm: MLLM, clip: Clip, settings: AttentionSettings, room: int | None = None):
        """With `room`, only so many bytes are left when the first batch of frames comes, after it was planned: as if another program took them."""
        self.batches: list[int] = []
        pixels = mllm.family.pixels
        with ExitStack() as stack:

            def watched(mllm, layout, frames):
                if layout.kind == "image":
                    if not self.batches:
                        self._peak = stack.enter_context(machine.memory.peak() if room is None else machine.memory.leave(room))
                    self.batches.append(layout.batch)
                return pixels(mllm, layout, frames)

            with patch.object(mllm.family, "pixels", watched):
                self.found = extract_attention(mllm, clip, stage.QUERY, settings)

    @property
    def peak(self) -> int:
        return self._peak.bytes


def attention(machine: Machine) -> dict[str, float]:
    shape = TOY if machine.toy else stage.SHAPES[SHAPE]
    machine.need(weight_bytes(without_weights("toy" if machine.toy else SHAPE, torch.float32).model) + (4 << 30))
    mllm = made(shape, machine.device, torch.float32)
    frames = partial(_Frames, machine, mllm, make_clip(shape), settings_of(shape, MODES[0]))
    planned = frames()  # kernels are compiled and libraries loaded by the first call
    planned = frames()
    with patch.multiple(batches, ENOUGH_TOKENS=0, ENOUGH_TOKENS_ON_CPU=0):
        smaller = frames()
    if planned.peak < 1.2 * smaller.peak:
        raise Unsuitable(f"{planned.batches[0]} frames take hardly more than {smaller.batches[0]}: nothing can be halved")
    with SecondTries() as tries:
        halved = frames((planned.peak + smaller.peak) // 2)
    sentence = 0
    try:
        frames(smaller.peak // 20)
    except OutOfMemoryError as error:
        sentence = int("Lower the tokens per frame or the number of key frames" in str(error))
    return {
        "key frames in the first batch": planned.batches[0],
        "batches that did not fit": tries.count,
        "key frames in the smallest batch": min(halved.batches),
        "relative error of a map": difference(halved.found, planned.found),
        "where one key frame does not fit, a sentence says what to lower": sentence,
        "relative error of a map when there is room again": difference(frames().found, planned.found),
    }


def difference(found, expected) -> float:
    """The largest relative error of a map, of two pairs of object and background attention."""
    pairs = [(getattr(one, kind), getattr(other, kind)) for one, other in zip(found, expected, strict=True) for kind in ("video", "frame")]
    return max(relative(*pair) for pair in pairs)


# -- the SAM 2 stage ---------------------------------------------------------------------------------------------------------------------------


def sam2_promises(toy: bool) -> dict[str, Promise]:
    return {
        "steps that did not fit": Promise(1, AT_LEAST),
        "smallest overlap of an object's masks": Promise(0.98, AT_LEAST, "share"),
        "where nothing fits, a sentence says what to do": Promise(1, AT_LEAST),
    }


def segmenter(machine: Machine) -> dict[str, float]:
    case = sam2.Case("bundled", 4, 3, (64, 80)) if machine.toy else sam2.Case("large", 16, 4, (480, 854))
    inputs = sam2.prepare_ours(str(machine.device), case)
    expected, _ = sam2.ours(*inputs)
    with machine.memory.peak() as peak:
        sam2.ours(*inputs)
    found, tries = None, None
    for share in (0.9, 0.8, 0.7, 0.6, 0.5):  # how much smaller the second try is, only the try tells
        with SecondTries() as now, machine.memory.leave(int(peak.bytes * share)):
            try:
                masks, _ = sam2.ours(*inputs)
            except OutOfMemoryError:
                break
        if now.count:
            found, tries = masks, now
            break
    if found is None:
        raise Unsuitable("there is no room in which the first try fails and the second does not")
    sentence = 0
    with machine.memory.leave(peak.bytes // 50):
        try:
            sam2.ours(*inputs)
        except OutOfMemoryError as error:
            sentence = int("memory ran out during" in str(error))
    return {
        "steps that did not fit": tries.count,
        "smallest overlap of an object's masks": min(sam2.overlap(found, expected)),
        "where nothing fits, a sentence says what to do": sentence,
    }


CHECKS = [
    Check(
        "full card attention",
        "MLLM stage of half a billion random weights, while another program takes the card's memory",
        attention_promises,
        attention,
        180,
    ),
    Check("full card sam2", "SAM 2 stage of a random SAM 2.1 large on a card that is nearly full", sam2_promises, segmenter),
]
