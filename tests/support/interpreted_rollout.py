"""The fused rollout kernel under Triton's interpreter on the CPU, against the dense formula: prints the relative errors of each
case as JSON, and whether the kernel's trial of itself tells right from wrong.

A program of its own, because Triton reads TRITON_INTERPRET when it is first imported.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.language as tl
from dense_rollout import dense_rows, random_rows, relative
from triton.runtime.interpreter import InterpreterBuilder

from decaf.attention import rollout
from decaf.attention import rollout_triton as rollout_kernel

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# batch, heads, key heads, lengths of prefix and suffixes, head width, dtype, layers, positions of a program and of a step (None: as on a GPU)
CASES = {
    "one question": (1, 2, 2, (61, 5), 32, FLOAT, 2, None),
    "grouped heads": (1, 4, 2, (75, 9, 4), 64, BRAIN, 1, (64, 32)),
    "one key head": (1, 3, 1, (37, 9), 32, FLOAT, 1, None),
    "batch": (2, 2, 1, (37, 9, 4), 64, HALF, 2, (32, 32)),
    "nine questions": (1, 2, 1, (40, 1, 2, 3, 4, 5, 6, 7, 8, 9), 32, FLOAT, 1, None),
    "odd head width": (1, 2, 1, (37, 3), 80, FLOAT, 1, None),
    "real blocks": (1, 2, 1, (150, 20, 31), 128, BRAIN, 1, None),
    "long questions": (1, 1, 1, (36, 40, 33), 32, FLOAT, 1, None),
    "nothing to fill": (1, 2, 1, (64, 32), 32, FLOAT, 1, None),
}


def widened(product):
    """The interpreter keeps bfloat16 as bits and multiplies these as integers; GPUs multiply exactly and add in float32."""

    def dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.create_fp_ext(a, tl.float32), self.create_fp_ext(b, tl.float32)
        return product(self, a, b, *rest)

    return dot


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    InterpreterBuilder.create_dot = widened(InterpreterBuilder.create_dot)
    chosen, errors = rollout_kernel.blocks, {}
    for name, (batch, heads, groups, lengths, width, dtype, layers, small) in CASES.items():
        rollout_kernel.blocks = (lambda *_, small=small: (*small, 4, 2)) if small else chosen
        prefix, suffixes = random_rows(batch, heads, groups, lengths, width, dtype, layers)
        visual = torch.zeros(lengths[0], dtype=torch.bool)
        visual[[*range(5, 15), *range(18, 28), *range(33, lengths[0] - 2)]] = True
        rows = rollout_kernel.roll_out(prefix, suffixes, visual)
        errors[name] = [relative(row, dense_rows(prefix, suffix, visual)) for row, suffix in zip(rows, suffixes, strict=True)]
    print(json.dumps({"errors": errors, "trials": trials()}))


def trials() -> dict[str, bool]:
    """Whether the kernel agrees with PyTorch, and with PyTorch on altered input."""
    rollout_kernel.blocks = lambda *_: (64, 32, 4, 2)
    prefix, suffixes = random_rows(1, 2, 1, (61, 5, 3), 32, FLOAT, 1)

    def swapped(rows, change):
        return rollout.CapturedQK(rows.scale, {layer: change(x) for layer, x in rows.q.items()}, rows.k)

    oracles = {
        "right": rollout._by_blocks,
        "V-Max over all keys": lambda prefix, suffixes, visual: rollout._by_blocks(prefix, suffixes, visual | True),
        "prefix without queries": lambda prefix, *rest: rollout._by_blocks(swapped(prefix, torch.zeros_like), *rest),
        "prefix backwards": lambda prefix, *rest: rollout._by_blocks(swapped(prefix, lambda x: x.flip(2)), *rest),
        "two hundredths more": lambda *args: [1.02 * row for row in rollout._by_blocks(*args)],
        "not a number": lambda *args: [*rollout._by_blocks(*args)[:-1], rollout._by_blocks(*args)[-1] * torch.nan],
    }
    cached = []  # the interpreter is slow, and the trial is always the same
    roll_out = rollout_kernel.roll_out
    rollout_kernel.roll_out = lambda *args: cached or cached.extend(roll_out(*args)) or cached
    verdicts = {}
    for name, oracle in oracles.items():
        rollout_kernel._agreed.clear()
        verdicts[name] = rollout_kernel.agrees(prefix, suffixes, oracle)
    return verdicts


if __name__ == "__main__":
    main()
