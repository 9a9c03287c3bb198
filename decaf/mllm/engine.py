"""What runs a decoder: the contract, and the engine for models of the transformers library.

An engine does not know what is asked or how pictures are laid out. It is given embedded tokens, their position ids and a function that
attends, and gives hidden states. Who may see whom is decided in that function alone (see `decaf.mllm.packed`), so no mask and no cache of the
library is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from ..devices import free_memory, is_device_failure, is_out_of_memory
from ..errors import DecafError, reason
from ..report import Report

ATTENTION = "decaf"
"""Name of the attention implementation that a text tower is set to."""

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""`attend(layer, q, k, v, scale)`: q (B, H, L, D), k and v (B, KV, L, D), after the rotary embedding -> (B, H, L, D)."""


@dataclass(frozen=True)
class TextShape:
    """Numbers of a decoder. `inner_width`: of its feed-forward layers, those of all experts that are computed for a token together, with their
    copies of the hidden states. `vocabulary`: rows of its table of embeddings."""

    layers: int
    heads: int
    kv_heads: int
    head_width: int
    width: int
    inner_width: int
    vocabulary: int


class Engine(Protocol):
    """A decoder that can be run with an attention function of ours.

    `vision_width`, `vision_inner_width`: of the vision tower's hidden states and of its feed-forward layers; `vision_dtype`: in which it
    computes. `deepstack_levels`: how many of them `see` gives beside the visual tokens; 0 for most models.
    """

    model: nn.Module
    shape: TextShape
    vision_width: int
    vision_inner_width: int
    deepstack_levels: int

    @property
    def vision_dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device:
        """Where it computes; some of its weights may lie elsewhere until they are needed."""

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes; some of its weights may be stored in less."""

    @property
    def end_tokens(self) -> set[int]:
        """Ids of tokens that end an answer."""

    @property
    def has_head(self) -> bool:
        """Whether `logits` can be asked. Without them there is no presence, and nothing is answered in words."""

    def free_memory(self) -> int | None:
        """Bytes that a pass may take on the device beside the weights; None where the device has no memory of its own."""

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> (..., width) on the device."""

    def see(self, pixels: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The vision tower and what joins it to the decoder, on CPU tensors named and shaped as transformers' own processors give them:
        visual tokens (n, width) of all pictures in a row, and deepstack levels (n, width) where the model has some."""

    def run(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        attend: Attend,
        *,
        wanted: Tensor | None = None,
        visual: Tensor | None = None,
        deepstack: Sequence[Tensor] = (),
    ) -> Tensor:
        """One forward pass: embeds (B, L, width), position_ids (axes, L) of every prompt -> hidden states (B, n, width) after the last
        norm, of the tokens at the n indices `wanted`, or of all.

        `deepstack`: level l (B, V, width) is added to the hidden states of the V visual tokens behind decoder layer l; they are where `visual`
        (L,) is True. DecafError: attention that is not plain causal softmax."""

    def logits(self, hidden: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """Hidden states (..., width) -> (..., vocabulary), or (..., n) of the n tokens `ids` alone."""


class TransformersEngine:
    """A vision-language model of the transformers library.

    `device`, `dtype`: where and in which it computes; by default as its first weight is. Whoever moves weights sets them: a weight that
    waits elsewhere, or in less precision, does not tell.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None):
        self.model = model
        first = next(model.parameters())
        self.device, self.dtype = device or first.device, dtype or first.dtype
        text, vision = model.config.get_text_config(), model.config.vision_config
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.shape = TextShape(
            text.num_hidden_layers,
            text.num_attention_heads,
            text.num_key_value_heads,
            head_width,
            text.hidden_size,
            _inner_width(text),
            model.get_input_embeddings().weight.shape[0],
        )
        self.vision_width = getattr(vision, "embed_dim", None) or vision.hidden_size
        ratio = getattr(vision, "mlp_ratio", None) or 4
        self.deepstack_levels = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        self.vision_inner_width = getattr(vision, "intermediate_size", None) or int(ratio * self.vision_width)
        _register()
        # The vision tower keeps the fast kernels: only the decoder's attention is ours.
        self.text_tower.set_attn_implementation(ATTENTION)

    @property
    def text_tower(self) -> nn.Module:
        inner = self.model.model
        return inner.language_model if hasattr(inner, "language_model") else inner.text_model

    @property
    def end_tokens(self) -> set[int]:
        listed = getattr(self.model.generation_config, "eos_token_id", None)
        return {listed} if isinstance(listed, int) else set(listed or ())

    @property
    def has_head(self) -> bool:
        return True

    @property
    def vision_dtype(self) -> torch.dtype:
        return self.dtype

    def free_memory(self) -> int | None:
        return free_memory(self.device)

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids.to(self.device))

    def see(self, pixels: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        run = self.model.get_video_features if "pixel_values_videos" in pixels else self.model.get_image_features
        out = run(**{name: one.to(self.device, self.dtype if one.is_floating_point() else None) for name, one in pixels.items()})
        if isinstance(out, tuple) and isinstance(out[0], list | tuple):  # transformers 4: (tokens of each picture, deepstack levels)
            tokens, levels = out
        else:  # transformers 5 names them; 4 returned tokens bare where there are no levels
            tokens, levels = getattr(out, "pooler_output", out), getattr(out, "deepstack_features", None)
        return _in_a_row(tokens), tuple(map(_in_a_row, levels or ()))

    def run(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        attend: Attend,
        *,
        wanted: Tensor | None = None,
        visual: Tensor | None = None,
        deepstack: Sequence[Tensor] = (),
    ) -> Tensor:
        wanted = torch.arange(embeds.shape[1], device=embeds.device) if wanted is None else wanted.to(embeds.device)
        positions = position_ids.to(embeds.device)[:, None].expand(-1, len(embeds), -1)
        if len(positions) == 1:
            positions = positions[0]
        # A configuration may ask for all hidden states and attention maps, which nobody reads.
        kept = {"use_cache": False, "output_hidden_states": False, "output_attentions": False}
        if deepstack:
            kept["visual_pos_masks"] = visual.to(embeds.device).expand(len(embeds), -1)
            kept["deepstack_visual_embeds"] = [level.flatten(0, 1) for level in deepstack]
        token = _attend.set(attend)
        try:
            with only_at(wanted, self.text_tower.layers[-1].mlp):
                hidden = self.text_tower(inputs_embeds=embeds, position_ids=positions, **kept).last_hidden_state
            return hidden[:, wanted]
        finally:
            _attend.reset(token)

    def logits(self, hidden: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        return logits if ids is None else logits[..., list(ids)]


@contextmanager
def only_at(wanted: Tensor, mlp: nn.Module) -> Iterator[None]:
    """Within it, the feed-forward part of a decoder layer runs for the tokens at the indices `wanted` alone; others get nothing added. In the last
    layer that changes no hidden state that is read, and the pictures' tokens, nearly all there are, cost nothing there."""

    length = 0

    def cut(module, args):
        nonlocal length
        length = args[0].shape[1]
        return (args[0][:, wanted], *args[1:])

    def put_back(module, args, made):
        # A mixture of experts may tell how it chose them as well.
        first = made[0] if isinstance(made, tuple) else made
        whole = first.new_zeros(len(first), length, first.shape[-1])
        whole[:, wanted] = first
        return (whole, *made[1:]) if isinstance(made, tuple) else whole

    hooks = [mlp.register_forward_pre_hook(cut), mlp.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _inner_width(text: object) -> int:
    """`TextShape.inner_width` of a text tower's configuration."""
    experts = getattr(text, "num_experts", None)
    if not experts:
        return text.intermediate_size
    # A third of what one layer was seen to hold for a token. transformers 5 computes the chosen experts, with an implementation that can be set;
    # version 4 computes all of them and drops most of what they give.
    hidden, inner = text.hidden_size, text.moe_intermediate_size
    if hasattr(text, "_experts_implementation"):
        return max(text.intermediate_size, text.num_experts_per_tok * (2 * inner + hidden + hidden // 2))
    return max(text.intermediate_size, experts * (inner + hidden))


def _in_a_row(features: Tensor | Sequence[Tensor]) -> Tensor:
    """(n, width) of all pictures, whether they come together or one by one."""
    joined = features if isinstance(features, Tensor) else torch.cat(list(features))
    return joined.reshape(-1, joined.shape[-1])


_attend: ContextVar[Attend | None] = ContextVar("decaf_attend", default=None)


@cache
def _register() -> None:
    """Makes `ATTENTION` known to transformers. Without a mask function of that name the library makes no mask for it: none is wanted."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        attend = _attend.get()
        if attend is None:  # somebody else runs the model
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        refuse_other_attention(module, query, key, attention_mask, kwargs)
        mixed = attend(module.layer_idx, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return mixed.transpose(1, 2).contiguous(), None

    AttentionInterface.register(ATTENTION, attention)


def refuse_other_attention(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict) -> None:
    """Maps are rolled out as plain causal softmax attention; a model that computes something else would get wrong maps without a word."""
    window = kwargs.get("sliding_window")
    if window is not None and window < key.shape[2]:
        raise DecafError(
            f"This model attends in a sliding window of {window} tokens, and the prompt has {key.shape[2]}; its attention rollout is not "
            "supported. Lower the key frames or the tokens per frame, or choose a model with full attention."
        )
    for name, what in (("softcap", "soft-capped attention"), ("s_aux", "attention sinks")):
        if kwargs.get(name) is not None:
            raise DecafError(
                f"This model uses {what}; its attention rollout is not supported. Choose a model with plain softmax attention."
            )
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not causal or (mask is not None and not _is_causal(mask)):
        raise DecafError(
            "This model lets tokens see later ones, in both directions; its attention rollout is not supported. Choose a model with causal "
            "attention, such as Qwen2.5-VL."
        )


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask (..., n, L), True or 0 where a token may look, lets each of the last n tokens see itself and all before, no others."""
    visible = mask if mask.dtype == torch.bool else mask == 0
    n, length = mask.shape[-2:]
    return bool((visible == visible.new_ones(n, length).tril(length - n)).all())


@contextmanager
def explained(name: str, report: Report) -> Iterator[None]:
    """Names the model in what a forward pass raises: damaged numbers in its files show only there. A cancel passes."""
    try:
        yield
    except DecafError:
        raise
    except Exception as error:
        if report.cancelled_by(error) or is_out_of_memory(error) or is_device_failure(error):
            raise
        raise DecafError(
            f"{name} cannot be run with the files it was loaded from ({type(error).__name__}: {reason(error)}). Download it again, or choose "
            "another model."
        ) from error
