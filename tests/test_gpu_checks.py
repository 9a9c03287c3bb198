"""The checks that wait for a GPU, run on the CPU at toy sizes: that they are not broken, and that they see what they are there to see."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


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
