"""The checks one after the other on a GPU, each in a process of its own, and one report of all of them."""

from __future__ import annotations

import json
import multiprocessing
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import attention_kernels, comfy, full_card, machine, models, results, streamed
from .promises import Check, Line, Unsuitable, lines, unmeasured

CHECKS: list[Check] = [*results.CHECKS, *attention_kernels.CHECKS, *models.CHECKS, *streamed.CHECKS, *full_card.CHECKS, *comfy.CHECKS]

MINUTES = 10
"""All of the checks together. What has not begun by then is not measured."""


def _work(connection, name: str) -> None:
    check = next(check for check in CHECKS if check.name == name)
    try:
        answer = "measured", check.run(machine.on_gpu())
    except Unsuitable as reason:
        answer = "reason", str(reason)
    except BaseException:
        answer = "failed", traceback.format_exc()
    connection.send(answer)
    connection.close()


def run_alone(check: Check, seconds: float, work: Callable = _work) -> tuple[str, object]:
    """("measured", figures), ("reason", why this machine cannot run it) or ("failed", what went wrong), of the check in a process of its own:
    a kernel that breaks the device, or never ends, breaks no other check."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs, check.name), daemon=False)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return "failed", f"it did not end in {seconds:.0f} s"
        return ours.recv()
    except EOFError:
        process.join()
        return "failed", f"its process ended with the code {process.exitcode} and without a result"
    finally:
        if process.is_alive():
            process.kill()
        process.join()


class Report:
    """Lines of the checks that were run, and of those that were not. `path`: a Markdown file; JSON is written beside it. Written after every
    check, so that what was measured is not lost."""

    def __init__(self, path: Path | None):
        self._path, self._start = path, time.monotonic()
        self._reason = machine.why_no_gpu()
        self._lines = {check.name: unmeasured(check, self._reason or "not run") for check in CHECKS}
        self._write()

    @property
    def reason(self) -> str | None:
        """Why nothing can be measured here; None if it can."""
        return self._reason

    def run(self, check: Check) -> tuple[list[Line], str]:
        """The check's lines, and what went wrong."""
        left = 60 * MINUTES - (time.monotonic() - self._start)
        kind, answer = ("reason", f"{MINUTES} minutes were over") if left < 5 else run_alone(check, min(left, check.seconds))
        self._lines[check.name] = (
            lines(check, False, answer) if kind == "measured" else unmeasured(check, answer if kind == "reason" else "the check failed")
        )
        self._write()
        return self._lines[check.name], answer if kind == "failed" else ""

    def run_all(self) -> dict[str, str]:
        """Runs every check. By the name of those that failed, why."""
        return {check.name: failure for check in CHECKS if (failure := self.run(check)[1])}

    @property
    def lines(self) -> list[Line]:
        return [line for check in CHECKS for line in self._lines[check.name]]

    def markdown(self) -> str:
        return "\n".join(markdown(self.lines, described())) + "\n"

    def _write(self) -> None:
        if self._path is not None:
            self._path.write_text(self.markdown(), encoding="utf-8")
            self._path.with_suffix(".json").write_text(json.dumps(as_json(self.lines), indent=1) + "\n", encoding="utf-8")


def described() -> dict[str, object]:
    """The machine and the libraries that matter."""
    import transformers

    known = {"torch": torch.__version__, "transformers": transformers.__version__, "system": platform.system()}
    if machine.why_no_gpu() is None:
        about = torch.cuda.get_device_properties(0)
        major, minor = torch.cuda.get_device_capability()
        known |= {"card": about.name, "memory": about.total_memory, "compute_capability": f"{major}.{minor}", "cuda": torch.version.cuda}
    return known


def as_json(found: Sequence[Line]) -> dict:
    rows = [
        {
            "check": line.check,
            "line": line.name,
            "computed": line.promise.figure,
            "bound": line.promise.kind,
            "unit": line.promise.unit,
            "source": line.promise.source,
            "measured": line.measured,
            "holds": line.holds,
            "reason": line.reason,
        }
        for line in found
    ]
    return {"machine": described(), "lines": rows}


HEAD = (
    "# What is computed for a GPU, and what was measured",
    "",
    "Written by `uv run pytest tests/gpu --gpu-report benchmarks/GPU.md`, with a GPU in less than ten minutes; without one nothing is measured.",
    "Sizes are in units of 10^9 and 10^6 bytes. *about* allows a quarter more or less. The checks themselves are run on the CPU at toy sizes by",
    "`tests/test_gpu_checks.py`, so that they are known to work.",
    "",
)


def markdown(found: Sequence[Line], about: dict[str, object]) -> list[str]:
    """A table for each check: what is computed, what was measured."""
    card = f"{about['card']}, {about['memory'] / 2**30:.0f} GB" if "card" in about else "No GPU: nothing is measured"
    text = [*HEAD, f"{card}; torch {about['torch']}, transformers {about['transformers']}."]
    for check in CHECKS:
        text += ["", f"**{check.name}.** {check.title}.", "", "| | computed | measured | holds |", "| --- | --- | --- | --- |"]
        for line in found:
            if line.check == check.name:
                verdict = {True: "yes", False: "**no**", None: ""}[line.holds]
                text.append(f"| {line.name} | {_computed(line)} | {_measured(line)} | {verdict} |")
    return text


def _computed(line: Line) -> str:
    promise = line.promise
    if promise.figure is None:
        return ""
    figure = shown(promise.figure, promise.unit)
    bound = figure if promise.kind == "told" else f"{promise.kind} {figure}"
    return f"{bound} ({promise.source})" if promise.source else bound


def _measured(line: Line) -> str:
    if line.measured is not None:
        return shown(line.measured, line.promise.unit)
    return "not measured" if line.reason in ("", machine.why_no_gpu()) else f"not measured: {line.reason}"


def shown(figure: float, unit: str) -> str:
    if unit == "bytes":
        return f"{figure / 1e9:.2f} GB" if figure >= 1e8 else f"{figure / 1e6:.2f} MB"
    if unit == "error":
        return f"{figure:.1e}"
    if unit == "s":
        return f"{figure:.2f} s"
    if unit == "times":
        return f"{figure:.2f} times"
    return f"{figure:.4g}"
