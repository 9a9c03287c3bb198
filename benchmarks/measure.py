"""Peak memory and time of a piece of work, in a process of its own so that nothing else is counted."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import torch


@dataclass(frozen=True)
class Cost:
    """`seconds` of wall time; `cpu_seconds` of all threads together, which other work on the machine stretches less; `bytes` of memory at
    the peak, above what stood there before the work began: the host's on a CPU, the device's on a GPU."""

    seconds: float
    cpu_seconds: float
    bytes: int


def figures(side: str, costs: list[Cost]) -> dict[str, float]:
    """Medians, named for a side of the comparison."""
    return {f"{side}_{one.name}": median(getattr(cost, one.name) for cost in costs) for one in fields(Cost)}


def ratio(upper: list[Cost], lower: list[Cost], figure: str = "seconds") -> float:
    """Median of the ratios of neighbours."""
    return median(getattr(a, figure) / getattr(b, figure) for a, b in zip(upper, lower, strict=True))


class Failed(Exception):
    """The process ended without a result."""


class Different(Exception):
    """The two sides do not give the same result: there is nothing to compare."""


def _memory(device: str) -> tuple[int, int]:
    """Bytes in use now, and at the peak so far."""
    if device == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # a process's resource usage on Linux begins with its parent's
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def _work(connection, threads: int, prepare: Callable, run: Callable, device: str, arguments: tuple) -> None:
    torch.set_num_threads(threads)
    inputs = prepare(device, *arguments)
    if device == "cuda":  # kernels are compiled and libraries loaded by the first call
        run(*inputs)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before, _ = _memory(device)
    start, busy = time.perf_counter(), time.process_time()
    result = run(*inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    cost = Cost(time.perf_counter() - start, time.process_time() - busy, _memory(device)[1] - before)
    connection.send((cost, result))
    connection.close()


def measure(prepare: Callable, run: Callable, device: str, *arguments) -> tuple[Cost, object]:
    """Cost of `run(*prepare(device, *arguments))`, the preparation not counted, and what it returned.

    Both functions must be importable by name, and the result must go through a pipe. Raises Failed when there is none, most often for want
    of memory.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    work = (theirs, torch.get_num_threads(), prepare, run, device, arguments)
    process = multiprocessing.get_context("spawn").Process(target=_work, args=work)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise Failed(f"{run.__module__}.{run.__name__} of {arguments} ended without a result; is there enough memory?") from None
    finally:
        process.join()
