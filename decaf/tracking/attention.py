"""SAM 2's memory attention for many objects on one image, whose memories differ in number.

The package's own module takes a batch of equal lengths. Here everything runs in one batch but the cross-attention itself, which runs once
per group of objects with equally many memories: no padding, no mask, and the first layer's self-attention, which no object has touched yet,
only once. What each layer makes of a memory is kept for the next frames, which look at it again, as long as there is room.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .package import sam2_package


@dataclass(eq=False)
class Memory:
    """What is remembered of one object on one frame. `tokens`: (h * w, channels), in bfloat16 as the package stores them. `projected`: per
    layer keys, rotated but without the code of their age, and values, (heads, h * w, channels of a head); empty if there was no room."""

    tokens: Tensor
    projected: list[tuple[Tensor, Tensor]] = field(default_factory=list)


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
    position codes of all memories. `budget`: bytes for kept projections. To be called under `torch.inference_mode`.
    """

    def __init__(self, model: nn.Module, position: Tensor, budget: int):
        self._module = model.memory_attention
        self._position = position.flatten(2).transpose(1, 2)[0]
        self._ages = model.maskmem_tpos_enc[:, 0].flip(0)  # (codes, 1, channels): SAM 2 numbers them from the end
        first = self._module.layers[0].cross_attn_image
        side = len(self._position) ** 0.5
        self._rotary = first.compute_cis(end_x=side, end_y=side).to(position.device)
        per_memory = 8 * len(self._module.layers) * len(self._position) * first.internal_dim  # keys and values in float32
        ages = per_memory // 2 * len(self._ages)
        self._room = max(0, (budget - ages) // per_memory)
        self._age_keys: list[Tensor] = []
        self._kept: weakref.WeakSet[Memory] = weakref.WeakSet()

    def __call__(self, current: Tensor, position: Tensor, groups: list[Remembered]) -> Tensor:
        """`current`, `position`: (1, h * w, channels), the image's features and position codes. Returns (n, h * w, channels) for the n
        objects of all groups."""
        if self._room:
            self._keep(groups)
        order = [place for group in groups for place in group.objects]
        places = None if order == sorted(order) else torch.tensor(order, device=current.device).argsort()
        hidden = current + 0.1 * position
        for number, layer in enumerate(self._module.layers):
            hidden = layer._forward_sa(hidden, position)
            hidden = hidden + self._cross_attention(number, layer.cross_attn_image, layer.norm2(hidden), groups, places)
            hidden = hidden + layer.linear2(layer.activation(layer.linear1(layer.norm3(hidden))))
        return self._module.norm(hidden)

    def _cross_attention(
        self, number: int, attention: nn.Module, hidden: Tensor, groups: list[Remembered], places: Tensor | None
    ) -> Tensor:
        """`hidden`: (1 or n, h * w, channels), one for all objects as long as they are equal. Returns (n, h * w, channels)."""
        query = self._rotate(attention._separate_heads(attention.q_proj(hidden), attention.num_heads))
        outputs = []
        for group in groups:
            own = query if len(query) == 1 else query[group.objects]
            keys, values = self._keys_and_values(number, attention, group)
            outputs.append(F.scaled_dot_product_attention(own.expand(len(group.objects), -1, -1, -1), keys, values))
        merged = torch.cat(outputs) if places is None else torch.cat(outputs)[places]
        return attention.out_proj(attention._recombine_heads(merged))

    def _keys_and_values(self, number: int, attention: nn.Module, group: Remembered) -> tuple[Tensor, Tensor]:
        """Of all memories and then all pointers of the group's objects: (k, heads, tokens, channels of a head) each."""
        pointer_keys, pointer_values = _project(attention, group.pointers, group.pointer_codes)
        k, heads, pointers, width = pointer_keys.shape
        tokens = len(self._position)
        spatial = len(group.memories[0]) * tokens
        keys = pointer_keys.new_empty(k, heads, spatial + pointers, width)
        values = torch.empty_like(keys)
        keys[:, :, spatial:], values[:, :, spatial:] = pointer_keys, pointer_values
        for i, memories in enumerate(group.memories):
            for j, (age, memory) in enumerate(memories):
                part = slice(j * tokens, (j + 1) * tokens)
                if memory.projected:
                    key, value = memory.projected[number]
                    torch.add(key, self._age_keys[number][age], out=keys[i, :, part])
                else:
                    key, value = _project(attention, memory.tokens[None], (self._position + self._ages[age])[None])
                    keys[i, :, part], value = self._rotate(key)[0], value[0]
                values[i, :, part] = value
        return keys, values

    def _keep(self, groups: list[Remembered]) -> None:
        """Projects new memories, if there is room for them. A key is linear in the code of the memory's age: kept without it, it serves
        at every age."""
        layers = [layer.cross_attn_image for layer in self._module.layers]
        if not self._age_keys:
            for attention in layers:
                shift = attention._separate_heads(F.linear(self._ages, attention.k_proj.weight), attention.num_heads)
                self._age_keys.append(self._rotate(shift.expand(-1, -1, len(self._position), -1)))
        for memory in (memory for group in groups for memories in group.memories for _, memory in memories):
            if not memory.projected and len(self._kept) < self._room:
                for attention in layers:
                    key, value = _project(attention, memory.tokens[None], self._position[None])
                    memory.projected.append((self._rotate(key)[0], value[0]))
                self._kept.add(memory)

    def _rotate(self, heads: Tensor) -> Tensor:
        """Rotary position codes for (n, heads, h * w, channels of a head)."""
        return sam2_package().apply_rotary_enc(heads, heads[:, :, :0], freqs_cis=self._rotary)[0]


def _project(attention: nn.Module, tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """(n, length, channels) -> keys and values (n, heads, length, channels of a head)."""
    key = attention._separate_heads(attention.k_proj(tokens + codes), attention.num_heads)
    return key, attention._separate_heads(attention.v_proj(tokens.to(attention.v_proj.weight.dtype)), attention.num_heads)
