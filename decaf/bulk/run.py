"""Independent jobs, one after the other in this process, or by workers of their own on Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from ..errors import DecafError
from ..report import Progress, Report, silent
from .jobs import STEP, Job, Outcome, Worker, attempt, check_keys
from .on_ray import is_installed, run_on_ray

log = logging.getLogger(__name__)

NO_RAY = "Ray is not installed, so everything is done in one process. For more workers: pip install comfyui-decaf[cluster]"


def run_jobs(
    jobs: Sequence[Job],
    make_worker: Callable[[], Worker],
    *,
    workers: int = 1,
    gpus_per_worker: float | None = None,
    address: str | None = None,
    report: Progress | Report = silent,
    tell: Callable[[str], None] = log.warning,
) -> Iterator[Outcome]:
    """Does the jobs, and gives the outcome of each as soon as there is one.

    With one worker and no address: in this process, in their order. Else in processes that Ray starts, here or on the cluster at `address`; a job
    goes to whoever is free. A worker that dies is replaced, and its job begun again, three times at most in all. Without Ray installed: as with one
    worker.

    Args:
        make_worker: makes a worker, in the process in which it works; so it must be picklable, and what is loaded is loaded once a process.
        workers: how many at a time, at least 1.
        gpus_per_worker: share of a GPU that Ray keeps for each; None: one if there are any, else none.
        address: of a Ray cluster, such as "10.0.0.1:6379" or "auto".
        report: told how many jobs are done; what its callback raises stops the run.
        tell: is given each sentence about the run itself: that a worker has died, that Ray is missing.

    Raises DecafError for keys that are not unique, for models that cannot be loaded, for a cluster that cannot be used or goes away; `OutputError`
    when results cannot be written. Jobs whose outcome was given are done, whatever follows.
    """
    check_keys(jobs)
    if workers < 1:
        raise DecafError(f"{workers} workers were asked for. Give at least 1.")
    report = Report.of(report)
    if not jobs:
        return
    if workers > 1 or address is not None:
        if is_installed():
            yield from run_on_ray(jobs, make_worker, workers, gpus_per_worker, address, report, tell)
            return
        tell(NO_RAY)
    yield from _in_this_process(jobs, make_worker, report)


def _in_this_process(jobs: Sequence[Job], make_worker: Callable[[], Worker], report: Report) -> Iterator[Outcome]:
    report.progress(0, len(jobs), STEP)
    worker = make_worker()
    if hasattr(worker, "report"):
        worker.report = Report(lambda *_: report.check_cancelled())
    ahead = getattr(worker, "ahead", None)
    for number, job in enumerate(jobs, 1):
        if ahead is not None and number < len(jobs):
            ahead(jobs[number])
        yield attempt(worker, job, report)
        report.progress(number, len(jobs), STEP)
