"""What a job is, and what becomes of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import DecafError, OutputError, reason, shown
from ..report import Report

log = logging.getLogger(__name__)

MOST_TRIES = 3
"""How often a job is begun whose worker dies meanwhile: once, and twice again."""

STEP = "Jobs"
"""Name of the step that `run_jobs` reports."""


@dataclass(frozen=True)
class Job:
    """What one call of a worker does.

    Attributes:
        key: unique among the jobs of a run, also where small and capital letters are the same, and safe as a file name; see `check_keys`.
        payload: anything that can be pickled.
    """

    key: str
    payload: object


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        record: what its worker returned, to be written as JSON; None if the job failed.
        error: why it failed, in a sentence; None if it did not.
        tries: how often it was begun; more than 1 if a worker died meanwhile.
    """

    key: str
    record: dict | None
    error: str | None
    tries: int = 1


Worker = Callable[[Job], dict]
"""`worker(job) -> record`, what `json.dumps` takes. It raises DecafError when this job fails, and `OutputError` when no other would fare better,
since nothing can be written. An attribute `report`, if it has one, is set to a `Report` which cancels its work; a method `ahead` is called with the
job that is probably the next, before each one."""

_KEY = re.compile(r"[^\W_][\w.+=@-]{0,119}", re.ASCII)
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


def is_key(key: str) -> bool:
    """Whether `key` is safe as a file name on every system: at most 120 of the letters A-Z, a-z, digits and _.+=@-, the first one a letter or a
    digit, the last one no dot, and no name of a Windows device."""
    return bool(_KEY.fullmatch(key)) and not key.endswith(".") and not _DEVICES.fullmatch(key)


def check_keys(jobs: Sequence[Job]) -> None:
    """DecafError if a key is no safe file name, or is there twice."""
    seen: dict[str, str] = {}
    for job in jobs:
        if not is_key(job.key):
            raise DecafError(f'The key "{shown(job.key)}" is no safe file name. Use letters, digits and _.+=@-, at most 120.')
        folded = job.key.casefold()
        if folded in seen:
            raise DecafError(f'The key "{job.key}" is there twice (as "{seen[folded]}"). Give each job one of its own.')
        seen[folded] = job.key


def attempt(worker: Worker, job: Job, report: Report | None = None) -> Outcome:
    """One job. Whatever goes wrong is its outcome, but for what ends the run: results that cannot be written, and what `report` raised."""
    try:
        return Outcome(job.key, worker(job), None)
    except OutputError:
        raise
    except DecafError as error:
        return Outcome(job.key, None, str(error))
    except Exception as error:
        if report is not None and report.cancelled_by(error):
            raise
        # One of ten thousand jobs that meets an error of ours must not end the others.
        log.warning("Job %s met an unexpected error.", job.key, exc_info=error)
        return Outcome(job.key, None, f"Unexpected {type(error).__name__}: {reason(error)}. Please report this, with the log.")
