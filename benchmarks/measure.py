"""Peak memory and time of a piece of work, in a process of its own so that nothing else is counted."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cost:
    """`seconds` of wall time; `bytes` of memory at the peak, above what stood there before the work began: the host's on a CPU, the
    device's on a GPU."""

    seconds: float
    bytes: int


class Failed(Exception):
    """The process ended without a result."""


class Different(Exception):
    """The two sides do not give the same result: there is nothing to compare."""


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _work(connection, threads: int, prepare: Callable, run: Callable, device: str, arguments: tuple) -> None:
    torch.set_num_threads(threads)
    inputs = prepare(device, *arguments)
    if device == "cuda":  # kernels are compiled and libraries loaded by the first call
        run(*inputs)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = _peak(device)
    start = time.perf_counter()
    result = run(*inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    connection.send((time.perf_counter() - start, _peak(device) - before, result))
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
        seconds, size, result = ours.recv()
    except EOFError:
        raise Failed(f"{run.__module__}.{run.__name__} of {arguments} ended without a result; is there enough memory?") from None
    finally:
        process.join()
    return Cost(seconds, size), result
