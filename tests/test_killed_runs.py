"""The command killed at moments drawn by a seed, and taken up again: it ends like a run that nobody disturbed.

A short form by default; `--long` kills twenty times.
"""

import os
import random
import shutil
import signal
import time

import pytest
from forks import Forks
from short_runs import check_whole, read

from decaf.clips import open_clip

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked and killed here")]

SHORT, LONG = 4, 20


def outcome(out):
    """What a run leaves, but for times, memory and whose attention it is."""
    result = read(out)
    for name in ("seconds", "peak_resident_bytes", "attention_from_earlier_run", "queries_at_once"):
        result.pop(name)
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.png")}
    return result, files, len(open_clip(out / "overlay.mp4")), sorted(path.name for path in out.iterdir())


def test_killed_and_taken_up_again(line, tmp_path, request):
    times = LONG if request.config.getoption("--long") else SHORT
    out, arguments = tmp_path / "out", line("--objects")
    forks = Forks()
    assert forks.run(arguments, tmp_path, 300).status == 0
    expected = outcome(out)
    shutil.rmtree(out)
    begun = time.monotonic()
    assert forks.run(arguments, tmp_path, 300).status == 0
    seconds = time.monotonic() - begun

    rng, killed, states = random.Random(9), 0, set()
    for turn in range(3 * times):
        shutil.rmtree(out, ignore_errors=True)
        # One moment in each of as many parts of a run; a run that had ended before its moment does not count.
        moment = seconds * (turn % times + rng.random()) / times
        ended = forks.run(arguments, tmp_path, moment)
        assert ended.status in (0, -signal.SIGKILL), ended.told
        if ended.status == 0:
            continue
        killed += 1
        if out.exists():
            check_whole(out)
            states.add((out / "attention.safetensors").exists())
        ended = forks.run([*arguments, "--resume"], tmp_path, 300)
        assert ended.status == 0, f"killed after {moment:.3f} s of {seconds:.3f}: {ended.told}"
        assert outcome(out) == expected, f"killed after {moment:.3f} s of {seconds:.3f}"
        assert not list(out.rglob(".*"))
        if killed == times:
            break
    forks.close()
    assert killed == times
    assert times < LONG or states == {False, True}  # before and after the language model was asked
