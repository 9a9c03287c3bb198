"""Which of PyTorch's attention kernels the packed pass gets: one that writes no matrix of tokens x tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from decaf.mllm.packed import PackedAttention

from .machine import Machine
from .promises import AT_LEAST, AT_MOST, Check, Promise

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
"""Kernels that hold a block of attention at a time. PyTorch takes another where none of them takes the arguments."""


@dataclass(frozen=True)
class _Pass:
    """Of Qwen2.5-VL-7B's heads. `shared`: tokens of the pictures; `questions`: tokens of each; `kept`: the pictures were run before."""

    batch: int
    shared: int
    questions: tuple[int, ...]
    kept: bool = False
    heads: int = 28
    kv_heads: int = 4
    width: int = 128

    @property
    def least(self) -> int:
        """Elements that any way of computing makes: keys and values of every head, the parts of the result and their sum."""
        return 4 * self.batch * self.heads * (self.shared + sum(self.questions)) * self.width


_PASSES = {
    "video": _Pass(1, 6437, (53, 61, 40)),
    "5 frames": _Pass(5, 1633, (53, 61)),
    "later questions": _Pass(1, 6437, (47,), kept=True),
}
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _passes(toy: bool) -> dict[str, _Pass]:
    if not toy:
        return _PASSES
    return {name: _Pass(min(one.batch, 2), 37, (5, 3), one.kept, 4, 2, 16) for name, one in _PASSES.items()}


def promises(toy: bool) -> dict[str, Promise]:
    found = {}
    for name, one in _passes(toy).items():
        for dtype, kind in _DTYPES.items():
            what = f"{name}, {dtype}"
            # Half as much again for workspaces; and the mask, as numbers of its own for every head at most.
            mask = one.heads * sum(one.questions) * (one.shared + sum(one.questions)) * 4
            square = one.batch * one.heads * one.shared**2 * 4
            found[f"{what}: peak"] = Promise(
                one.least * kind.itemsize * 3 // 2 + mask, AT_MOST, "bytes", f"tokens x tokens in float32 would be {square / 1e9:.1f} GB"
            )
            found[f"{what}: runs with the fused kernels alone"] = Promise(1, AT_LEAST)
    return found


def run(machine: Machine) -> dict[str, float]:
    found = {}
    for name, one in _passes(machine.toy).items():
        for dtype, kind in _DTYPES.items():
            work = _work(one, machine.device, kind)
            work()
            with machine.memory.peak() as peak:
                work()
            found[f"{name}, {dtype}: peak"] = peak.bytes
            try:
                with sdpa_kernel(FUSED):
                    work()
                fused = 1
            except RuntimeError:
                fused = 0
            found[f"{name}, {dtype}: runs with the fused kernels alone"] = fused
    return found


def _work(one: _Pass, device: torch.device, dtype: torch.dtype):
    """A function that attends once."""

    def rows(heads: int, length: int) -> Tensor:
        return torch.randn(one.batch, heads, length, one.width, device=device, dtype=dtype)

    segments = torch.cat([torch.full((length,), number) for number, length in enumerate((one.shared, *one.questions))])
    past = None
    if one.kept:
        before = PackedAttention(segments[: one.shared], keep=True)
        before(0, rows(one.heads, one.shared), rows(one.kv_heads, one.shared), rows(one.kv_heads, one.shared), one.width**-0.5)
        past, segments = before.kept, segments[one.shared :]
    attention = PackedAttention(segments, past=past)
    q, k, v = (rows(heads, len(segments)) for heads in (one.heads, one.kv_heads, one.kv_heads))
    return torch.inference_mode()(lambda: attention(0, q, k, v, one.width**-0.5))


CHECKS = [Check("attention kernels", "One layer of the packed pass with the heads of Qwen2.5-VL-7B", promises, run)]
