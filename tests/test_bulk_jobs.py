"""Many jobs: each has an outcome whatever the others do, and a folder that a kill, a full disk or a second run does not spoil."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import bulk_workers
import pytest

from decaf import files
from decaf.bulk import Job, RunFolder, run, run_jobs
from decaf.bulk.jobs import check_keys, is_key
from decaf.errors import DecafError, OutputError
from decaf.report import Report

KEYS = ["a", "b", "c"]


def jobs(*payloads):
    return [Job(key, payload) for key, payload in zip("abcdefgh", payloads, strict=False)]


@pytest.mark.parametrize("key", ["a", "A1", "dog-3_x.y", "0", "x" * 120])
def test_keys_that_name_files(key):
    assert is_key(key)


@pytest.mark.parametrize(
    "key", ["", ".", "..", "-a", ".a", "a/b", "a\\b", "a b", "é", "a.", "con", "NUL.txt", "x" * 121, "a\0", "a\n", "a:b"]
)
def test_keys_that_do_not(key):
    assert not is_key(key)
    with pytest.raises(DecafError, match="no safe file name"):
        check_keys([Job(key, None)])


def test_keys_are_told_apart_by_more_than_their_case():
    with pytest.raises(DecafError, match='"Dog" is there twice'):
        list(run_jobs([Job("dog", None), Job("Dog", None)], bulk_workers.make))


def test_one_process_keeps_the_order_and_each_failure_to_its_job(caplog):
    outcomes = list(run_jobs(jobs(None, "fails", "breaks", None), bulk_workers.make))
    assert [one.key for one in outcomes] == ["a", "b", "c", "d"]
    assert [one.record for one in outcomes] == [{"key": "a"}, None, None, {"key": "d"}]
    assert outcomes[1].error == "This one fails."
    assert outcomes[2].error.startswith("Unexpected KeyError")
    assert "Job c met an unexpected error" in caplog.text
    assert {one.tries for one in outcomes} == {1}


def test_what_cannot_be_written_ends_the_run_and_keeps_what_is_done():
    outcomes = run_jobs(jobs(None, "full", None), bulk_workers.make)
    assert next(outcomes).key == "a"
    with pytest.raises(OutputError, match="disk is full"):
        next(outcomes)


def test_models_that_cannot_be_loaded_end_the_run():
    with pytest.raises(DecafError, match="There are no models"):
        list(run_jobs(jobs(None), bulk_workers.no_models))


def test_no_jobs_load_nothing():
    assert list(run_jobs([], bulk_workers.no_models)) == []


def test_workers_below_one():
    with pytest.raises(DecafError, match="0 workers"):
        list(run_jobs(jobs(None), bulk_workers.make, workers=0))


def test_without_ray_one_process_does_it_and_says_so(monkeypatch):
    monkeypatch.setattr(run, "is_installed", lambda: False)
    said = []
    outcomes = list(run_jobs(jobs(None, None), bulk_workers.make, workers=4, tell=said.append))
    assert [one.key for one in outcomes] == ["a", "b"]
    assert len(said) == 1 and "comfyui-decaf[cluster]" in said[0]


class Stop(Exception):
    pass


def test_progress_counts_and_cancels():
    seen = []

    def watch(done, total, what):
        seen.append((done, total))
        if done == 2:
            raise Stop

    outcomes = run_jobs(jobs(None, None, None), bulk_workers.make, report=watch)
    assert [next(outcomes).key, next(outcomes).key] == ["a", "b"]
    with pytest.raises(Stop):
        next(outcomes)
    assert seen == [(0, 3), (1, 3), (2, 3)]


class Long:
    """A worker that reports, as those with models do."""

    def __init__(self):
        self.report = Report()

    def __call__(self, job):
        for step in range(1000):
            self.report.progress(step, 1000, "Long")
        return {}


def test_a_worker_s_own_progress_cancels_it_in_the_middle():
    calls = []

    def watch(done, total, what):
        calls.append(what)
        if len(calls) > 10:
            raise Stop

    with pytest.raises(Stop):
        list(run_jobs(jobs(None), Long, report=watch))
    assert len(calls) == 11


def test_a_run_folder_is_taken_up_again(tmp_path):
    with RunFolder(tmp_path / "out", {"model": "a", "stage": {"frames": 16}}) as folder:
        assert not folder.done("a")
        folder.finish("a", {"x": [1, 2], "text": "ü"})
        assert folder.done("a")
    with RunFolder(tmp_path / "out", {"stage": {"frames": 16}, "model": "a"}) as folder:
        assert folder.done("a") and not folder.done("b")
        assert folder.record("a") == {"x": [1, 2], "text": "ü"}
        folder.forget("a")
        assert not folder.done("a")
    with RunFolder(tmp_path / "out", {"model": "a", "stage": {"frames": 16}}) as folder:
        assert not folder.done("a")


def test_other_settings_are_refused_by_name(tmp_path):
    with RunFolder(tmp_path, {"model": "a", "stage": {"frames": 16}}):
        pass
    with pytest.raises(DecafError, match="stage.frames was 16 and is 8, new was not there and is true. Give the same ones"):
        RunFolder(tmp_path, {"model": "a", "stage": {"frames": 8}, "new": True}).__enter__()
    with RunFolder(tmp_path, {"model": "a", "stage": {"frames": 16}}):  # the lock was given back
        pass


def test_two_runs_into_one_folder(tmp_path):
    with RunFolder(tmp_path, {}), pytest.raises(DecafError, match="Another run is writing"):
        RunFolder(tmp_path, {}).__enter__()


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff", '"x"', "[" * 100_000])
def test_a_file_of_that_name_that_is_not_ours(tmp_path, content):
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(DecafError, match="not one of ours"):
        RunFolder(tmp_path, {}).__enter__()
    assert (tmp_path / "run.json").read_text(encoding="latin-1") == content


def test_a_damaged_record_is_told_and_done_again(tmp_path):
    with RunFolder(tmp_path, {}) as folder:
        folder.finish("a", {})
        (tmp_path / "records" / "a.json").write_text("{")
        with pytest.raises(DecafError, match="a.json is damaged"):
            folder.record("a")
        assert not folder.done("a")


def test_a_file_where_the_records_belong(tmp_path):
    (tmp_path / "records").write_text("")
    with pytest.raises(DecafError, match="Give a folder"):
        RunFolder(tmp_path, {}).__enter__()
    (tmp_path / "file").write_text("")
    with pytest.raises(DecafError, match="Give a folder"):
        RunFolder(tmp_path / "file", {}).__enter__()


def test_a_full_disk_stops_and_can_be_gone_on_from(tmp_path, monkeypatch):
    replace, full = os.replace, OSError(errno.ENOSPC, "No space left on device")

    def no_space(source, target):
        if str(target).endswith("b.json"):
            raise full
        replace(source, target)

    def work():
        with RunFolder(tmp_path, {}) as folder:
            for outcome in run_jobs([job for job in jobs(*KEYS) if not folder.done(job.key)], bulk_workers.make):
                folder.finish(outcome.key, outcome.record)

    monkeypatch.setattr(files.os, "replace", no_space)
    with pytest.raises(OutputError, match="The disk is full"):
        work()
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == ["a.json"]
    monkeypatch.setattr(files.os, "replace", replace)
    work()
    assert sorted(path.stem for path in (tmp_path / "records").iterdir()) == KEYS


KILLED = """
import os, signal, sys
from pathlib import Path
import bulk_workers
from decaf import files
from decaf.bulk import Job, RunFolder, run_jobs

count, at = 0, int(sys.argv[2])
def step(function):
    def counted(*args, **kwargs):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counted
for name in ("replace", "open", "unlink"):
    setattr(os, name, step(getattr(os, name)))
files.json.dumps = step(files.json.dumps)
with RunFolder(Path(sys.argv[1]), {"a": 1}) as folder:
    for outcome in run_jobs([Job(f"k{n}", None) for n in range(4) if not folder.done(f"k{n}")], bulk_workers.make):
        folder.finish(outcome.key, outcome.record)
"""


def test_a_kill_at_any_moment_loses_the_job_under_way_at_most(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = 0
    for at in range(1, 40, 3):
        out = tmp_path / str(at)
        command = [sys.executable, "-c", KILLED, str(out)]
        first = subprocess.run([*command, str(at)], env=environment, capture_output=True)
        killed += first.returncode == -signal.SIGKILL
        records = sorted((out / "records").glob("[!.]*")) if out.exists() else []
        assert [json.loads(path.read_text()) for path in records] == [{"key": path.stem} for path in records]
        assert [path.stem for path in records] == [f"k{number}" for number in range(len(records))]
        subprocess.run([*command, "0"], env=environment, check=True)
        assert sorted(path.stem for path in (out / "records").glob("[!.]*")) == ["k0", "k1", "k2", "k3"]
        if first.returncode == 0:
            break
    assert killed >= 4


def test_what_the_engine_itself_costs(tmp_path):
    """The shortest clip of the smallest models takes 200 ms; a row of the engine's own work must be far below 5 % of that."""
    many = [Job(f"job-{number}", None) for number in range(1000)]
    begin = time.process_time()
    with RunFolder(tmp_path, {}) as folder:
        for outcome in run_jobs(many, bulk_workers.make):
            folder.finish(outcome.key, outcome.record)
    assert (time.process_time() - begin) / len(many) < 0.005
