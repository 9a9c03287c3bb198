"""Jobs on Ray: the same results as in one process, whatever happens to the workers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import bulk_workers
import pytest
from small_batch import OPTIONS, results, write_manifest

from decaf.bulk import Job, on_ray, run_jobs
from decaf.command import main as cli
from decaf.errors import DecafError, OutputError

pytestmark = [
    pytest.mark.skipif(not on_ray.is_installed(), reason="Ray, an optional dependency, is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]


def processes_below(parent: int) -> dict[int, str]:
    """Processes that come of `parent`, with their titles."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat, title = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            titles[int(entry.name)] = title.replace(b"\0", b" ").decode(errors="replace")
    below, more = {}, {parent}
    while more:
        more = {pid for pid, above in parents.items() if above in more} - below.keys()
        below |= {pid: titles[pid] for pid in more}
    return below


@pytest.mark.slow
def test_forty_rows_on_two_workers_one_of_which_is_killed(tmp_path):
    manifest = write_manifest(tmp_path, clips=10, queries=4)
    command = [sys.executable, "-m", "decaf", "batch", str(manifest), *OPTIONS, "--out", str(tmp_path / "two"), "--workers", "2"]
    two = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed, listening, below = None, set(), {}
    while two.poll() is None and killed is None:
        time.sleep(0.05)
        if len(list((tmp_path / "two" / "records").glob("*.json"))) >= 8:
            below = processes_below(two.pid)
            workers = [pid for pid, title in below.items() if title.startswith("ray::_Actor.work")]
            if len(workers) == 2:
                listening = addresses_that_listen(below)
                killed = workers[0]
                os.kill(killed, signal.SIGKILL)
    told, errors = two.communicate(timeout=300)
    assert killed is not None
    assert two.returncode == 0, errors
    assert "40 of 40 rows done" in told
    assert "begun again because a worker had died" in told
    # Nothing of Ray's own reaches the terminal.
    assert [line for line in errors.splitlines() if "died during" not in line and " rows, " not in line] == []
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert (report["done"], report["failed"], report["left"]) == (40, 0, 0)
    assert report["begun_again"] and set(report["begun_again"].values()) == {2}
    assert any("died during" in note for note in report["notes"])
    assert listening and listening <= {"127.0.0.1", "::1"}
    assert not [title for title in below.values() if "uv run" in title], "a worker needs no environment of its own, also under uv"

    assert cli.main(["batch", str(manifest), *OPTIONS, "--out", str(tmp_path / "one"), "--quiet"]) == 0
    one, other = results(tmp_path / "one"), results(tmp_path / "two")
    assert len(one) == 40 * (2 + 1 + 1) + 1  # masks, result.json and record of each; run.json
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_batch_on_two_workers_that_is_stopped_is_gone_on_from(tmp_path, number, code):
    manifest = write_manifest(tmp_path, clips=12, queries=2)
    command = [sys.executable, "-m", "decaf", "batch", str(manifest), *OPTIONS, "--out", str(tmp_path / "out")]
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a shell has what runs in its background ignore it
    with subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True, **heeding) as process:
        while process.poll() is None and not list((tmp_path / "out" / "records").glob("*.json")):
            time.sleep(0.02)
        below = processes_below(process.pid)
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Run the same command again to go on in" in told and "Traceback" not in told
    until = time.monotonic() + 60
    while left := [pid for pid in below if "ray" in title(pid)]:
        assert time.monotonic() < until, left
        time.sleep(0.2)
    done = len(list((tmp_path / "out" / "records").glob("[!.]*")))
    assert 0 < done < 24
    assert cli.main([*command[3:], "--quiet"]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["done_earlier"] == done
    assert cli.main(["batch", str(manifest), *OPTIONS, "--out", str(tmp_path / "one"), "--quiet"]) == 0
    assert results(tmp_path / "one") == results(tmp_path / "out")


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def addresses_that_listen(pids) -> set[str]:
    """Of all TCP sockets of those processes on which somebody may call."""
    sockets = set()
    for pid in pids:
        try:
            sockets |= {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        except OSError:
            continue
    found = set()
    for table, kind in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                words = bytes.fromhex(fields[1].partition(":")[0])
                packed = b"".join(words[place : place + 4][::-1] for place in range(0, len(words), 4))
                found.add(socket.inet_ntop(kind, packed).removeprefix("::ffff:"))
    return found


@pytest.fixture(scope="module")
def ray_runs():
    """One Ray for several tests, as a program has that calls us with a Ray of its own."""
    with on_ray._connected(None, 2):
        yield


@pytest.mark.slow
def test_jobs_go_to_whoever_is_free_and_models_are_loaded_once(ray_runs, tmp_path):
    from functools import partial

    jobs = [Job(f"k{number}", None) for number in range(20)]
    before = dict(os.environ)
    outcomes = list(run_jobs(jobs, partial(bulk_workers.make_marked, str(tmp_path)), workers=2))
    assert sorted(one.key for one in outcomes) == sorted(job.key for job in jobs)
    workers = {one.record["pid"] for one in outcomes}
    assert len(list(tmp_path.glob("loaded-*"))) == len(workers) == 2
    assert os.getpid() not in workers
    assert dict(os.environ) == before


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_job_begun_again_twice(ray_runs, tmp_path):
    said = []
    jobs = [Job("a", None), Job("b", "dies"), Job("c", ["dies once", str(tmp_path)]), Job("d", "fails"), Job("e", "breaks"), Job("f", None)]
    outcomes = {one.key: one for one in run_jobs(jobs, bulk_workers.make, workers=2, tell=said.append)}
    assert {key: one.tries for key, one in outcomes.items()} == {"a": 1, "b": 3, "c": 2, "d": 1, "e": 1, "f": 1}
    assert {key: one.record for key, one in outcomes.items() if one.error is None} == {key: {"key": key} for key in "acf"}
    assert "died each of 3 times" in outcomes["b"].error
    assert outcomes["d"].error == "This one fails." and outcomes["e"].error.startswith("Unexpected KeyError")
    assert sum("job b" in sentence for sentence in said) == 3 and sum("job c" in sentence for sentence in said) == 1


@pytest.mark.slow
def test_what_no_worker_would_do_better_ends_the_run(ray_runs):
    with pytest.raises(OutputError, match="disk is full"):
        list(run_jobs([Job("a", "full"), Job("b", None)], bulk_workers.make, workers=2))
    with pytest.raises(DecafError, match="There are no models"):
        list(run_jobs([Job("a", None)], bulk_workers.no_models, workers=2))
    with pytest.raises(DecafError, match="die while they load"):
        list(run_jobs([Job("a", None)], bulk_workers.died_loading, workers=2, tell=lambda sentence: None))


@pytest.mark.slow
def test_a_run_is_cancelled_within_a_second(ray_runs):
    class Stop(Exception):
        pass

    begin = []

    def watch(done, total, what):
        if done == 1:
            begin.append(time.monotonic())
            raise Stop

    jobs = [Job("a", None), Job("b", ["waits", 600]), Job("c", ["waits", 600])]
    with pytest.raises(Stop):
        list(run_jobs(jobs, bulk_workers.make, workers=2, report=watch))
    assert time.monotonic() - begin[0] < 5  # on a busy machine


@pytest.mark.slow
def test_more_gpus_than_there_are(ray_runs):
    with pytest.raises(DecafError, match="2 workers with 100 GPU each were asked for"):
        list(run_jobs([Job("a", None)], bulk_workers.make, workers=2, gpus_per_worker=100))


@pytest.mark.slow
def test_a_cluster_that_goes_away_is_a_sentence(ray_runs, monkeypatch):
    monkeypatch.setattr(on_ray, "_BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr(on_ray.socket, "create_connection", _refused)
    outcomes = run_jobs([Job("a", None), Job("b", ["waits", 600])], bulk_workers.make, workers=1, address="auto")
    with pytest.raises(DecafError, match="has gone away. What was done by then is kept"):
        list(outcomes)


def _refused(*_, **__):
    raise ConnectionRefusedError
