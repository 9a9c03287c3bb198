"""Peak memory and time of a piece of work, in a process of its own so that nothing else is counted."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """`seconds` of wall time; `bytes` of host memory at the peak, above what stood there before the work began."""

    seconds: float
    bytes: int


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _work(connection, prepare: Callable, run: Callable, arguments: tuple) -> None:
    inputs = prepare(*arguments)
    before = _peak()
    start = time.perf_counter()
    result = run(*inputs)
    connection.send((time.perf_counter() - start, _peak() - before, result))
    connection.close()


def measure(prepare: Callable, run: Callable, *arguments) -> tuple[Cost, object]:
    """Cost of `run(*prepare(*arguments))`, the preparation not counted, and what it returned. All must be importable by name."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(theirs, prepare, run, arguments))
    process.start()
    theirs.close()
    try:
        seconds, size, result = ours.recv()
    except EOFError:
        raise SystemExit(f"{run.__module__}.{run.__name__} of {arguments} ended without a result; is there enough memory?") from None
    finally:
        process.join()
    return Cost(seconds, size), result
