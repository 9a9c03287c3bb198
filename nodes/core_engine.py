"""ComfyUI's own language models as an engine of decaf.

ComfyUI hands its attention function to every decoder layer as a keyword. A hook on the layer's attention puts ours in its place, so no code is
copied or patched, and casting, dequantising, streaming and LoRA stay where they are: in the layers' own forward. None of that is a public
interface, so every pass looks whether it is as expected, and a model is tried on a few tokens before it is used (see `core_trial`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management as mm
import torch
from comfyui_version import __version__ as COMFYUI_VERSION
from torch import Tensor, nn

from ..decaf.devices import is_device_failure, is_out_of_memory
from ..decaf.errors import DecafError, reason
from ..decaf.mllm.engine import Attend, TextShape, only_at
from .file_head import FileHead

_KNOWN_KEYWORDS = {"hidden_states", "attention_mask", "freqs_cis", "optimized_attention", "past_key_value"}
"""Of a decoder layer's attention. Others may change what it computes, for example a window."""

_CLEAR_HIDDEN = -1e4
"""What a mask adds to a score that is to vanish is below this; what it adds to one that counts is 0."""


def changed(what: str, error: BaseException | None = None) -> DecafError:
    """The error for a ComfyUI whose classes are not those that this was written for."""
    told = f" ({type(error).__name__}: {reason(error)})" if error is not None else ""
    return DecafError(
        f"ComfyUI {COMFYUI_VERSION} runs its language models in another way than this version of ComfyUI-DecAF knows: {what}{told}. Update "
        "ComfyUI-DecAF and ComfyUI; until then take a model folder in models/LLM with the node Load Multimodal LLM."
    )


@dataclass(frozen=True)
class Call:
    """What a layer's attention was called with: ComfyUI's own function, and the arguments besides q, k and v."""

    own: Callable
    heads: int
    keywords: dict


Compare = Callable[[int, Call, Tensor, Tensor, Tensor, Tensor], None]
"""`compare(layer, call, q, k, v, mixed)`: `mixed` (B, n, H * D) is what our attention made of q, k and v."""


class CoreEngine:
    """A vision-language model of ComfyUI: `transformer` has the vision tower `visual` and the decoder `model`.

    `patcher`: through which ComfyUI moves the weights. `dtype`: computed in, whatever the weights are stored as. `head`: rows of the output
    matrix from the file, where ComfyUI leaves it out; None where the transformer has its own, and `has_head` says whether there is any.
    """

    def __init__(
        self,
        transformer: nn.Module,
        patcher,
        dtype: torch.dtype,
        *,
        head: FileHead | None = None,
        has_head: bool = True,
        end_tokens: Sequence[int] = (),
    ):
        self.model, self.patcher, self.dtype, self.has_head, self.end_tokens = transformer, patcher, dtype, has_head, set(end_tokens)
        self._head = head
        # As ComfyUI itself feeds the tower: in bf16 some rotate in float32 and fail at their values.
        self.vision_dtype = torch.float32
        with as_expected("its numbers are not where they were"):
            text = transformer.model.config
            self.shape = TextShape(
                text.num_hidden_layers,
                text.num_attention_heads,
                text.num_key_value_heads,
                text.head_dim,
                text.hidden_size,
                text.intermediate_size,
                text.vocab_size,
            )
            self.vision_width = transformer.visual.hidden_size
            self.vision_inner_width = max(getattr(part, "out_features", 0) for part in transformer.visual.blocks[0].mlp.modules())
            self.deepstack_levels = len(getattr(transformer.visual, "deepstack_visual_indexes", ()))

    @property
    def device(self) -> torch.device:
        # Not that of the weights, which may lie in RAM and be streamed.
        return self.patcher.load_device

    def free_memory(self) -> int | None:
        if self.device.type in ("cpu", "mps"):
            return None
        # ComfyUI also counts weights that it would move out for a tensor of ours.
        told = getattr(self.patcher, "get_free_memory", mm.get_free_memory)
        return int(told(self.device))

    def embed(self, ids: Tensor) -> Tensor:
        with self._computing():
            return self.model.get_input_embeddings()(ids.to(self.device), out_dtype=self.dtype)

    def see(self, pixels: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        kind = "pixel_values_videos" if "pixel_values_videos" in pixels else "pixel_values"
        grid = pixels["video_grid_thw" if kind == "pixel_values_videos" else "image_grid_thw"]
        with self._computing():
            seen = self.model.visual(pixels[kind].to(self.device, self.vision_dtype), grid.to(self.device))
        tokens, levels = seen if isinstance(seen, tuple) else (seen, ())
        expected = int(grid.prod(-1).sum()) // self.model.visual.spatial_merge_size**2
        if any(tuple(one.shape) != (expected, self.shape.width) for one in (tokens, *levels)) or len(levels) != self.deepstack_levels:
            raise changed("the vision tower gives other tokens than one for each square of patches")
        # In the dtype that they will be added in: the tower's own would take twice the memory until then.
        return tokens.to(self.dtype), tuple(level.to(self.dtype) for level in levels)

    def run(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        attend: Attend,
        *,
        wanted: Tensor | None = None,
        visual: Tensor | None = None,
        deepstack: Sequence[Tensor] = (),
        compare: Compare | None = None,
    ) -> Tensor:
        """See `decaf.mllm.engine.Engine`. `compare` is told what came of each layer's attention, and how ComfyUI would have called its own."""
        wanted = torch.arange(embeds.shape[1], device=embeds.device) if wanted is None else wanted.to(embeds.device)
        more = {}
        if len(deepstack):
            more["visual_pos_masks"] = visual.to(embeds.device).expand(len(embeds), -1)
            more["deepstack_embeds"] = [level.flatten(0, 1) for level in deepstack]
        decoder = self.model.model
        with self._computing(), _attending(decoder, attend, compare) as seen, only_at(wanted, decoder.layers[-1].mlp):
            # The layers write into what they are given.
            hidden = decoder(None, embeds=embeds.clone(), position_ids=position_ids.to(embeds.device), **more)[0]
        if seen != list(range(self.shape.layers)):
            raise changed(f"of its {self.shape.layers} layers, {len(set(seen))} let their attention be looked at")
        return hidden[:, wanted]

    def logits(self, hidden: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        if self._head is not None:
            return self._head(hidden, ids)
        with self._computing():
            # ComfyUI's own looks at the last position alone.
            logits = self.model.logits(hidden.reshape(-1, 1, hidden.shape[-1]))
        logits = logits.view(*hidden.shape[:-1], -1)
        return logits if ids is None else logits[..., list(ids)]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with as_expected("it does not run as it did"), mm.cuda_device_context(self.device):
            yield


@contextmanager
def as_expected(what: str) -> Iterator[None]:
    """Within it ComfyUI's own code runs: what it raises, beside a cancel and a lack of memory, comes of another version of it."""
    try:
        yield
    except (DecafError, mm.InterruptProcessingException):
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_device_failure(error):
            raise
        raise changed(what, error) from error


@contextmanager
def _attending(decoder: nn.Module, attend: Attend, compare: Compare | None) -> Iterator[list[int]]:
    """Within it `decoder` attends through `attend`. Gives the indices of the layers that did. `compare` is told of each what came of it."""
    seen: list[int] = []

    def swap(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, keywords: dict) -> tuple[tuple, dict]:
            own = keywords.get("optimized_attention")
            strange = sorted(name for name in set(keywords) - _KNOWN_KEYWORDS if keywords[name] is not None)
            if own is None or args or strange or keywords.get("past_key_value") is not None:
                raise changed(f"a layer's attention is called with {', '.join(strange) or 'other arguments'}")

            def attention(q, k, v, heads, **rest):
                if layer == 0:
                    _check_causal(rest.get("mask"))
                seen.append(layer)
                mixed = _mixed(layer, q, k, v, heads, dict(rest), attend)
                if compare is not None:
                    rest.pop("skip_reshape")
                    compare(layer, Call(own, heads, rest), q, k, v, mixed)
                return mixed

            return args, {**keywords, "optimized_attention": attention}

        return hook

    handles = [layer.self_attn.register_forward_pre_hook(swap(index), with_kwargs=True) for index, layer in enumerate(decoder.layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _mixed(layer: int, q: Tensor, k: Tensor, v: Tensor, heads: int, rest: dict, attend: Attend) -> Tensor:
    """Our attention, in the layout that ComfyUI's layers take: (B, n, H * D)."""
    laid_out = rest.pop("skip_reshape", False) and q.ndim == k.ndim == v.ndim == 4 and q.shape[1] == heads and k.shape == v.shape
    rest.pop("mask", None)  # seen to be causal; who may see whom is ours to say
    rest.pop("enable_gqa", None)
    strange = [name for name, value in rest.items() if value is not None]
    if not laid_out or strange or heads % k.shape[1] or k.shape[2] != q.shape[2]:
        raise changed(f"attention takes {', '.join(strange) or 'queries and keys of another layout'}")
    mixed = attend(layer, q, k, v, q.shape[-1] ** -0.5)
    return mixed.transpose(1, 2).flatten(2)


def _check_causal(mask: Tensor | None) -> None:
    """Looks at the first and the last row of a mask (..., n, n): a window, or sight of later tokens, shows there."""
    if mask is None:
        return
    first, last = mask[..., 0, 1:], mask[..., -1, :]
    if mask.dtype == torch.bool:
        first, last = ~first, last.logical_not()
        causal = bool(first.all()) and not bool(last.any())
    else:
        causal = bool((first < _CLEAR_HIDDEN).all()) and bool((last == 0).all())
    if not causal:
        raise changed("its layers attend in another way than each token to all before it")

