"""From a CLIP of ComfyUI to a multimodal LLM of decaf: finding the model in it, and saying why another cannot be used."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management as mm
import torch
from torch import nn

from ..decaf.errors import DecafError
from ..decaf.mllm import registry
from ..decaf.mllm.base import MLLM
from ..decaf.mllm.checks import check_tokenizer
from . import host
from .core_engine import COMFYUI_VERSION, CoreEngine, as_expected, changed
from .core_trial import try_out
from .text_encoders import WORKS, TextEncoderFile, read_text_encoder

log = logging.getLogger(__name__)

MASK_BYTES = 256 << 20
"""ComfyUI makes a square mask for every pass, which nobody reads here: of 11,000 tokens in bf16."""

_tried: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
"""Transformers that have been tried out -> ComfyUI's number for the patches that were on them."""


@dataclass(frozen=True)
class _Kind:
    """What decaf and the published models know of a class of ComfyUI. `system`: see `decaf.mllm.base.Family`."""

    model_type: str
    end_tokens: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>")


_KINDS = {"Qwen25_7BVLI": _Kind("qwen2_5_vl"), "Qwen3VL": _Kind("qwen3_vl")}
"""By the name of the class in comfy.text_encoders that a model is of, or is derived from."""

_TEXT_ONLY = "it sees no pictures"
_REFUSED = (
    ("Gemma4", "a Gemma 4", "its layers look back through sliding windows and share keys, so its attention rollout is not supported"),
    ("Gemma3", "a Gemma 3", "most of its layers look back through sliding windows, so its attention rollout is not supported"),
    ("Gemma", "a Gemma", f"its layers look back through sliding windows, and {_TEXT_ONLY}"),
    ("Qwen35", "a Qwen3.5", "most of its layers have linear attention, which cannot be rolled out"),
    ("Qwen25_3B", "OmniGen2's Qwen2.5-VL 3B", f"ComfyUI loads it without its vision tower, so {_TEXT_ONLY}"),
    ("Qwen3_", "a Qwen3", _TEXT_ONLY),
    ("Mistral3", "a Mistral", _TEXT_ONLY),
    ("Ministral3", "a Ministral", _TEXT_ONLY),
    ("Llama2", "a Llama", _TEXT_ONLY),
    ("Ovis", "an Ovis", _TEXT_ONLY),
    ("GptOss", "a GPT-OSS", f"it has attention sinks, and {_TEXT_ONLY}"),
    ("T5", "a T5", f"it is no chat model, and {_TEXT_ONLY}"),
    ("CLIPTextModel", "a CLIP text model", f"it is no chat model, and {_TEXT_ONLY}"),
    ("BertModel", "a BERT", f"it is no chat model, and {_TEXT_ONLY}"),
)
"""Beginning of the name of a class -> what it is, and why it cannot be used. The first one that fits counts."""


def is_clip(value: object) -> bool:
    """Whether a value is what ComfyUI's text encoder loaders, and those of other packs, put on a CLIP socket."""
    return all(hasattr(value, name) for name in ("cond_stage_model", "patcher", "tokenizer"))


class ManagedClip(host.Managed):
    """A CLIP's model as a multimodal LLM. The patcher is the CLIP's, with its LoRAs; loading, streaming and quantisation are ComfyUI's."""

    def __init__(self, clip, *, dtype: torch.dtype | None = None):
        """DecafError: a CLIP that holds no model that can be used. `dtype`: computed in; None takes what ComfyUI itself would for answers."""
        self.clip, self.patcher = clip, clip.patcher
        device = getattr(self.patcher, "load_device", None)
        if not isinstance(device, torch.device) or not isinstance(clip.cond_stage_model, nn.Module):
            raise _refusal(f"of the kind {type(clip).__name__}", "ComfyUI can neither load nor move what is in it")
        # As ComfyUI runs its text encoders, so that their answers are the same here, but never in float16 (see decaf.devices.language_dtype).
        dtype = dtype or (torch.bfloat16 if mm.should_use_bf16(device) else torch.float32)
        self.value = _mllm_of(clip, dtype)
        if device.type == "cpu" and mm.get_torch_device().type != "cpu":
            log.warning(
                "ComfyUI runs the text encoder %s on the CPU, although there is a %s: the attention will take minutes. Start ComfyUI without "
                "--lowvram or --novram, or choose the device 'default' in Load CLIP.",
                self.value.name,
                mm.get_torch_device(),
            )

    def load(self, memory: int) -> MLLM:
        """The record, with `memory` bytes free on the device beside the weights, or those of them that ComfyUI keeps there.
        DecafError: ComfyUI runs the model in another way than is known, or its weights are damaged."""
        with as_expected("it does not load what is in the CLIP"):
            mm.load_models_gpu([self.patcher], memory_required=memory + MASK_BYTES)
        engine, patches = self.value.engine, getattr(self.patcher, "patches_uuid", None)
        if engine.model not in _tried or _tried[engine.model] != patches:
            try_out(engine, self.value.name)
            _tried[engine.model] = patches
        return self.value


def managed(value) -> host.Managed:
    """What a node was given on a socket that takes a loaded MLLM or a CLIP. DecafError: a CLIP that cannot be used."""
    return value if isinstance(value, host.Managed) else ManagedClip(value)


def _mllm_of(clip, dtype: torch.dtype) -> MLLM:
    file = _file_of(clip)
    transformer, kind = _find_transformer(clip, file)
    if file:
        _check_weights(transformer, file)
    family = registry()[kind.model_type]
    name = file.path.name if file else f"the CLIP ({family.title})"
    tokenizer = _tokenizer_of(clip)
    ends = [number for number in map(tokenizer.convert_tokens_to_ids, kind.end_tokens) if number is not None]
    head = file.head if file and not _has_own_head(transformer, kind) else None
    has_head = head is not None or _has_own_head(transformer, kind)
    engine = CoreEngine(transformer, clip.patcher, dtype, head=head, has_head=has_head, end_tokens=ends)
    vision = family.vision_shape(_config(transformer, kind))
    mllm = MLLM(engine, tokenizer, family, name, vision, family.mean, family.std, family.system)
    check_tokenizer(mllm)
    return mllm


def _find_transformer(clip, file: TextEncoderFile | None) -> tuple[nn.Module, _Kind]:
    """Wrappers differ from one image model to the next; the classes within do not. DecafError: there is none that can be used."""
    parts = list(clip.cond_stage_model.modules())
    for part in parts:
        for cls in type(part).__mro__:
            kind = _KINDS.get(cls.__name__)
            if kind is None or not cls.__module__.startswith("comfy."):
                continue
            if str(getattr(part, "model_type", "")).endswith("32b") or getattr(part.model, "norm", None) is None:
                raise _refusal("MiniMax H3's Qwen3-VL 32B", "only the first 50 of its 64 layers are in that file")
            if kind.model_type not in registry():
                raise changed(f"{kind.model_type} is not known")
            if not hasattr(part, "visual"):
                raise _refusal("a language model", _TEXT_ONLY)
            return part, kind
    if file is not None and file.usable:
        raise DecafError(
            f"{file.path.name} was loaded with a type that leaves out its vision tower, or by a ComfyUI that does not know it (this is "
            f"{COMFYUI_VERSION}). Choose another type in Load CLIP, for example qwen_image (not flux2), or choose the file in Load Multimodal LLM; "
            "if that does not help, update ComfyUI."
        )
    names = {cls.__name__ for part in parts for cls in type(part).__mro__ if cls.__module__.startswith("comfy.")}
    names.discard("Llama2_")  # the decoder of many models
    for beginning, what, why in _REFUSED:
        if any(name.startswith(beginning) for name in names):
            raise _refusal(what, why)
    raise _refusal(f"of the kind {type(clip.cond_stage_model).__name__}", "it is not known as a model that sees pictures")


def _refusal(what: str, why: str) -> DecafError:
    return DecafError(f"The CLIP that is connected is {what}: {why}. Connect {WORKS}, or the node Load Multimodal LLM.")


def _file_of(clip) -> TextEncoderFile | None:
    """The file with the multimodal model that a CLIP was loaded from, as far as its patcher tells: loaders of other packs do not.
    DecafError: several such files, of which a CLIP holds one model."""
    made = getattr(clip.patcher, "cached_patcher_init", None)
    try:
        paths = [Path(path) for path in made[1][0]]
    except (TypeError, LookupError):
        return None
    files = [read_text_encoder(path) for path in paths]
    usable = [file for file in files if file is not None and file.usable]
    if len(usable) > 1:
        names = " and ".join(file.path.name for file in usable)
        raise DecafError(f"The CLIP that is connected was loaded from several models that see pictures: {names}. Load one of them alone.")
    return next(iter(usable), None)


def _check_weights(transformer: nn.Module, file: TextEncoderFile) -> None:
    names = [name for name, _ in transformer.named_parameters()]
    missing = file.missing(names)
    if missing:
        raise DecafError(
            f"{file.path.name} lacks {len(missing)} of the {len(names)} weights of its model, first of all {missing[0]}. Download it again."
        )


def _has_own_head(transformer: nn.Module, kind: _Kind) -> bool:
    """Whether ComfyUI has the output matrix, be it tied. It drops Qwen2.5-VL 7B's, which is not tied, and would take the embeddings instead."""
    return kind.model_type != "qwen2_5_vl" or hasattr(transformer.model, "lm_head")


def _tokenizer_of(clip):
    """The plain tokenizer below ComfyUI's, which parses weights in brackets and puts templates around."""
    try:
        tokenizer = getattr(clip.tokenizer, clip.tokenizer.clip).tokenizer
        tokenizer.all_special_tokens  # noqa: B018, asked for what it is
    except AttributeError as error:
        raise changed("the tokenizer is not where it was", error) from error
    return tokenizer


def _config(transformer: nn.Module, kind: _Kind) -> SimpleNamespace:
    """The numbers of a model under the names of the published configurations; those that ComfyUI has in its code alone are the published
    ones."""
    visual = transformer.visual
    numbers = {"temporal_patch_size": 2, "tokens_per_second": 2, "depth": len(visual.blocks)}
    for name in ("patch_size", "spatial_merge_size", "window_size", "deepstack_visual_indexes"):
        if hasattr(visual, name):
            numbers[name] = getattr(visual, name)
    text = transformer.model.config
    return SimpleNamespace(model_type=kind.model_type, vision_config=SimpleNamespace(**numbers), get_text_config=lambda: text)
