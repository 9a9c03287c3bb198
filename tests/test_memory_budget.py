"""The command's --memory-budget, and the table of what fits which card."""

import argparse
import importlib
from pathlib import Path

import pytest

import decaf.command.segment
from decaf.command.arguments import size_in_bytes
from decaf.command.main import main as cli
from decaf.mllm import streaming


@pytest.fixture
def memory_table(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    return importlib.import_module("benchmarks.memory_table")


@pytest.mark.parametrize(("text", "expected"), [("10GB", 10**10), ("9.5 GiB", round(9.5 * 2**30)), ("500mb", 5 * 10**8), ("4096", 4096)])
def test_sizes(text, expected):
    assert size_in_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "10TB", "1e9", "nan", "10 G B", "9" * 40])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="no size; give one such as 10GB"):
        size_in_bytes(text)


def test_on_a_cpu_it_is_refused_before_anything_is_loaded(line, capsys, monkeypatch):
    monkeypatch.setattr(decaf.command.segment, "load_segmenter", lambda *_, **__: pytest.fail("loaded"))
    assert cli(line("--memory-budget", "1GB")) == 2
    assert "is for a GPU with memory of its own" in capsys.readouterr().err


def test_the_model_is_loaded_within_it(line, tmp_path, monkeypatch):
    """On a CPU that stands in for a GPU: masks are those of a run without a budget."""
    monkeypatch.setattr(streaming, "HOST_MEMORY", ())
    loaded, load = [], decaf.command.segment.load_mllm

    def watched(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(decaf.command.segment, "load_mllm", watched)
    masks = []
    for more in ([], ["--memory-budget", "2GB"]):
        assert cli(line("--no-overlay", "--quiet", *more)) == 0
        masks.append([file.read_bytes() for file in sorted((tmp_path / "out" / "masks").iterdir())])
    plain, budgeted = loaded
    assert plain.streaming is None and budgeted.memory_budget == 2 * 10**9
    assert len(budgeted.streaming.on_device) == len(budgeted.streaming.layers), "all of so small a model fits"
    assert masks[0] == masks[1] and masks[0]


def test_a_budget_that_is_too_small_ends_in_a_sentence(line, capsys, monkeypatch):
    monkeypatch.setattr(streaming, "HOST_MEMORY", ())
    assert cli(line("--memory-budget", "100kB")) == 2
    assert "The memory budget of 0.1 MB is too small" in capsys.readouterr().err


def test_the_page_is_what_the_command_prints(memory_table):
    page = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")
    assert "\n".join(memory_table.table()) in page


def test_the_table_says_what_the_estimates_say(memory_table):
    published = next(one for one in memory_table.MODELS if one.name == "Qwen3-VL-2B")
    mllm = published.mllm()
    assert all(one.is_meta for one in mllm.model.parameters()), "nothing is loaded"
    weights = memory_table.weights_of(mllm, float8=False)
    assert 2.1e9 < weights.all / 2 < 2.2e9, "2.13 billion numbers, as published"
    assert weights.least < weights.all
    layer = sum(one.nbytes for one in mllm.engine.text_tower.layers[0].parameters())
    saved = weights.all - memory_table.weights_of(mllm, float8=True).all
    assert saved == mllm.layers * layer // 2
    needed = {"paper": 3 * 10**9, "fast": 10**9}
    assert memory_table.verdict(24, weights, needed) == "whole"
    assert memory_table.verdict(2, weights, needed) == "no"
    told = memory_table.verdict(6, weights, needed)
    assert told.endswith("GB streamed") and 0 < float(told.split()[0]) < weights.all / 1e9
