"""What memory a run holds is watched and told."""

import logging
import subprocess
import sys
import time

import pytest

from decaf.command.memory_log import MemoryLog, resident_bytes

TOLD = pytest.mark.skipif(resident_bytes() is None, reason="this system does not tell what a process holds")


GROWS = """
import mmap
from decaf.command.memory_log import resident_bytes
before = resident_bytes()
with mmap.mmap(-1, 100 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:  # as an allocator takes it for a tensor
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    during = resident_bytes()
print(before, during, resident_bytes())
"""


@TOLD
def test_what_is_taken_and_given_back_shows():
    """In a process of its own: in one that has run other tests an allocator or the system may hand out pages that were held before."""
    run = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, check=True)
    before, during, after = map(int, run.stdout.split())
    assert during - before == pytest.approx(100 << 20, rel=0.2)
    assert after - before < 20 << 20


def until(condition):
    """Waits for the watching thread, for as long as a busy machine may need."""
    given_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < given_up
        time.sleep(0.01)


def lines_of(caplog):
    return [record.getMessage() for record in [*caplog.records]]


def test_lines_are_as_far_apart_as_asked(caplog):
    with caplog.at_level(logging.INFO, "decaf"), MemoryLog(every=3600) as memory:
        until(lambda: lines_of(caplog))
        samples = []
        memory._sample = lambda: samples.append(1)
        until(lambda: len(samples) >= 3)
    assert len(lines_of(caplog)) == 1


def test_peaks_by_step_and_lines_in_the_log(caplog, monkeypatch):
    held, reports = [100], []
    monkeypatch.setattr("decaf.command.memory_log.resident_bytes", lambda: held[0] * 10**6)
    with caplog.at_level(logging.INFO, "decaf"), MemoryLog(lambda *report: reports.append(report), every=0.01) as memory:
        memory.step("small")
        memory(1, 3, "large")
        held[0] = 250
        until(lambda: sum("250 MB held  large 1/3" in line for line in lines_of(caplog)) >= 2)
        held[0] = 120
        memory(2, 3, "large")
        memory.step("small again")
    assert reports == [(1, 3, "large"), (2, 3, "large")]
    assert memory.peaks == {"small": 100 * 10**6, "large": 250 * 10**6, "small again": 120 * 10**6}


def test_an_error_ends_the_watch():
    memory = MemoryLog()
    with pytest.raises(ValueError), memory:
        raise ValueError
    assert not memory._thread.is_alive()


def test_steps_are_told_where_memory_is_not(caplog, monkeypatch):
    monkeypatch.setattr("decaf.command.memory_log.resident_bytes", lambda: None)
    with caplog.at_level(logging.INFO, "decaf"), MemoryLog(every=0.01) as memory:
        memory(1, 3, "tracking")
        until(lambda: any(line.endswith("s  tracking 1/3") for line in lines_of(caplog)))
    assert not memory.peaks
