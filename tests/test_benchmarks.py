"""The benchmarks at toy sizes: that every stage runs, compares both sides and gives the figures that are asked of it."""

import dataclasses
import importlib
import operator
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(monkeypatch):
    """name -> module of the package, whose runs happen in this process at a cost of one second and one byte."""
    monkeypatch.syspath_prepend(ROOT)
    measure = importlib.import_module("benchmarks.measure")

    def here(prepare, run, device, *arguments):
        return measure.Cost(1.0, 1.0, 1), run(*prepare(device, *arguments))

    def module(name):
        found = importlib.import_module(f"benchmarks.{name}")
        if name != "measure":
            monkeypatch.setattr(found, "measure", here)
        return found

    return module


def test_rollout(benchmarks):
    rollout = benchmarks("rollout")
    shape = rollout.Shape(4, 4, 2, 16, 64, 1, 2)
    rows = rollout.run("cpu", [96, 192], 1, shape)
    summary = rollout.summary(rows)
    assert {f"rollout_{figure}_{length}" for figure in ("speedup", "memory_ratio", "over_prefill") for length in (96, 192)} <= set(summary)
    assert summary["rollout_growth_dense_bytes"] == 0
    assert rows[0]["layers_rolled_out"] == 2 and 0 < rows[0]["relative_error"] < 1e-5
    assert len(rollout.table(rows, shape)) == 2 + len(rows)
    prefix, suffixes, visual = rollout.prepare_rows("cpu", shape, 96, 1)
    expected = rollout.dense(prefix, suffixes, visual)
    visual[40:] = False
    with pytest.raises(benchmarks("measure").Different, match="differ"):
        rollout.compare(rollout.streamed(prefix, suffixes, visual), expected, 1e-5)


def test_rollout_where_the_dense_formula_does_not_fit(benchmarks, monkeypatch):
    rollout, here = benchmarks("rollout"), benchmarks("measure")
    inside = rollout.measure

    def small(prepare, run, device, shape, tokens, *more):
        if run is rollout.dense and tokens > 100:
            raise here.Failed
        return inside(prepare, run, device, shape, tokens, *more)

    monkeypatch.setattr(rollout, "measure", small)
    shape = rollout.Shape(2, 4, 2, 16, 64, 1, 1)
    rows = rollout.run("cpu", [80, 96, 192], 1, shape)
    assert "speedup" in rows[1] and "speedup" not in rows[2] and "over_prefill" in rows[2]
    summary = rollout.summary(rows)
    assert "rollout_speedup_96" in summary and "rollout_speedup_192" not in summary and "rollout_over_prefill_192" in summary
    assert len(rollout.table(rows, shape)) == 5


def test_mllm(benchmarks):
    mllm = benchmarks("mllm")
    tower = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "fullatt_block_indexes": [1]}
    text = {"intermediate_size": 128, "vocab_size": 1024}
    shape = mllm.Shape(text, tower, 4, 4, 2, 64, tokens_per_frame=12, frame_size=(84, 112), frames=3)
    row = mllm.run_shape("cpu", "toy", shape, 1)
    assert mllm.summary([row]) == {"mllm_speedup": 1.0, "mllm_over_prefill": 1.0}
    assert row["plain_did"]["prompts"] == 2 + 2 * 3 + 1 and row["ours_did"]["tokens_generated"] == 0
    assert row["plain_did"]["visual_tokens_prefilled"] == 2 * row["ours_did"]["visual_tokens_prefilled"]
    assert len(mllm.table([row])) == 3
    maps, _ = mllm.ours(*mllm.prepare_ours("cpu", shape))
    with pytest.raises(benchmarks("measure").Different, match="differ"):  # the background's maps for the object's
        mllm.compare(maps, maps[2:] + maps[:2], mllm.TOLERANCE[mllm.torch.float32])


def test_sam2(benchmarks):
    sam2 = benchmarks("sam2")
    case = sam2.Case("bundled", 4, 2, (64, 80))
    (row,) = sam2.run("cpu", [case], 1)
    assert row["ours_encodings"] == 4 and row["plain_encodings"] > 2 * 4 and row["encodings_per_frame"] == 0.5
    summary = sam2.summary([{**row, "length": 100, "tracklets": 3}])
    assert summary["sam2_speedup"] == 1 and summary["sam2_encodings_per_frame"] == 0.5
    assert len(sam2.table([row])) == 3
    model, clip, prompts = sam2.prepare_ours("cpu", case)
    packed, _ = sam2.ours(model, clip, prompts)
    assert len(packed) == 2
    elsewhere = dataclasses.replace(prompts, xy=prompts.xy.flip(0))
    other, _ = sam2.ours(model, clip, elsewhere)
    for wrong in (other, packed[:1], np.zeros_like(packed)):
        with pytest.raises(benchmarks("measure").Different):
            sam2.compare(wrong, packed)


def test_a_process_of_its_own(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    measure, rollout = (importlib.import_module(f"benchmarks.{name}") for name in ("measure", "rollout"))
    shape = rollout.Shape(2, 4, 2, 16, 64, 1, 1)
    cost, row = measure.measure(rollout.prepare_rows, rollout.dense, "cpu", shape, 2000, 1)
    assert row == pytest.approx(rollout.streamed(*rollout.prepare_rows("cpu", shape, 2000, 1)), rel=1e-4, abs=1e-7)
    assert 100e6 < cost.bytes < 500e6  # two matrices of 64 MB, and smaller ones
    assert cost.seconds > 0 and cost.cpu_seconds > 0
    with pytest.raises(measure.Failed, match="ended without a result"):
        measure.measure(operator.add, operator.neg, "cpu", "xy")  # more arguments than it takes


def test_picking(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    picking = importlib.import_module("benchmarks.picking")
    right = picking.right_picks(2, 91_000, 3)
    tables = picking.table(right)
    numbers = {len(right[kind, name, rule]) for kind, name, rule in right if kind == "colour"}
    assert len(numbers) == 1 and numbers.pop() > 1 and len(tables) == 3 + len({kind for kind, *_ in right})
    of = lambda rule: np.mean([one for key, ones in right.items() if key[1:] == ("parts too", rule) for one in ones])  # noqa: E731
    assert of("agreement") > 0.6 > 0.2 > of("density"), "an inner part has the highest density"
