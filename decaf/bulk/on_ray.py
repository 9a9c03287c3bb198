"""Jobs on Ray: workers in processes of their own, here or on a cluster. All that the project knows about Ray is here."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice

from ..errors import DecafError, OutputError, reason, shown
from ..report import Report
from .jobs import MOST_TRIES, STEP, Job, Outcome, Worker, attempt

_WAIT = 0.2
"""Seconds between two looks at whether the run is to stop."""

_BETWEEN_LOOKS, _MOST_FAILED = 3.0, 3
"""Seconds between two looks for the cluster, and how many of them in a row find nobody when it has gone."""

_LONGEST_END = 20.0
"""Seconds that the end of Ray is waited for."""

_MOST_STARTS = 3

_MOST_LOADS = 3
"""How often in a row workers may die before they have done anything."""

_STORE_BYTES = 128 << 20
"""For Ray's own store of objects, by default a third of the memory: jobs and records are small."""


def is_installed() -> bool:
    return find_spec("ray") is not None


@dataclass
class _Hand:
    """A worker's process. `job`, `tries`: what it does now; None while it loads its models, or is free. `next`: key of the job that it prepares."""

    number: int
    actor: object
    job: Job | None = None
    tries: int = 0
    next: str | None = None


def run_on_ray(
    jobs: Sequence[Job],
    make_worker: Callable[[], Worker],
    workers: int,
    gpus_per_worker: float | None,
    address: str | None,
    report: Report,
    tell: Callable[[str], None],
) -> Iterator[Outcome]:
    """`run_jobs` with Ray."""
    with _connected(address, workers) as watch:
        options = _share(workers, gpus_per_worker)
        yield from _Crew(jobs, make_worker, min(workers, len(jobs)), options, report, tell, watch).run()


class _Crew:
    """Workers, and what is left for them to do."""

    def __init__(self, jobs, make_worker, workers: int, options: dict, report: Report, tell: Callable[[str], None], watch: _Watch):
        import ray

        self._ray, self._make_worker, self._options = ray, ray.put(make_worker), options
        self._report, self._tell, self._watch = report, tell, watch
        self._left = deque((job, 0) for job in jobs)
        self._total, self._done, self._deaths = len(jobs), 0, 0
        self._busy: dict[object, _Hand] = {}
        self._count, self._workers = 0, workers

    def run(self) -> Iterator[Outcome]:
        self._report.progress(0, self._total, STEP)
        try:
            for _ in range(self._workers):
                self._hire()
            while self._done < self._total:
                self._report.check_cancelled()
                self._watch.check()
                ready, _ = self._ray.wait(list(self._busy), timeout=_WAIT)
                for reference in ready:
                    outcome = self._look(self._busy.pop(reference), reference)
                    if outcome is not None:
                        self._done += 1
                        yield outcome
                        self._report.progress(self._done, self._total, STEP)
        finally:
            for hand in self._busy.values():
                with suppress(Exception):
                    self._ray.kill(hand.actor)

    def _hire(self) -> None:
        self._count += 1
        hand = _Hand(self._count, self._ray.remote(_Actor).options(**self._options).remote(sys.path))
        self._busy[hand.actor.load.remote(self._make_worker)] = hand

    def _look(self, hand: _Hand, reference) -> Outcome | None:
        """What a worker has come to; it gets the next job, if there is one."""
        from ray.exceptions import RayActorError, RayTaskError

        try:
            found = self._ray.get(reference)
        except RayActorError:
            return self._replace(hand)
        except RayTaskError as error:  # what is sent to it cannot be understood there: a module is missing
            raise DecafError(f"A worker cannot work ({reason(error.cause or error)}). Install the same on all machines.") from error
        if isinstance(found, Exception):  # no worker would fare better
            raise found
        self._deaths = 0
        outcome = None
        if hand.job is not None:
            outcome = Outcome(hand.job.key, found.record, found.error, hand.tries)
        if self._left:
            hand.job, before = self._take(hand.next)
            hand.tries = before + 1
            ahead = self._unprepared()
            hand.next = ahead.key if ahead is not None else None
            self._busy[hand.actor.work.remote(hand.job, ahead)] = hand
        else:
            self._ray.kill(hand.actor)
        return outcome

    def _take(self, prepared: str | None) -> tuple[Job, int]:
        """The job that a worker has prepared, if nobody else has taken it; else the first that is left."""
        for place, (job, tries) in enumerate(islice(self._left, 2 * self._workers)):
            if job.key == prepared:
                del self._left[place]
                return job, tries
        return self._left.popleft()

    def _unprepared(self) -> Job | None:
        """The first job that is left and that no worker prepares."""
        prepared = {hand.next for hand in self._busy.values()}
        return next((job for job, _ in islice(self._left, 2 * self._workers) if job.key not in prepared), None)

    def _replace(self, hand: _Hand) -> Outcome | None:
        """After a worker's death."""
        self._deaths += 1
        outcome = None
        if hand.job is None:
            self._tell(f"Worker {hand.number} died while it loaded its models.")
            if self._deaths >= _MOST_LOADS:
                raise DecafError(
                    "Workers die while they load their models; memory may be short. Ask for fewer workers, or give each a GPU of its own."
                )
        elif hand.tries < MOST_TRIES:
            self._tell(f"Worker {hand.number} died during job {hand.job.key}, which is begun again.")
            self._left.appendleft((hand.job, hand.tries))
        else:
            self._tell(f"Worker {hand.number} died during job {hand.job.key}, which is given up.")
            outcome = Outcome(hand.job.key, None, f"The worker's process died each of {hand.tries} times; memory may be short.", hand.tries)
        if self._left:
            self._hire()
        return outcome


class _Actor:
    """Lives in a worker's process. `paths`: where the caller finds modules."""

    def __init__(self, paths: list[str]):
        sys.path += [path for path in paths if path not in sys.path]

    def load(self, make_worker: Callable[[], Worker]) -> Exception | None:
        try:
            self._worker = make_worker()
        except DecafError as error:
            return _plain(error)
        return None

    def work(self, job: Job, ahead: Job | None) -> Outcome | Exception:
        if ahead is not None and hasattr(self._worker, "ahead"):
            self._worker.ahead(ahead)
        try:
            return attempt(self._worker, job)
        except OutputError as error:
            return _plain(error)


def _plain(error: DecafError) -> DecafError:
    """The sentence alone: what it was raised from may be impossible to pickle."""
    return OutputError(str(error)) if isinstance(error, OutputError) else DecafError(str(error))


@contextmanager
def _connected(address: str | None, workers: int) -> Iterator[_Watch]:
    """Within it, Ray is there: the caller's own, the cluster at `address`, or one of our own that ends with it."""
    _prepare_environment(address)
    import ray

    if ray.is_initialized():  # by the program that calls us, whose cluster it is
        with _Watch() as watch:
            yield watch
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "decaf"}
    with tempfile.TemporaryDirectory(prefix="decaf-", ignore_cleanup_errors=True) as folder:
        try:
            if address is None:
                _start(folder, workers, quiet)
            else:
                _join(address, quiet)
            with _Watch() as watch:
                yield watch
        finally:
            _leave()


def _start(folder: str, workers: int, options: dict) -> None:
    """A Ray of our own. On a busy machine it may take longer to start than it allows itself."""
    import ray

    for left in reversed(range(_MOST_STARTS)):
        try:
            with _signals_kept():
                ray.init(
                    "local", num_cpus=max(workers, os.cpu_count() or 1), include_dashboard=False, object_store_memory=_STORE_BYTES,
                    _temp_dir=folder, **options,
                )  # fmt: skip
            return
        except Exception as error:
            _leave()
            if not left:
                raise DecafError(
                    f"Ray cannot be started here ({reason(error)}). Try again when the machine is less busy, or leave out --workers."
                ) from error


def _join(address: str, options: dict) -> None:
    import ray

    try:
        with _signals_kept():
            ray.init(address, **options)
    except Exception as error:
        raise DecafError(
            f"The Ray cluster at {shown(address)} cannot be reached ({reason(error)}). Check --address and that the cluster runs, or leave "
            "it out to work on this machine alone."
        ) from error


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts a handler of its own in the place of the program's, which lets the program end as it does without Ray."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _prepare_environment(address: str | None) -> None:
    """Ray and the processes that it starts read these, Ray some of them while it is imported."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Started by `uv run`, Ray would pack the current folder and build an environment anew for each worker. Workers are to be what this process is.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a worker without a share of a GPU sees what this process sees
    # What Ray itself prints, such as that a worker has died: we tell it, with the job.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "(?s).*")
    if address is None and "ray" not in sys.modules:
        # A Ray of our own listens on the loopback interface alone, and to those who know a word that is made up for it; as it would otherwise
        # write that word into the home folder.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def _leave() -> None:
    """Waits for Ray to end, but not for a cluster that is no longer there."""
    import ray

    ending = threading.Thread(target=ray.shutdown, daemon=True)
    ending.start()
    ending.join(_LONGEST_END)


class _Watch:
    """Looks whether the cluster is still there, while it is entered. Without it, Ray ends this process, a minute after its head has gone."""

    def __init__(self):
        import ray

        self.address = ray.get_runtime_context().gcs_address
        host, _, port = self.address.rpartition(":")
        self._where = host.strip("[]"), int(port)
        self._gone, self._ended = threading.Event(), threading.Event()

    def __enter__(self) -> _Watch:
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    def check(self) -> None:
        """DecafError if the cluster has gone."""
        if self._gone.is_set():
            raise DecafError(
                f"The Ray cluster at {self.address} has gone away. What was done by then is kept; run again when it is back, or without --address."
            )

    def _look(self) -> None:
        failed = 0
        while failed < _MOST_FAILED and not self._ended.wait(_BETWEEN_LOOKS):
            try:
                socket.create_connection(self._where, timeout=_BETWEEN_LOOKS).close()
                failed = 0
            except OSError:
                failed += 1
        if failed:
            self._gone.set()


def _share(workers: int, gpus_per_worker: float | None) -> dict:
    """What Ray keeps for each worker. DecafError if the cluster has less than that for all."""
    import ray

    there = ray.cluster_resources()
    gpus = gpus_per_worker if gpus_per_worker is not None else min(1.0, there.get("GPU", 0))
    if gpus * workers > there.get("GPU", 0):
        raise DecafError(
            f"{workers} workers with {gpus:g} GPU each were asked for, and there are {there.get('GPU', 0):g}. "
            "Ask for fewer workers, or give --gpus-per-worker a share such as 0.5."
        )
    return {"num_cpus": 1, "num_gpus": gpus, "max_restarts": 0}
