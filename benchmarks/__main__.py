"""`python -m benchmarks [--json FILE] [--quick]`: a table of costs, ours against the plain formula, in one run on this machine's CPU."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

from . import rollout


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="one run each, fewer lengths")
    arguments = parser.parse_args()
    tokens, repeats = ([800, 3300], 1) if arguments.quick else ([800, 1700, 3300], 3)
    rows = rollout.run(tokens, layers=2, repeats=repeats)

    out = sys.stdout
    out.write(f"Rollout of 2 layers, {rollout.HEADS} heads: streamed last row against the dense formula (same result to 1e-5)\n")
    out.write(f"{'tokens':>8}{'streamed s':>12}{'dense s':>10}{'speedup':>9}{'streamed MB':>13}{'dense MB':>10}{'memory ratio':>14}\n")
    for row in rows:
        out.write(
            f"{row['tokens']:>8}{row['streamed_seconds']:>12.2f}{row['dense_seconds']:>10.2f}{row['speedup']:>8.1f}x"
            f"{row['streamed_bytes'] / 1e6:>13.0f}{row['dense_bytes'] / 1e6:>10.0f}{row['memory_ratio']:>14.3f}\n"
        )
    if arguments.json:
        summary = {}
        for row in rows:
            summary[f"rollout_speedup_{row['tokens']}"] = row["speedup"]
            summary[f"rollout_memory_ratio_{row['tokens']}"] = row["memory_ratio"]
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"summary": summary, "rollout": rows, "machine": machine}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
