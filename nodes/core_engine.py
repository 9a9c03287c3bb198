"""ComfyUI's own language models as an engine of decaf.

ComfyUI hands its attention function to every decoder layer as a keyword. A hook on the layer's attention puts ours in its place, so no code is
copied or patched, and casting, dequantising, streaming and LoRA stay where they are: in the layers' own forward. None of that is a public
interface, so every pass looks whether it is as expected, and a model is tried once on a few tokens before it is used.
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
from ..decaf.mllm.engine import Attend, TextShape
from ..decaf.mllm.packed import PackedAttention
from .file_head import FileHead

TRIAL_TOKENS = 8
"""Random tokens of the trial; with the weights on the device it takes as long as one word of an answer."""

LARGEST_ERROR = 0.05
"""Of the trial, relative to what is compared. bfloat16 stays below 0.01; a mask, a scale or a rotation of another kind is above 0.1."""

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
class _Call:
    """What a layer's attention was called with: ComfyUI's own function, and the arguments besides q, k and v."""

    own: Callable
    heads: int
    keywords: dict


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
        with _as_expected("its numbers are not where they were"):
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

    @property
    def device(self) -> torch.device:
        # Not that of the weights, which may lie in RAM and be streamed.
        return self.patcher.load_device

    def free_memory(self) -> int | None:
        if self.device.type == "cpu":
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
            # In float32, as ComfyUI itself gives it: in bf16 some towers rotate in float32 and fail at their values.
            seen = self.model.visual(pixels[kind].to(self.device, torch.float32), grid.to(self.device))
        tokens, levels = seen if isinstance(seen, tuple) else (seen, ())
        expected = int(grid.prod(-1).sum()) // self.model.visual.spatial_merge_size**2
        if any(tuple(one.shape) != (expected, self.shape.width) for one in (tokens, *levels)):
            raise changed("the vision tower gives other tokens than one for each square of patches")
        return tokens, tuple(levels)

    def run(
        self, embeds: Tensor, position_ids: Tensor, attend: Attend, *, visual: Tensor | None = None, deepstack: Sequence[Tensor] = ()
    ) -> Tensor:
        return self._run(embeds, position_ids, attend, visual=visual, deepstack=deepstack)

    def logits(self, hidden: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        if self._head is not None:
            return self._head(hidden, ids)
        with self._computing():
            # ComfyUI's own looks at the last position alone.
            logits = self.model.logits(hidden.reshape(-1, 1, hidden.shape[-1]))
        logits = logits.view(*hidden.shape[:-1], -1)
        return logits if ids is None else logits[..., list(ids)]

    def try_out(self) -> None:
        """One pass over a few random tokens, in which each layer's attention is compared with ComfyUI's own and the rotation of its queries
        with the published one. DecafError: they differ, or the model's numbers are not finite."""
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(self.shape.vocabulary, (1, TRIAL_TOKENS), generator=random)
        positions = torch.stack([torch.randperm(50, generator=random)[:TRIAL_TOKENS] for _ in range(3)])
        half = TRIAL_TOKENS // 2
        # The first tokens are shared, the others are the only question: together they see what a plain causal pass lets them see.
        attend = PackedAttention((torch.arange(TRIAL_TOKENS) >= half).long())
        errors: dict[str, float] = {}

        def compare(layer: int, call: _Call, q: Tensor, k: Tensor, v: Tensor, mixed: Tensor) -> None:
            own = call.own(q, k, v, call.heads, skip_reshape=True, **call.keywords)
            errors[f"attention of layer {layer}"] = _difference(mixed, own)

        unrotated: list[Tensor] = []
        first = self.model.model.layers[0].self_attn
        with _as_expected("a layer's parts are not where they were"):
            last_before = first.q_proj if first.q_norm is None else first.q_norm
            watched = last_before.register_forward_hook(lambda module, args, output: unrotated.append(output))

        def checked(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            if layer == 0 and unrotated:
                plain = unrotated[0].reshape(1, TRIAL_TOKENS, -1, self.shape.head_width) if first.q_norm is None else unrotated[0].transpose(1, 2)
                errors["rotation of the queries"] = _difference(q, self._rotated(plain.transpose(1, 2), positions))
            return attend(layer, q, k, v, scale)

        try:
            hidden = self._run(self.embed(ids), positions, checked, compare=compare)
        finally:
            watched.remove()
        if not hidden.isfinite().all():
            raise DecafError(
                "The model's numbers are not finite, already for a few words: its weights are damaged, or a patch on them is. Download the "
                "file again, or take the LoRA off."
            )
        if "rotation of the queries" not in errors:
            raise changed("a layer's queries do not come from where they came")
        worst = max(errors, key=errors.get)
        if not errors[worst] <= LARGEST_ERROR:
            raise changed(f"the {worst} differs by {errors[worst]:.0%} from what it was")

    def _rotated(self, q: Tensor, positions: Tensor) -> Tensor:
        """Queries (1, H, n, D) turned by the multimodal rotary embedding of the positions (3, n), as the models' papers give it: frequency j
        of D / 2 turns by one of time, row and column, in sections (Qwen2.5-VL) or interleaved (Qwen3-VL)."""
        config, half = self.model.model.config, q.shape[-1] // 2
        sections = list(config.rope_dims)
        if sum(sections) != half:
            raise changed("the sections of its rotary embedding are others")
        if getattr(config, "interleaved_mrope", False):
            axis = [0] * half
            for which in (1, 2):
                axis[which : 3 * sections[which] : 3] = [which] * len(axis[which : 3 * sections[which] : 3])
        else:
            axis = [which for which, width in enumerate(sections) for _ in range(width)]
        frequencies = config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = (positions.double()[axis].T * frequencies).to(q.device, torch.float32)  # (n, D / 2)
        one, other = q.float().chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)

    def _run(self, embeds, position_ids, attend, *, visual=None, deepstack=(), compare=None) -> Tensor:
        more = {}
        if len(deepstack):
            more["visual_pos_masks"] = visual.to(embeds.device).expand(len(embeds), -1)
            more["deepstack_embeds"] = [level.flatten(0, 1) for level in deepstack]
        decoder = self.model.model
        with self._computing(), _attending(decoder, attend, compare) as seen:
            # The layers write into what they are given.
            hidden = decoder(None, embeds=embeds.clone(), position_ids=position_ids.to(embeds.device), **more)[0]
        if seen != list(range(self.shape.layers)):
            raise changed(f"of its {self.shape.layers} layers, {len(set(seen))} let their attention be looked at")
        return hidden

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with _as_expected("it does not run as it did"), mm.cuda_device_context(self.device):
            yield


@contextmanager
def _as_expected(what: str) -> Iterator[None]:
    """Within it only ComfyUI's own code can fail: what it raises beside a cancel and a lack of memory is due to another version of it."""
    try:
        yield
    except (DecafError, mm.InterruptProcessingException):
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_device_failure(error):
            raise
        raise changed(what, error) from error


@contextmanager
def _attending(decoder: nn.Module, attend: Attend, compare: Callable | None) -> Iterator[list[int]]:
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
                    compare(layer, _Call(own, heads, rest), q, k, v, mixed)
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


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm; NaN where a number is none."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


