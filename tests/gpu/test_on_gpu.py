"""What only a GPU can tell, in one command of less than ten minutes:

    uv run pytest tests/gpu --gpu-report FILE.md

The checks are those of benchmarks/gpu, each in a process of its own. The report is written with or without a GPU; without one it holds what is
computed, and everything here is skipped.
"""

import pytest

from benchmarks.gpu import report


@pytest.fixture(scope="module")
def gpu_report(request):
    return report.Report(request.config.getoption("--gpu-report"))


@pytest.mark.parametrize("check", report.CHECKS, ids=lambda check: check.name.replace(" ", "-"))
def test_check(gpu_report, check):
    if gpu_report.reason:
        pytest.skip(gpu_report.reason)
    lines, failure = gpu_report.run(check)
    assert not failure, failure
    if all(line.measured is None for line in lines):
        pytest.skip(lines[0].reason)
    assert [f"{line.name}: {line.measured:g}, not {line.promise.kind} {line.promise.figure:g}" for line in lines if line.holds is False] == []
