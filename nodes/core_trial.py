"""A trial of a model of ComfyUI before it is used: whether what happens around the attention is what the rollout takes it for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..decaf.errors import DecafError
from ..decaf.mllm.packed import PackedAttention
from .core_engine import Call, CoreEngine, as_expected, changed

TRIAL_TOKENS = 8
"""Random tokens of the trial; with the weights on the device it takes as long as one word of an answer."""

LARGEST_ERROR = 0.05
"""Relative to what is compared. bfloat16 stays below 0.01; a mask, a scale or a rotation of another kind is above 0.1."""

SECTIONS = 16, 24, 24
INTERLEAVED = 24, 20, 20
"""Frequencies of time, row and column in Qwen2.5-VL's and in Qwen3-VL's rotary embedding, of heads of 128."""


@torch.inference_mode()
def try_out(engine: CoreEngine, name: str) -> None:
    """One pass over a few random tokens of the model `name`. Compared are each layer's attention with ComfyUI's own, the rotation of the queries
    with the published one, and what deepstack adds behind the first layers with what it is given.

    DecafError: they differ, or the numbers are not finite.
    """
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(engine.shape.vocabulary, (1, TRIAL_TOKENS), generator=random)
    positions = torch.stack([torch.randperm(1000, generator=random)[:TRIAL_TOKENS] for _ in range(3)])
    # The first tokens are shared, the others are the only question: together they see what a plain causal pass lets them see.
    attend = PackedAttention((torch.arange(TRIAL_TOKENS) >= TRIAL_TOKENS // 2).long())
    embeds, pictures = engine.embed(ids), {}
    if engine.deepstack_levels:
        visual = torch.arange(TRIAL_TOKENS) % 3 == 1
        levels = torch.randn(engine.deepstack_levels, 1, int(visual.sum()), engine.shape.width, generator=random)
        pictures = {"visual": visual, "deepstack": tuple(levels.to(embeds) * embeds.norm(dim=-1).mean() / engine.shape.width**0.5)}
    errors: dict[str, float] = {}

    def compare(layer: int, call: Call, q: Tensor, k: Tensor, v: Tensor, mixed: Tensor) -> None:
        own = call.own(q, k, v, call.heads, skip_reshape=True, **call.keywords)
        errors[f"attention of layer {layer}"] = _difference(mixed, own)

    with _unrotated(engine) as before, _behind_layers(engine, pictures, errors):

        def checked(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            if layer == 0 and before:
                errors["rotation of the queries"] = _difference(q, _rotated(engine, before[0], positions))
            return attend(layer, q, k, v, scale)

        hidden = engine.run(embeds, positions, checked, compare=compare, **pictures)
    if not hidden.isfinite().all():
        raise DecafError(
            f"{name} gives numbers that are not finite, already for a few words: its weights are damaged, or those of a LoRA on it. Download "
            "the file again, or take the LoRA off."
        )
    if "rotation of the queries" not in errors:
        raise changed("a layer's queries do not come from where they came")
    worst = max(errors, key=errors.get)
    if not errors[worst] <= LARGEST_ERROR:
        raise changed(f"the {worst} differs by {errors[worst]:.0%} from what it was")


@contextmanager
def _unrotated(engine: CoreEngine) -> Iterator[list[Tensor]]:
    """Within it, the queries of the first layer before they are turned, (1, H, n, D), come into the list."""
    seen: list[Tensor] = []
    with as_expected("a layer's parts are not where they were"):
        attention = engine.model.model.layers[0].self_attn
        normed = attention.q_norm is not None
        part = attention.q_norm if normed else attention.q_proj

    def keep(module, args, output: Tensor) -> None:
        seen.append(output if normed else output.view(*output.shape[:2], -1, engine.shape.head_width).transpose(1, 2))

    handle = part.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _behind_layers(engine: CoreEngine, pictures: dict, errors: dict[str, float]) -> Iterator[None]:
    """Within it, what comes to the visual tokens between two layers is compared with the deepstack level that belongs there."""
    layers, levels = engine.model.model.layers, pictures.get("deepstack", ())
    handles, left = [], {}

    def leave(index: int):
        # A copy: what is added may be added in place.
        return lambda module, args, output: left.__setitem__(index, output[0].clone())

    def enter(index: int):
        def hook(module, args, keywords) -> None:
            with as_expected("a layer takes other arguments"):
                added = (keywords["x"] - left[index])[:, pictures["visual"].to(left[index].device)]
            errors[f"deepstack behind layer {index}"] = _difference(added, levels[index])

        return hook

    for index in range(min(len(levels), len(layers) - 1)):
        handles.append(layers[index].register_forward_hook(leave(index)))
        handles.append(layers[index + 1].register_forward_pre_hook(enter(index), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rotated(engine: CoreEngine, q: Tensor, positions: Tensor) -> Tensor:
    """Queries (1, H, n, D) turned by the multimodal rotary embedding of the positions (3, n), as the models' papers give it: frequency j
    of D / 2 turns by one of time, row and column, in sections (Qwen2.5-VL) or interleaved (Qwen3-VL)."""
    half = q.shape[-1] // 2
    with as_expected("the numbers of its rotary embedding are not where they were"):
        theta = float(engine.model.model.config.rope_theta)
    if half != sum(SECTIONS):
        raise changed("its heads have another width")
    if engine.deepstack_levels:  # Qwen3-VL: row and column in turns with time, until their share is used up
        axis = torch.zeros(half, dtype=torch.long)
        for which in (1, 2):
            axis[which : 3 * INTERLEAVED[which] : 3] = which
    else:
        axis = torch.arange(3).repeat_interleave(torch.tensor(SECTIONS))
    frequencies = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = (positions.double()[axis].T * frequencies).to(q.device, torch.float32)  # (n, D / 2)
    one, other = q.float().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm; NaN where a number is none."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))
