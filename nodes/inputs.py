"""What came in on a node's inputs, looked at in one place before the node runs.

ComfyUI checks the values that are typed into a node. It does not check what its API puts on a socket, the range of a number that comes over
a link, nor what comes from an output of any type; and it lets NaN pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from comfy_api.latest import io

from ..decaf import data
from ..decaf.errors import DecafError
from ..decaf.mllm.base import MLLM as LoadedMLLM
from ..decaf.sam2 import SAM2 as LoadedSAM2
from . import host, sockets
from .core_mllm import is_clip
from .interop import brief


class _Socket(NamedTuple):
    takes: Callable[[object], bool]
    needs: str
    connect: str


def _managed(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, host.Managed) and isinstance(value.value, kind)


def _record(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


_SOCKETS = {
    f"{sockets.MLLM.io_type},{io.Clip.io_type}": _Socket(
        lambda value: is_clip(value) or _managed(LoadedMLLM)(value), "a multimodal LLM", "Load Multimodal LLM or Load CLIP"
    ),
    sockets.SAM2.io_type: _Socket(_managed(LoadedSAM2), "a SAM 2 model", "Load SAM 2"),
    sockets.Attention.io_type: _Socket(
        _record(data.Attention), "an attention", "Extract Rollout Attention or Subtract Background Attention"
    ),
    sockets.FusedAttention.io_type: _Socket(_record(data.FusedAttention), "a fused attention", "Fuse Video and Frame Attention"),
    sockets.Prompts.io_type: _Socket(_record(data.SAM2Prompts), "prompts", "Turn Attention into Prompts"),
    sockets.Tracks.io_type: _Socket(_record(data.Tracks), "tracks", "Propagate with SAM 2"),
    io.Mask.io_type: _Socket(_record(torch.Tensor), "a mask", "a node that makes masks"),
    io.BoundingBox.io_type: _Socket(_record(dict | list | tuple), "a box", "a node that makes a box"),
    f"{io.Image.io_type},{io.Video.io_type}": _Socket(
        lambda value: isinstance(value, torch.Tensor) or _is_video(value), "images or a video", "a node that loads images or a video"
    ),
    f"{sockets.SAM3TrackData.io_type},{sockets.Tracks.io_type},{io.Mask.io_type}": _Socket(
        lambda value: isinstance(value, data.Tracks)
        or (isinstance(value, torch.Tensor) and value.ndim in (2, 3))
        or (isinstance(value, dict) and "packed_masks" in value),
        "tracks of objects or masks",
        "Run SAM3 Video Track, Propagate with SAM 2, or a node that makes masks",
    ),
    io.Video.io_type: _Socket(lambda value: _is_video(value), "a video", "Apply Mask (Video), or a node that loads a video"),
    **dict.fromkeys(
        (f"{sockets.Tracks.io_type},{io.Mask.io_type}", io.MatchType.io_type),  # the only kinds that are matched are these two
        _Socket(
            lambda value: isinstance(value, data.Tracks) or (isinstance(value, torch.Tensor) and value.ndim in (2, 3)),
            "tracks or a mask",
            "Propagate with SAM 2, or a node that makes masks",
        ),
    ),
}


def _is_video(value: object) -> bool:
    return callable(getattr(value, "get_components", None))


def checked(execute):
    """Decorates `execute` of a node: its inputs are checked first, and an optional one that holds nothing counts as left out."""

    @functools.wraps(execute)
    def run(cls, **inputs):
        return execute(cls, **_checked(cls, inputs))

    return run


def _checked(cls: type[io.ComfyNode], inputs: Mapping[str, object]) -> dict[str, object]:
    """DecafError: an input holds what the node cannot take."""
    schema = cls.SCHEMA or cls.GET_SCHEMA()
    kept = {}
    for item in schema.inputs:
        value = inputs.get(item.id)
        if value is None and item.optional:
            continue
        # A node that takes whole lists gets every input as one; an empty one holds nothing.
        for one in (value or [None]) if schema.is_input_list and isinstance(value, list) else [value]:
            problem = _problem(item, one, _checked_by_itself(cls))
            if problem:
                raise DecafError(f"{schema.display_name} was given {shown(one)} as '{item.id}', {problem}")
        kept[item.id] = value
    return kept


def _checked_by_itself(cls: type[io.ComfyNode]) -> set[str]:
    """Inputs whose values the node judges itself, as ComfyUI has it too: those that its `validate_inputs` takes."""
    return set(inspect.signature(cls.validate_inputs).parameters)


def _problem(item: io.Input, value: object, left_to_node: set[str]) -> str | None:
    """How the sentence goes on that began with the value, or None if the input takes it."""
    socket = _SOCKETS.get(item.get_io_type())
    if socket is not None:
        return None if socket.takes(value) else f"which takes {socket.needs}. Connect {socket.connect} to it."
    if isinstance(item, io.Int.Input | io.Float.Input):
        whole = isinstance(item, io.Int.Input)
        fits = isinstance(value, int if whole else int | float) and item.min <= value <= item.max  # never true of NaN
        return None if fits else f"which takes a {'whole ' * whole}number from {item.min:g} to {item.max:g}. Give such a number."
    if isinstance(item, io.Boolean.Input):
        return None if isinstance(value, bool) else "which takes true or false. Give one of them."
    if not isinstance(value, str):
        return "which takes a text. Give one."
    if isinstance(item, io.Combo.Input) and item.id not in left_to_node and value not in item.options:
        return f"which takes one of {', '.join(item.options)}. Choose one of them."
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        return "which takes a text, and this holds halves of letters (surrogates) that are no text in UTF-8. Type it anew."
    return None


def shown(value: object) -> str:
    """A value in a few words, fit for a sentence and a log, whatever it is."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text {brief(value)}"
    if isinstance(value, bool | int | float):
        return f"the value {brief(value)}"
    if isinstance(value, torch.Tensor):
        return f"images or a mask of the shape {tuple(value.shape)}"
    if isinstance(value, list | tuple | dict):
        return f"a list or table ({brief(value)})"
    if isinstance(value, host.Managed):
        return f"the model {value.value.name}"
    return f"something else ({type(value).__name__})"
