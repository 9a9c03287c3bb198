"""The fused rollout kernel: its numbers in Triton's interpreter, and what happens where it cannot be used. On a GPU: tests/gpu."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense_rollout import dense_rows, random_rows, relative

from decaf.attention import rollout

SCRIPT = Path(__file__).parent / "support" / "interpreted_rollout.py"


@pytest.fixture
def kernel(monkeypatch):
    """The kernel's module, chosen for CPU tensors too."""
    pytest.importorskip("triton")
    from decaf.attention import rollout_triton as rollout_kernel

    monkeypatch.setattr(rollout_kernel, "broken", set())
    monkeypatch.setattr(rollout_kernel, "_agreed", {})
    monkeypatch.setattr(rollout, "fused_kernel", lambda device: None if rollout_kernel.broken else rollout_kernel)
    return rollout_kernel


@pytest.fixture
def case():
    prefix, suffixes = random_rows(2, 4, 2, (40, 6, 3))
    return prefix, suffixes, torch.arange(40) >= 8


@pytest.mark.slow
def test_numbers_under_the_interpreter():
    pytest.importorskip("triton")
    result = json.loads(subprocess.run([sys.executable, SCRIPT], capture_output=True, check=True, text=True).stdout)
    errors = result["errors"]
    assert [name for name, agrees in result["trials"].items() if agrees] == ["right"] and len(result["trials"]) > 4
    assert len(errors) > 5 and len(errors["nine questions"]) == 9
    assert {name: worst for name, relative_errors in errors.items() if not (worst := max(relative_errors)) < 2e-6} == {}


def test_which_devices_get_the_kernel(monkeypatch):
    pytest.importorskip("triton")
    from decaf.attention import rollout_triton as rollout_kernel

    monkeypatch.setattr(rollout_kernel, "broken", set())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    gpu = torch.device("cuda")
    for capability, chosen in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert (rollout.fused_kernel(gpu) is rollout_kernel) == chosen
    assert rollout.fused_kernel(torch.device("cpu")) is None
    rollout_kernel.broken.add(torch.device("cuda:1"))
    assert rollout.fused_kernel(gpu) is None
    assert rollout.fused_kernel(torch.device("cuda:0")) is rollout_kernel, "another device may well run it"


@pytest.mark.parametrize("broken", [ImportError("No module named 'triton'"), RuntimeError("this Triton does not start")])
def test_without_triton_nothing_is_lost_but_speed(monkeypatch, broken):
    import builtins

    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "triton":
            raise broken
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "decaf.attention.rollout_triton", raising=False)
    monkeypatch.delattr("decaf.attention.rollout_triton", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    rollout._triton_module.cache_clear()
    try:
        assert rollout.fused_kernel(torch.device("cuda")) is None
    finally:
        rollout._triton_module.cache_clear()


def test_a_kernel_that_does_not_launch_is_left_alone_after_one_warning(kernel, case, caplog):
    """Triton refuses tensors of the CPU, with or without a GPU."""
    prefix, suffixes, visual = case
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for row, suffix in zip(rollout.last_row_rollout(prefix, suffixes, visual), suffixes, strict=True):
                assert relative(row, dense_rows(prefix, suffix, visual)) < 1e-5
    assert kernel.broken == {torch.device("cpu")}
    assert len([record for record in caplog.records if "fused attention rollout" in record.message]) == 1


def test_a_kernel_that_is_wrong_on_this_machine_is_left_alone_after_one_warning(kernel, case, monkeypatch, caplog):
    """Nothing tells a wrong map from a right one, so each kind of heads is tried once against PyTorch."""
    prefix, suffixes, visual = case
    layers = []

    def wrong(queries, keys, rows, packed, scale):
        layers.append(rows.shape)
        return rows

    monkeypatch.setattr(kernel, "_pass_layer", wrong)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for row, suffix in zip(rollout.last_row_rollout(prefix, suffixes, visual), suffixes, strict=True):
                assert relative(row, dense_rows(prefix, suffix, visual)) < 1e-5
    assert len(layers) == 3 and not kernel.broken, "one trial of three layers, and nothing after it"
    assert len([record for record in caplog.records if "is wrong on this machine" in record.message]) == 1


def test_each_kernel_that_is_compiled_is_tried(kernel, monkeypatch):
    """What was right for one kind of heads, or for two questions, says nothing of others."""
    tried = []
    monkeypatch.setattr(
        kernel, "roll_out", lambda prefix, suffixes, visual: tried.append(len(suffixes)) or oracle(prefix, suffixes, visual)
    )
    oracle = rollout._by_blocks
    for heads, width, lengths in ((4, 32, (40, 6, 3)), (4, 32, (20, 2, 5)), (4, 32, (40, 6)), (2, 32, (40, 6, 3)), (4, 16, (40, 6, 3))):
        prefix, suffixes = random_rows(2, heads, 2, lengths, width)
        assert kernel.agrees(prefix, suffixes, oracle)
    assert tried == [2, 1, 2, 2]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_memory_does_not_rule_the_kernel_out(kernel, case, monkeypatch, error):
    def full(*args):
        raise error

    monkeypatch.setattr(kernel, "_pass_layer", full)
    with pytest.raises(torch.OutOfMemoryError):
        rollout.last_row_rollout(*case)
    assert not kernel.broken


def test_every_layer_can_be_cancelled(kernel, case, monkeypatch):
    calls = []

    def tick():
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("cancelled")

    monkeypatch.setattr(kernel, "agrees", lambda *args: True)
    monkeypatch.setattr(kernel, "_pass_layer", lambda queries, keys, rows, *rest: rows)
    with pytest.raises(RuntimeError, match="cancelled"):
        rollout.last_row_rollout(*case, check_cancelled=tick)
    assert len(calls) == 3 and not kernel.broken
