"""How a run reports: progress, counts, seconds, cancelling, and what is taken back after a try in vain."""

import subprocess
import sys
import time

import pytest
import torch

import decaf
from decaf.report import Report


class Stop(BaseException):
    """What a caller cancels with need not even be an Exception."""


def test_a_check_repeats_the_latest_progress():
    calls = []
    report = Report(lambda *call: calls.append(call))
    report.check_cancelled()
    assert not calls
    report.progress(1, 3, "reading")
    report.check_cancelled()
    assert calls == [(1, 3, "reading")] * 2


def test_what_cancels_is_known_again():
    stop = Stop()

    def callback(done, total, what):
        if done:
            raise stop

    report = Report(callback)
    report.progress(0, 2, "reading")
    assert not report.cancelled_by(stop)
    with pytest.raises(ValueError) as wrapped:
        try:
            report.progress(1, 2, "reading")
        except Stop as error:
            raise ValueError from error
    assert report.cancelled_by(stop) and report.cancelled_by(wrapped.value)
    assert not report.cancelled_by(ValueError()) and not report.cancelled_by(None)


def test_a_report_given_on_is_the_same_one():
    report = Report()
    assert Report.of(report) is report
    calls = []
    Report.of(lambda *call: calls.append(call)).progress(1, 1, "x")
    assert calls == [(1, 1, "x")]


def test_counts_add_up_and_are_taken_back():
    report = Report()
    report.count("frames", 0)
    report.count("frames", 2)
    with report.attempt():
        report.count("frames")
        report.count("passes")
        raise torch.OutOfMemoryError("full")
    assert report.counts == {"frames": 2}
    with report.attempt():
        report.count("passes")
    assert report.counts == {"frames": 2, "passes": 1}


def test_seconds_add_up_also_after_an_error():
    report = Report()
    for _ in range(2):
        with pytest.raises(KeyError), report.stage("wait"):
            time.sleep(0.02)
            raise KeyError
    with report.stage("nothing"):
        pass
    assert report.seconds["wait"] >= 0.04 > report.seconds["nothing"]


def test_one_report_for_the_whole_method(mllm_folder, sam2_file):
    """The counts and seconds of the result are those of the report, and the callback hears of every step."""
    from random_clips import clip_of

    calls = []
    report = decaf.Report(lambda *call: calls.append(call))
    mllm = decaf.load_mllm(mllm_folder("qwen2_vl"), progress=report)
    assert report.counts == report.seconds == {}
    result = decaf.segment_clip(mllm, decaf.load_sam2(sam2_file), clip_of(3), "the dog", tokens_per_frame=16, progress=report)
    assert result.counts == report.counts and result.seconds == report.seconds
    assert set(report.seconds) == {"attention", "fusion", "segmentation"} and min(report.seconds.values()) > 0
    assert report.counts["forward_passes"] > 0 and report.counts["sam2_key_encodings"] > 0
    named = {what for _, _, what in calls}
    assert {"Asking about the video", "Asking about the key frames"} <= named
    assert any(what.startswith("SAM 2: points") for what in named) and any("Loading" in what for what in named)


def test_it_imports_nothing_heavy():
    code = "import sys, decaf.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
