"""SAM 2's memory attention for many objects on one image, whose memories differ in number.

The package's own module takes a batch of equal lengths. Here everything runs in one batch but the cross-attention itself, which runs once
per group of objects with equally many memories: no padding, no mask, and the first layer's self-attention, which no object has touched yet,
only once. Keys that a layer makes of a memory are kept for the next frames, which look at it again, as long as there is room.

Values are linear in the memories, and a softmax sums to one: so the memories themselves are mixed, and the mixture goes through the maps of
the values and of the output at once. SAM 2's memories are a quarter as wide as its values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .mixing import mix
from .package import sam2_package


@dataclass(eq=False)
class Memory:
    """What is remembered of one object on one frame. `tokens`: (h * w, channels), in bfloat16 as the package stores them. `keys`: of each
    layer, rotated but without the code of their age, (heads, h * w, channels of a head); empty if there was no room."""

    tokens: Tensor
    keys: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Remembered:
    """What k objects remember, equally much each. `objects`: their places in the batch. `memories`: per object, memories and their age
    codes. `pointers`, `pointer_codes`: (k, p, channels), the tokens of object pointers, which get no rotary position code, and their codes
    of distance in time."""

    objects: list[int]
    memories: list[list[tuple[int, Memory]]]
    pointers: Tensor
    pointer_codes: Tensor


class MemoryAttention:
    """Same result as the package's module object by object, up to rounding.

    `model`: a `SAM2Base`, whose weights must stay as and where they are for the life of this object. `position`: (1, channels, h, w), the
    position codes of all memories. `budget`: bytes for kept keys. `tick`: called
    while it works; may raise to stop. To be called under `torch.inference_mode`.
    """

    def __init__(self, model: nn.Module, position: Tensor, budget: int, tick: Callable[[], None] = lambda: None):
        self._module, self._tick = model.memory_attention, tick
        self._position = position.flatten(2).transpose(1, 2)[0]
        self._ages = model.maskmem_tpos_enc[:, 0].flip(0)  # (codes, 1, channels): SAM 2 numbers them from the end
        first = self._module.layers[0].cross_attn_image
        side = len(self._position) ** 0.5
        self._rotary = first.compute_cis(end_x=side, end_y=side).to(position.device)
        per_memory = 4 * len(self._module.layers) * len(self._position) * first.internal_dim  # float32
        self._room = max(0, budget // per_memory - len(self._ages))
        self._age_keys: list[Tensor] = []
        with torch.autocast(position.device.type, enabled=False):
            self._outputs = [_values_and_output(layer.cross_attn_image) for layer in self._module.layers]
        self._kept: weakref.WeakSet[Memory] = weakref.WeakSet()

    def __call__(self, current: Tensor, position: Tensor, groups: list[Remembered]) -> Tensor:
        """`current`, `position`: (1, h * w, channels), the image's features and position codes. Returns (n, h * w, channels) for the n
        objects of all groups."""
        if self._room:
            self._keep(groups)
        order = [place for group in groups for place in group.objects]
        places = None if order == sorted(order) else torch.tensor(order, device=current.device).argsort()
        kind = current.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else current.dtype
        tokens = [_tokens(group, dtype) for group in groups]
        hidden = current + 0.1 * position
        for number, layer in enumerate(self._module.layers):
            self._tick()
            hidden = layer._forward_sa(hidden, position)
            hidden = hidden + self._cross_attention(number, layer.norm2(hidden), groups, tokens, places)
            hidden = hidden + layer.linear2(layer.activation(layer.linear1(layer.norm3(hidden))))
        return self._module.norm(hidden)

    def _cross_attention(
        self, number: int, hidden: Tensor, groups: list[Remembered], tokens: list[Tensor], places: Tensor | None
    ) -> Tensor:
        """`hidden`: (1 or n, h * w, channels), one for all objects as long as they are equal. `tokens`: of each group (k, length, channels
        of memories). Returns (n, h * w, channels)."""
        attention = self._module.layers[number].cross_attn_image
        query = self._rotate(attention._separate_heads(attention.q_proj(hidden), attention.num_heads))
        mixtures = []
        for group, own_tokens in zip(groups, tokens, strict=True):
            own = query if len(query) == 1 else query[group.objects]
            mixtures.append(mix(own.expand(len(group.objects), -1, -1, -1), self._keys(number, attention, group), own_tokens, self._tick))
        mixed = torch.cat(mixtures) if places is None else torch.cat(mixtures)[places]
        return F.linear(mixed, *self._outputs[number])

    def _keys(self, number: int, attention: nn.Module, group: Remembered) -> Tensor:
        """Of all memories and then all pointers of the group's objects: (k, heads, tokens, channels of a head)."""
        pointers = _project(attention, group.pointers, group.pointer_codes)
        k, heads, count, width = pointers.shape
        tokens = len(self._position)
        spatial = len(group.memories[0]) * tokens
        keys = pointers.new_empty(k, heads, spatial + count, width)
        keys[:, :, spatial:] = pointers
        for i, memories in enumerate(group.memories):
            for j, (age, memory) in enumerate(memories):
                part = keys[i, :, j * tokens : (j + 1) * tokens]
                if memory.keys:
                    torch.add(memory.keys[number], self._age_keys[number][age], out=part)
                else:
                    part[:] = self._rotate(_project(attention, memory.tokens[None], (self._position + self._ages[age])[None]))[0]
        return keys

    def _keep(self, groups: list[Remembered]) -> None:
        """Makes the keys of new memories, if there is room for them. A key is linear in the code of the memory's age: kept without it, it
        serves at every age."""
        layers = [layer.cross_attn_image for layer in self._module.layers]
        if not self._age_keys:
            for attention in layers:
                shift = attention._separate_heads(F.linear(self._ages, attention.k_proj.weight), attention.num_heads)
                self._age_keys.append(self._rotate(shift.expand(-1, -1, len(self._position), -1)))
        for memory in (memory for group in groups for memories in group.memories for _, memory in memories):
            if not memory.keys and len(self._kept) < self._room:
                memory.keys += [self._rotate(_project(attention, memory.tokens[None], self._position[None]))[0] for attention in layers]
                self._kept.add(memory)

    def _rotate(self, heads: Tensor) -> Tensor:
        """Rotary position codes for (n, heads, h * w, channels of a head)."""
        return sam2_package().apply_rotary_enc(heads, heads[:, :, :0], freqs_cis=self._rotary)[0]


def _project(attention: nn.Module, tokens: Tensor, codes: Tensor) -> Tensor:
    """(n, length, channels) and position codes -> keys (n, heads, length, channels of a head)."""
    return attention._separate_heads(attention.k_proj(tokens + codes), attention.num_heads)


def _tokens(group: Remembered, dtype: torch.dtype) -> Tensor:
    """(k, length, channels): all memories and then all pointers of the group's objects, in the order of their keys."""
    memories, pointers = group.memories, group.pointers
    spatial = sum(len(memory.tokens) for _, memory in memories[0])
    tokens = pointers.new_empty(len(memories), spatial + pointers.shape[1], pointers.shape[2], dtype=dtype)
    for i, one in enumerate(memories):
        torch.cat([memory.tokens for _, memory in one], out=tokens[i, :spatial])
    tokens[:, spatial:] = pointers
    return tokens


def _values_and_output(attention: nn.Module) -> tuple[Tensor, Tensor]:
    """Mixtures of memories of all heads (..., heads * channels of memories) -> the attention's output: weight and bias."""
    value, output, heads = attention.v_proj, attention.out_proj, attention.num_heads
    weight = torch.einsum("ohd,hdm->ohm", output.weight.unflatten(1, (heads, -1)), value.weight.unflatten(0, (heads, -1)))
    return weight.flatten(1), output.weight @ value.bias + output.bias
