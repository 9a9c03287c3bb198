"""What only a GPU can tell, in one command of less than ten minutes:

    uv run pytest tests/gpu --gpu-report FILE.md

The checks are those of benchmarks/gpu, each in a process of its own. The report is written with or without a GPU; without one it holds what is
computed, and everything here is skipped. It is one file, so that one process of the tests has the GPU to itself.
"""

import pytest
import torch
from dense_rollout import dense_rows, random_rows, relative
from random_clips import clip_of

from benchmarks.gpu import report
from benchmarks.gpu.machine import why_no_gpu
from decaf.attention import rollout
from decaf.attention.extract import extract_attention
from decaf.mllm import load_mllm

QUERY = "the dog that gets the ball first"
needs_gpu = pytest.mark.skipif(why_no_gpu() is not None, reason=why_no_gpu() or "")


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


# -- the kernel on random queries and keys, and maps whose queries wait in host memory ------------------------------------------------------------


def on_gpu(rows):
    return rollout.CapturedQK(rows.scale, *({layer: x.to("cuda") for layer, x in kind.items()} for kind in (rows.q, rows.k)))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "batch, heads, groups, lengths, width",
    [
        (1, 28, 4, (1500, 40, 33), 128),
        (1, 4, 4, (37, 9), 16),
        (3, 6, 2, (300, 20, 31), 64),
        (1, 4, 1, (333, *range(1, 10)), 80),
        (2, 4, 2, (200, 150, 7), 32),
        (1, 2, 1, (130, 5, 5), 256),
    ],
)
def test_numbers_on_a_gpu(monkeypatch, dtype, batch, heads, groups, lengths, width):
    from decaf.attention import rollout_triton as rollout_kernel

    carried = []
    carry = rollout_kernel._pass_layer
    monkeypatch.setattr(rollout_kernel, "_pass_layer", lambda *args: carried.append(None) or carry(*args))
    prefix, suffixes = random_rows(batch, heads, groups, lengths, width, dtype, layers=2)
    visual = torch.zeros(lengths[0], dtype=torch.bool)
    visual[[*range(5, 15), *range(18, 28), *range(33, lengths[0] - 2)]] = True
    questions = [on_gpu(suffix) for suffix in suffixes]
    rows = rollout.last_row_rollout(on_gpu(prefix), questions, visual)
    assert len(carried) == 2 and not rollout_kernel.broken
    for row, suffix in zip(rows, suffixes, strict=True):
        assert row.is_cuda and relative(row.cpu(), dense_rows(prefix, suffix, visual)) < 1e-5
    for row, other in zip(rows, rollout.last_row_rollout(prefix, questions, visual), strict=True):
        assert torch.equal(row, other), "a prefix in host memory gives the same"


@needs_gpu
def test_results_repeat_to_the_last_bit():
    prefix, suffixes = random_rows(1, 8, 2, (700, 40, 33), 128, torch.bfloat16)
    prefix, suffixes = on_gpu(prefix), [on_gpu(suffix) for suffix in suffixes]
    first, second = (rollout.last_row_rollout(prefix, suffixes, torch.arange(700) > 9) for _ in range(2))
    assert all(map(torch.equal, first, second))


@needs_gpu
@pytest.mark.parametrize("setting", ["expression", "class name"])
def test_queries_in_host_memory_give_the_same_maps_on_a_gpu(mllm_folder, monkeypatch, setting):
    mllm = load_mllm(mllm_folder("qwen2_5_vl"), device="cuda")
    maps = []
    for budget in (None, 0):
        monkeypatch.setattr("decaf.attention.batches.Batches.q_budget_bytes", lambda self, tokens, budget=budget: budget)
        maps.append(extract_attention(mllm, clip_of(4), QUERY, setting=setting, tokens_per_frame=40))
    for one, other in zip(*maps, strict=True):
        assert relative(one.video, other.video) < 1e-5 and relative(one.frame, other.frame) < 1e-5
