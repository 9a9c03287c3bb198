"""What memory a run holds is watched and told."""

import logging
import mmap
import time

import pytest

from decaf.memory_log import MemoryLog, resident_bytes

TOLD = pytest.mark.skipif(resident_bytes() is None, reason="this system does not tell what a process holds")


@TOLD
def test_peaks_by_step_and_lines_in_the_log(caplog):
    reports = []
    with caplog.at_level(logging.INFO, "decaf"), MemoryLog(lambda *report: reports.append(report), every=0.3) as memory:
        memory.step("small")
        memory(1, 3, "large")
        with mmap.mmap(-1, 100 << 20) as held:  # fresh pages: an allocator might hand out what it still holds
            held.write(b"1" * len(held))
            time.sleep(1)
        memory(2, 3, "large")
        memory.step("small again")
    assert reports == [(1, 3, "large"), (2, 3, "large")]
    assert list(memory.peaks) == ["small", "large", "small again"]
    assert memory.peaks["large"] - max(memory.peaks["small"], memory.peaks["small again"]) == pytest.approx(100 << 20, rel=0.2)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) >= 3 and any("MB held  large 1/3" in line for line in lines)


def test_an_error_ends_the_watch():
    memory = MemoryLog()
    with pytest.raises(ValueError), memory:
        raise ValueError
    assert not memory._thread.is_alive()


def test_steps_are_told_where_memory_is_not(caplog, monkeypatch):
    monkeypatch.setattr("decaf.memory_log.resident_bytes", lambda: None)
    with caplog.at_level(logging.INFO, "decaf"), MemoryLog(every=0.1) as memory:
        memory(1, 3, "tracking")
        time.sleep(0.5)
    assert not memory.peaks and any(record.getMessage().endswith("tracking 1/3") for record in caplog.records)
