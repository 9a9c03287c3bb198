"""`python -m benchmarks`: tables of what the stages cost, ours against the plain way, in one run on this machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch

from . import mllm, rollout, sam2
from .gpu.machine import why_no_gpu
from .gpu.report import Report, as_json
from .measure import Different, Failed
from .sam2 import Case

STAGES = ("rollout", "mllm", "sam2")
GPU = "gpu"
"""What only a GPU can tell; no comparison of speeds. See benchmarks/gpu."""


def sam2_cases(device: str, quick: bool) -> list[Case]:
    sizes = [(32, 1), (100, 3)] if quick else [(length, count) for length in (32, 100, 300) for count in (1, 3, 8)]
    if device == "cpu":
        return [*(Case("bundled", length, count) for length, count in sizes), Case("small, 256 px", 100, 3)]
    return [Case(shape, length, count, (480, 854)) for shape in ("tiny", "large") for length, count in sizes]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="one run each, fewer sizes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stage", metavar="NAMES", help="some of gpu,rollout,mllm,sam2 (default: all; gpu only with --device cuda)")
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    known = STAGES if device == "cpu" else (GPU, *STAGES)
    stages = known if arguments.stage is None else arguments.stage.split(",")
    if unknown := [stage for stage in stages if stage not in known]:
        parser.error(f"there is no stage {unknown[0]} on this device; choose from {', '.join(known)}")
    if device == "cuda" and (reason := why_no_gpu()):
        parser.error(f"--device cuda cannot be measured here: {reason}")
    found = {"summary": {}, "machine": machine(device)}

    def add(stage: str, rows: list[dict], summary: dict, table: list[str]) -> None:
        found[stage] = rows
        found["summary"] |= summary
        sys.stdout.write("\n".join(table) + "\n\n")
        sys.stdout.flush()
        if arguments.json:  # after every stage: a later one may fail
            arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    failed = {}
    try:
        if GPU in stages:
            report = Report(None)
            failed = report.run_all()
            reasons = [f"{name} failed: {what}" for name, what in failed.items()]
            add(GPU, as_json(report.lines)["lines"], {}, [report.markdown(), *reasons])
        if "rollout" in stages:
            rows = rollout.run(device, [800, 3300] if quick else [800, 1700, 3300, 6600], 1 if quick else 3)
            add("rollout", rows, rollout.summary(rows), rollout.table(rows, rollout.SHAPES[device]))
        if "mllm" in stages:
            shapes = ["3b", "7b"] if device == "cuda" else ["100m, 28 tokens", *([] if quick else ["100m, 100 tokens"])]
            rows = mllm.run(device, shapes, 1 if quick else 3)
            add("mllm", rows, mllm.summary(rows), mllm.table(rows))
        if "sam2" in stages:
            rows = sam2.run(device, sam2_cases(device, quick), 1 if quick else 3)
            add("sam2", rows, sam2.summary(rows), sam2.table(rows))
    except (Different, Failed) as error:
        raise SystemExit(str(error)) from None
    if failed or any(line["holds"] is False for line in found.get(GPU, ())):
        raise SystemExit("Not all that was computed holds on this GPU.")


def machine(device: str) -> dict:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
