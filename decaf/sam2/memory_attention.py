"""SAM 2's memory attention for many objects on one image, whose memories differ in number.

The package's own module takes a batch of equal lengths. Here everything runs in one batch but the cross-attention itself, which runs once
per group of objects with equally many memories: no padding, no mask. The first layer's self-attention is identical for all objects and
computed once.

Values are linear in the memories, and a softmax sums to one: so the memories themselves are averaged, and the average goes through the maps
of the values and of the output at once. SAM 2's memories are a quarter as wide as its values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .narrow_values import narrow_value_attention


@dataclass(frozen=True)
class BankGroup:
    """What k objects remember, equally much each. `objects`: their indices in the batch. `memories`: per object (age code, memory), each
    memory (h * w, channels). `pointers`, `pointer_pos_enc`: (k, p, channels), the tokens of object pointers, which get no rotary positional
    encoding, and their encodings of distance in time."""

    objects: list[int]
    memories: list[list[tuple[int, Tensor]]]
    pointers: Tensor
    pointer_pos_enc: Tensor


class BatchedMemoryAttention:
    """Same result as the package's module object by object, up to rounding.

    `model`: a `SAM2Base`, whose weights must stay as and where they are for the life of this object. `pos_enc`: (1, channels, h, w), the
    positional encodings of all memories. `check_cancelled`: called before every layer; may raise to stop. To be called under
    `torch.inference_mode`.
    """

    def __init__(self, model: nn.Module, pos_enc: Tensor, check_cancelled: Callable[[], None] = lambda: None):
        self._module, self._check_cancelled = model.memory_attention, check_cancelled
        ages = model.maskmem_tpos_enc[:, 0].flip(0)  # (codes, 1, channels): SAM 2 numbers them from the end
        self._pos_enc = pos_enc.flatten(2).transpose(1, 2) + ages  # (codes, h * w, channels)
        self._tokens = self._pos_enc.shape[1]
        side = self._tokens**0.5
        self._rotary = self._module.layers[0].cross_attn_image.compute_cis(end_x=side, end_y=side).to(pos_enc.device)
        with torch.autocast(pos_enc.device.type, enabled=False):
            self._outputs = [_values_and_output(layer.cross_attn_image) for layer in self._module.layers]

    def __call__(self, current: Tensor, pos_enc: Tensor, groups: list[BankGroup]) -> Tensor:
        """`current`, `pos_enc`: (1, h * w, channels), the image's features and positional encodings. Returns (n, h * w, channels) for the n
        objects of all groups."""
        order = [i for group in groups for i in group.objects]
        index = None if order == sorted(order) else torch.tensor(order, device=current.device).argsort()
        kind = current.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else current.dtype
        values = [_values(group, dtype) for group in groups]
        placed = [self._placed(group) for group in groups]
        hidden = current + 0.1 * pos_enc
        for number, layer in enumerate(self._module.layers):
            self._check_cancelled()
            hidden = layer._forward_sa(hidden, pos_enc)
            hidden = hidden + self._cross_attention(number, layer.norm2(hidden), groups, placed, values, index)
            hidden = hidden + layer.linear2(layer.activation(layer.linear1(layer.norm3(hidden))))
        return self._module.norm(hidden)

    def _cross_attention(
        self, number: int, hidden: Tensor, groups: list[BankGroup], placed: list[Tensor], values: list[Tensor], index: Tensor | None
    ) -> Tensor:
        """`hidden`: (1 or n, h * w, channels), one for all objects as long as they are equal. `placed`, `values`: of each group
        (k, length, channels of memories). `index`: where each object is among those of all groups, if they are not in order. Returns
        (n, h * w, channels)."""
        attention = self._module.layers[number].cross_attn_image
        q = self._rotate(attention._separate_heads(attention.q_proj(hidden), attention.num_heads))
        averages = []
        for group, tokens, content in zip(groups, placed, values, strict=True):
            own = q if len(q) == 1 else q[group.objects]
            own = own.expand(len(group.objects), -1, -1, -1)
            averages.append(narrow_value_attention(own, self._keys(attention, group, tokens), content, self._check_cancelled))
        averages = torch.cat(averages) if index is None else torch.cat(averages)[index]
        return F.linear(averages, *self._outputs[number])

    def _placed(self, group: BankGroup) -> Tensor:
        """What the keys of every layer are made of: all memories and then all pointers of the group's objects, each plus its encoding of
        position and time. (k, length, channels of memories)."""
        k, count, channels = group.pointers.shape
        spatial = len(group.memories[0]) * self._tokens
        placed = self._pos_enc.new_empty(k, spatial + count, channels)
        torch.add(group.pointers, group.pointer_pos_enc, out=placed[:, spatial:])
        for own, memories in zip(placed, group.memories, strict=True):
            for part, (age, memory) in zip(own[:spatial].split(self._tokens), memories, strict=True):
                torch.add(memory, self._pos_enc[age], out=part)
        return placed

    def _keys(self, attention: nn.Module, group: BankGroup, placed: Tensor) -> Tensor:
        """`placed`: see `_placed`. Returns (k, heads, length, channels of a head), in the same order."""
        keys = attention._separate_heads(attention.k_proj(placed), attention.num_heads)
        count = len(group.memories[0])
        of_memories = keys[:, :, : count * self._tokens].unflatten(2, (count, self._tokens))
        self._rotate(of_memories, out=of_memories)
        return keys

    def _rotate(self, heads: Tensor, out: Tensor | None = None) -> Tensor:
        """Rotary positional encoding of (..., heads, h * w, channels of a head): each pair of channels is a complex number, turned by an angle.
        `out`: where the result goes, else into a new tensor."""
        out = torch.empty_like(heads) if out is None else out
        # In float32 also where autocast has made the heads smaller, as the package does.
        turned = out if out.dtype == torch.float32 else torch.empty_like(heads, dtype=torch.float32)
        torch.mul(_as_complex(heads.float()), self._rotary, out=_as_complex(turned))
        return out if turned is out else out.copy_(turned)


def _as_complex(heads: Tensor) -> Tensor:
    return torch.view_as_complex(heads.unflatten(-1, (-1, 2)))


def _values(group: BankGroup, dtype: torch.dtype) -> Tensor:
    """(k, length, channels): all memories and then all pointers of the group's objects, in the order of their keys."""
    memories, pointers = group.memories, group.pointers
    spatial = sum(len(memory) for _, memory in memories[0])
    tokens = pointers.new_empty(len(memories), spatial + pointers.shape[1], pointers.shape[2], dtype=dtype)
    for i, one in enumerate(memories):
        torch.cat([memory for _, memory in one], out=tokens[i, :spatial])
    tokens[:, spatial:] = pointers
    return tokens


def _values_and_output(attention: nn.Module) -> tuple[Tensor, Tensor]:
    """Averages of memory tokens of all heads (..., heads * channels of memories) -> the attention's output: weight and bias."""
    value, output, heads = attention.v_proj, attention.out_proj, attention.num_heads
    weight = torch.einsum("ohd,hdm->ohm", output.weight.unflatten(1, (heads, -1)), value.weight.unflatten(0, (heads, -1)))
    return weight.flatten(1), output.weight @ value.bias + output.bias


def attention_bytes(model: nn.Module) -> int:
    """Bytes that the memory attention takes for one object whose memory bank is full, a rough upper bound: memory tokens, keys and padded values;
    and, in the image's tokens, the hidden layer of the MLP before and after its activation, or some copies of them."""
    layer = model.memory_attention.layers[0]
    tokens = model.sam_image_embedding_size**2
    remembered = model.num_maskmem * tokens + model.max_obj_ptrs_in_encoder * model.hidden_dim // model.mem_dim
    per_memory = model.mem_dim + 2 * layer.cross_attn_image.internal_dim
    return 4 * (remembered * per_memory + tokens * (6 * model.hidden_dim + 2 * layer.linear1.out_features))


def remembered_bytes(model: nn.Module) -> int:
    """Bytes of one object's memories on the way through a clip, in bfloat16, those that the way back needs included."""
    return 2 * 2 * model.num_maskmem * model.sam_image_embedding_size**2 * model.mem_dim
