"""The checks that wait for a GPU, run on the CPU at toy sizes: that they are not broken, and that they see what they are there to see."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CASE = "case_the_ids_are_those_that_workflows_use"


@pytest.fixture
def gpu(monkeypatch):
    """name -> module of benchmarks.gpu."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.gpu.{name}")


@pytest.fixture
def measured(gpu):
    """measured(module, check) -> the lines of a check at toy sizes, by name."""

    def run(module, name):
        check = next(check for check in gpu(module).CHECKS if check.name == name)
        lines = gpu("promises").lines(check, True, check.run(gpu("machine").on_cpu()))
        assert set(check.promises(False)) == {line.name for line in gpu("promises").unmeasured(check, "no GPU")}
        return {line.name: line for line in lines}

    return run


def broken(lines):
    return {name: line.measured for name, line in lines.items() if line.holds is False}


def test_pipeline(measured, gpu):
    lines = measured("results", "pipeline")
    assert broken(lines) == {}
    # On the CPU both sides are the same but for the dtype.
    assert lines["float32: relative error of the fused map"].measured == 0
    assert 1e-4 < lines["bfloat16: relative error of the fused map"].measured


def test_pipeline_sees_a_device_that_computes_something_else(measured, gpu, monkeypatch):
    results = gpu("results")
    calls = []

    def segmented(device, dtype, toy):
        calls.append(device)
        clip, query = results._scene(toy)
        if len(calls) > 1:
            clip = results.clip_from_images(torch.stack([clip[index] for index in range(len(clip))]).flip(2))
        mllm = results.load_mllm(results.MLLM_FOLDER, device=device, dtype=dtype)
        return results.segment_clip(mllm, results.load_sam2(results.SAM2_FILE, device=device), clip, query)

    monkeypatch.setattr(results, "_segmented", segmented)
    monkeypatch.setattr(results, "MODES", ("float32",))
    lines = measured("results", "pipeline")
    assert {name.split(": ")[1] for name in broken(lines)} >= {"relative error of the fused map", "overlap of the masks"}


def test_kernel_under_the_interpreter():
    """In a process of its own, because Triton reads TRITON_INTERPRET when it is first imported."""
    pytest.importorskip("triton")
    script = Path(__file__).parent / "support" / "interpreted_check.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(script.parent)])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 4 and all(one["holds"] for one in found.values()), found
    assert found["float32: relative error of a map, kernel against PyTorch"]["measured"] > 0


@pytest.mark.parametrize("name", ["attention 7b", "sam2 tiny"])
def test_memory_of_the_stages(measured, name):
    lines = measured("models", name)
    assert broken(lines) == {}
    assert all(line.measured > 0 for line in lines.values() if line.name.endswith("peak beside the weights, on a free card"))


def test_attention_kernels(measured):
    lines = measured("attention_kernels", "attention kernels")
    assert broken(lines) == {}


def test_attention_kernels_see_a_matrix_of_tokens_by_tokens(measured, monkeypatch):
    """The plain way makes one for each head, and no fused kernel is there to be had."""

    def plain(q, k, v, scale, is_causal=False, attn_mask=None):
        if not torch.backends.cuda.math_sdp_enabled():
            raise RuntimeError("No available kernel.")
        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
        scores = q.float() @ k.float().transpose(2, 3) * scale
        visible = attn_mask if attn_mask is not None else torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v.float()).to(q)

    monkeypatch.setattr("decaf.mllm.packed._attend", plain)
    lines = broken(measured("attention_kernels", "attention kernels"))
    assert {name.split(": ")[1] for name in lines} == {"peak", "runs with the fused kernels alone"}


def test_a_full_card(measured):
    lines = measured("full_card", "full card attention")
    assert broken(lines) == {}
    assert lines["key frames in the smallest batch"].measured < lines["key frames in the first batch"].measured


def test_a_full_card_for_sam2(measured):
    assert broken(measured("full_card", "full card sam2")) == {}


def test_streamed_weights(measured, monkeypatch):
    from decaf.mllm.streaming import Streaming

    entered = []
    enter = Streaming._enter
    monkeypatch.setattr(Streaming, "_enter", lambda self, layer: entered.append(layer.resident is None) or enter(self, layer))
    assert broken(measured("streamed", "streamed 7b")) == {}
    assert len(entered) > 10 and all(entered), "no layer stayed"


def test_streamed_weights_that_are_not_there_in_time(measured, monkeypatch):
    """A layer that computes with what lay there before it: the maps differ."""
    from decaf.mllm.streaming import Streaming

    copy = Streaming._copy

    def late(self, layer, beside):
        copy(self, layer, beside)
        if layer.name.endswith(".1"):
            self._area.zero_()

    monkeypatch.setattr(Streaming, "_copy", late)
    assert list(broken(measured("streamed", "streamed 7b"))) == ["relative error of a map against the same model whole"]


@pytest.fixture
def comfy(gpu, request):
    if not request.config.getoption("--long"):
        pytest.skip("needs --long: a server is started twice, and tests/host looks at the same")
    module = gpu("comfy")
    try:
        module._host()
    except gpu("promises").Unsuitable as reason:
        pytest.skip(str(reason))
    return module


def test_comfyui_server(comfy, measured, monkeypatch):
    pictures, original = [], comfy._pictures
    monkeypatch.setattr(comfy, "_pictures", lambda *arguments: pictures.append(original(*arguments)) or pictures[-1])
    assert broken(measured("comfy", "comfyui server")) == {}
    shown, masks = (pictures[0][0][name] for name in ("shown", "masks"))
    assert len(shown) == len(masks) == 6 and shown.std() > 10 and 0.001 < (masks > 127).mean() < 0.9


def test_pictures_that_differ(comfy):
    one = np.zeros((2, 4, 5, 3), np.uint8)
    other = one.copy()
    other[0, 0] = 1
    assert comfy.differing(one, other) == 0, "a level is rounding"
    other[1, 2, 3] = 2
    assert comfy.differing(one, other) == comfy.differing(other, one) == 1 / 40
    assert comfy.differing(one, one[:1]) == 1


def test_cases_inside_comfyui(comfy, gpu, monkeypatch):
    here = gpu("machine").on_cpu()
    assert set(comfy.cases((CASE,), here).values()) == {1.0}
    with pytest.raises(gpu("promises").Unsuitable, match="no case_of_nothing"):
        comfy.cases(("case_of_nothing",), here)


# -- the report --------------------------------------------------------------------------------------------------------------------------------


def measures(connection, name):
    connection.send(("measured", {"figure": 1.0}))


def dies(connection, name):
    os._exit(3)


def hangs(connection, name):
    import time

    time.sleep(60)


def test_a_check_that_dies_or_hangs_is_one_failure(gpu):
    report, check = gpu("report"), gpu("results").CHECKS[0]
    assert report.run_alone(check, 60, work=measures) == ("measured", {"figure": 1.0})
    assert report.run_alone(check, 60, work=dies) == ("failed", "its process ended with the code 3 and without a result")
    kind, what = report.run_alone(check, 0.2, work=hangs)
    assert kind == "failed" and "did not end in 0 s" in what


def test_a_process_without_a_gpu_says_so(gpu):
    if (reason := gpu("machine").why_no_gpu()) is None:
        pytest.skip("there is a GPU")
    assert gpu("report").run_alone(gpu("results").CHECKS[0], 120) == ("reason", reason)


def test_the_page_of_figures_has_every_line(gpu):
    """Or it is of an older version; tests/gpu writes it."""
    page = (ROOT / "benchmarks" / "GPU.md").read_text(encoding="utf-8")
    rows = {line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")}
    names = {name for check in gpu("report").CHECKS for name in check.promises(False)}
    assert names - rows == set() and rows - names == {"|", "---"}


def test_without_a_gpu_the_report_holds_what_is_computed(gpu, tmp_path, monkeypatch):
    report = gpu("report")
    monkeypatch.setattr(report.machine, "why_no_gpu", lambda: "there is no GPU")
    made = report.Report(tmp_path / "report.md")
    assert made.reason == "there is no GPU"
    found = json.loads((tmp_path / "report.json").read_text())["lines"]
    assert {line["check"] for line in found} == {check.name for check in report.CHECKS}
    assert all(line["measured"] is None and line["holds"] is None and line["reason"] == "there is no GPU" for line in found)
    weights = next(line["computed"] for line in found if (line["check"], line["line"]) == ("attention 7b", "weights"))
    assert 16e9 < weights < 17e9
    text = (tmp_path / "report.md").read_text()
    assert text.count("| not measured |") == len(found) and "No GPU" in text


def test_a_report_of_what_was_measured(gpu, tmp_path, monkeypatch):
    report, check = gpu("report"), gpu("results").CHECKS[1]
    monkeypatch.setattr(report.machine, "why_no_gpu", lambda: None)
    monkeypatch.setattr(report, "described", lambda: {"card": "A card", "memory": 8 << 30, "torch": "2", "transformers": "5"})
    figures = {name: 1e-6 if promise.kind == "at most" else 1 for name, promise in check.promises(False).items()}
    monkeypatch.setattr(report, "run_alone", lambda check, seconds: ("measured", figures))
    made = report.Report(tmp_path / "report.md")
    lines, failure = made.run(check)
    assert failure == "" and [line.holds for line in lines] == [True, True, False, False]
    text = (tmp_path / "report.md").read_text()
    assert "\nA card, 8 GB; torch 2" in text and text.count("| **no** |") == 2 and text.count("| yes |") == 2
    monkeypatch.setattr(report, "run_alone", lambda check, seconds: ("reason", "it takes 20.0 GB"))
    lines, failure = made.run(check)
    assert failure == "" and "not measured: it takes 20.0 GB" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(report, "MINUTES", 0)
    lines, _ = made.run(check)
    assert {line.reason for line in lines} == {"0 minutes were over"}


def test_what_holds(gpu):
    promises = gpu("promises")
    for kind, right, wrong in (("at most", (0, 10), (10.1,)), ("at least", (10, 11), (9.9,)), ("about", (7.5, 12.5), (7.4, 12.6))):
        promise = promises.Promise(10, kind)
        assert all(promise.holds(one) for one in right) and not any(promise.holds(one) for one in wrong)
    assert promises.Promise(10, "told").holds(5) is None and promises.Promise(None, "told").holds(5) is None
    with pytest.raises(KeyError, match="promised"):
        promises.lines(promises.Check("x", "", lambda toy: {"a": promises.Promise(1)}, None), True, {"b": 1})
