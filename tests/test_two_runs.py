"""Two runs at once: into one folder only one of them writes, and two that write the same file leave one of the two, whole."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from short_runs import masks, read

from decaf import folder_lock
from decaf.command import main as cli
from decaf.command import segment as command
from decaf.errors import DecafError
from decaf.files import atomic_write
from decaf.folder_lock import NAME, FolderLocks

pytestmark = pytest.mark.slow

HOLDS = """
import sys, time
from pathlib import Path
from decaf.folder_lock import FolderLocks
with FolderLocks() as locks:
    for folder in sys.argv[1:]:
        locks.take(Path(folder))
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """holder(folder, ...) -> another process that holds them until its standard input is closed."""
    started = []

    def start(*folders):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, *map(str, folders)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_two_processes_into_one_folder(line, tmp_path, monkeypatch):
    """Started together, with different queries: one ends well and its result is whole, the other is told so and has touched nothing."""
    out = tmp_path / "out"
    queries = ("the red square", "the blue slope")
    alone = {}
    method = ("--method", "as-published")  # by which the random models give the two different masks
    for query in queries:
        assert cli.main(line(*method, query=query)) == 0
        alone[query + "."] = masks(out / "masks")
    assert not np.array_equal(*alone.values())
    for _ in range(3):
        commands = [[sys.executable, "-m", "decaf", *line(*method, query=query)] for query in queries]
        runs = [subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for one in commands]
        told = [run.communicate(timeout=300)[1] for run in runs]
        codes = [run.returncode for run in runs]
        result = read(out)
        if codes == [0, 0]:  # one had ended before the other began to write
            continue
        assert sorted(codes) == [0, 2], told
        assert "Another run is writing into" in told[codes.index(2)] and "Traceback" not in "".join(told)
        assert result["query"] == queries[codes.index(0)] + "."
        assert np.array_equal(masks(out / "masks"), alone[result["query"]])
        assert {path.name for path in out.iterdir()} == {"attention.png", "attention.safetensors", "masks", "overlay.mp4", "result.json"}
        return
    pytest.fail("the two never ran at once")


@pytest.mark.parametrize("more", [[], ["--resume"], ["--query", "the blue slope"]])
def test_the_second_run_loads_and_touches_nothing(line, tmp_path, holder, monkeypatch, capsys, more):
    out = tmp_path / "out"
    assert cli.main(line()) == 0
    holder(out)
    before = files(out)
    for name in ("open_clip", "load_segmenter", "load_mllm", "find_mllm"):
        monkeypatch.setattr(command, name, lambda *args, **kwargs: pytest.fail("something was loaded"))
    assert cli.main(line(*more)) == 2
    assert f"Another run is writing into {out}" in capsys.readouterr().err
    assert files(out) == before


def test_the_demo_waits_for_nobody(tmp_path, holder, capsys):
    """It writes a clip of its own into the folder, before the run begins."""
    assert cli.main(["demo", "--out", str(tmp_path), "--frames", "2", "--quiet"]) == 0
    assert not list(tmp_path.rglob(".*"))
    holder(tmp_path)
    before = files(tmp_path)
    assert cli.main(["demo", "--out", str(tmp_path), "--frames", "3"]) == 2
    assert "Another run" in capsys.readouterr().err and files(tmp_path) == before


def test_the_folder_of_one_query_is_another_runs_folder(line, tmp_path, holder, capsys):
    """query-2 in --out: a run of several queries would write into it, and one of a single query would clear it at its end."""
    out = tmp_path / "out"
    assert cli.main(line("--query", "the blue slope", "--no-overlay")) == 0
    other = holder(out / "query-2")
    kept = read(out / "query-2")
    assert cli.main(line("--query", "the thin line")) == 2
    assert cli.main(line()) == 2
    assert capsys.readouterr().err.count(f"Another run is writing into {out / 'query-2'}") == 2
    assert read(out / "query-2") == kept
    other.stdin.close()
    other.wait()
    # A neighbour that nobody claims stays in nobody's way.
    holder(tmp_path)
    assert cli.main(line("--no-overlay")) == 0
    assert not (out / "query-2").exists() and not list(out.rglob(".*"))


@pytest.mark.skipif(os.name == "nt", reason="a process cannot be killed that way here")
def test_a_killed_run_holds_nothing(line, tmp_path, holder):
    (tmp_path / "out").mkdir()
    other = holder(tmp_path / "out")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "out" / NAME).exists()
    assert cli.main(line("--no-overlay")) == 0
    assert not (tmp_path / "out" / NAME).exists()


def test_threads_are_told_apart_too(tmp_path):
    with FolderLocks() as locks:
        locks.take(tmp_path)
        locks.take(tmp_path / ".")  # the same folder by another name
        with FolderLocks() as others, pytest.raises(DecafError, match="Another run"):
            others.take(tmp_path)
    with FolderLocks() as locks:
        locks.take(tmp_path)


def test_many_take_turns(tmp_path):
    """The file that is locked goes with each lock, which must not let in two at once."""
    inside, most, turns = [], [], []

    def work():
        for _ in range(200):
            with FolderLocks() as locks:
                try:
                    locks.take(tmp_path)
                except DecafError:
                    time.sleep(0)
                    continue
                inside.append(1)
                most.append(len(inside))
                inside.pop()
                turns.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(turns) > 6 and max(most) == 1 and not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "circle"])
def test_something_else_of_the_name_of_the_lock(line, tmp_path, kind, capsys):
    place = tmp_path / "out" / NAME
    place.parent.mkdir()
    (tmp_path / "mine").write_text("mine")
    make = {
        "pipe": lambda: os.mkfifo(place),
        "folder": place.mkdir,
        "link": lambda: place.symlink_to(tmp_path / "mine"),
        "circle": lambda: place.symlink_to(place),
    }
    make[kind]()
    assert cli.main(line("--no-overlay")) in (0, 2)
    assert (tmp_path / "mine").read_text() == "mine"
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(folder_lock.fcntl is None, reason="another call locks here")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(line, tmp_path, monkeypatch, caplog, number):
    """Some network file systems have none: the work is done all the same, and said."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING, "decaf"):
        assert cli.main(line("--no-overlay")) == 0
    assert "cannot be locked" in caplog.text and not list((tmp_path / "out").rglob(".*"))


def test_windows_locks(tmp_path, monkeypatch):
    """The branch of the other systems, with their call played by ours."""
    if folder_lock.fcntl is None:
        pytest.skip("this is the branch that runs here")
    fcntl = folder_lock.fcntl

    class Played:
        LK_NBLCK = 2

        @staticmethod
        def locking(descriptor, mode, count):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PermissionError(errno.EACCES, "Permission denied") from error

    monkeypatch.setattr(folder_lock, "fcntl", None)
    monkeypatch.setattr(folder_lock, "msvcrt", Played, raising=False)
    with FolderLocks() as locks:
        locks.take(tmp_path)
        with FolderLocks() as others, pytest.raises(DecafError, match="Another run"):
            others.take(tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_file(tmp_path):
    path = tmp_path / ("x" * 250 + ".txt")  # the longest name there is: the part's must not be longer
    with atomic_write(path) as one:
        with atomic_write(path) as other:
            assert one != other and one.exists() and other.exists()
            other.write_text("second")
        one.write_text("first")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_unfinished_goes(line, tmp_path):
    """Whichever of the names it has, and in each folder that is written to; what only looks like it stays."""
    out = tmp_path / "out"
    assert cli.main(line("--objects", "--query", "the blue slope")) == 0
    left = [
        "query-1/.overlay.0123abcd.part.mp4", "query-1/masks/.00003.0123abcd.part.png", "query-1/masks/.00004.part.png",
        "query-1/.attention.0123abcd.part.safetensors", "query-2/.result.0123abcd.part.json", "query-1/objects/0/.00001.ffffffff.part.png",
    ]  # fmt: skip
    mine = ["query-1/.mine.0123abcd.part.png", "query-1/masks/.notes", "query-1/.result.part"]
    for name in left + mine:
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        (out / name).write_bytes(b"half")
    assert cli.main(line("--objects", "--query", "the blue slope")) == 0
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob(".*")) == sorted(mine)


def test_what_a_killed_demo_left_unfinished_goes(tmp_path):
    for name in ("clip", "truth"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".00001.0123abcd.part.png").write_bytes(b"half")
        (tmp_path / name / "00007.png").write_bytes(b"of a longer one")
    assert cli.main(["demo", "--out", str(tmp_path), "--frames", "2", "--quiet"]) == 0
    assert {path.name for path in (tmp_path / "clip").iterdir()} == {"00000.png", "00001.png"}
    assert not list(tmp_path.rglob(".*")) and json.loads((tmp_path / "result.json").read_text())["clip"]["frames"] == 2
