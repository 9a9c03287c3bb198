"""The GPU check of the fused rollout kernel, under Triton's interpreter on the CPU: prints its lines as JSON."""

import json

import interpreted_rollout  # noqa: F401, isort: skip (sets TRITON_INTERPRET, and must come before anything that imports Triton)
import torch
from triton.runtime.interpreter import InterpreterBuilder

from benchmarks.gpu import machine, promises, results


def main():
    torch.set_num_threads(1)
    InterpreterBuilder.create_dot = interpreted_rollout.widened(InterpreterBuilder.create_dot)
    check = next(check for check in results.CHECKS if check.name == "kernel")
    lines = promises.lines(check, True, check.run(machine.on_cpu()))
    print(json.dumps({line.name: {"measured": line.measured, "holds": line.holds} for line in lines}))


if __name__ == "__main__":
    main()
