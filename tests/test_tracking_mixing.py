"""Attention with narrow values against the dense formula, however it is computed."""

import pytest
import tiny_sam2
import torch

from decaf.sam2 import load_sam2, narrow_values
from decaf.sam2.memory_attention import BankGroup, BatchedMemoryAttention
from decaf.sam2.narrow_values import narrow_value_attention


def dense(query, keys, tokens):
    scores = query.double() @ keys.double().transpose(2, 3) * query.shape[-1] ** -0.5
    return (scores.softmax(-1) @ tokens.double()[:, None]).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("tile", [512, 24])
@pytest.mark.parametrize(
    "objects, heads, queries, count, width, channels",
    [(1, 1, 64, 461, 256, 64), (3, 2, 30, 97, 128, 16), (2, 1, 64, 70, 64, 64), (2, 2, 20, 31, 16, 64), (2, 1, 1, 1, 256, 64)],
)
def test_equals_the_dense_formula(monkeypatch, tile, objects, heads, queries, count, width, channels):
    monkeypatch.setattr(narrow_values, "_TILE", tile)
    random = torch.Generator().manual_seed(count)
    query, keys, tokens = (
        torch.randn(shape, generator=random)
        for shape in ((objects, heads, queries, width), (objects, heads, count, width), (objects, count, channels))
    )
    found = narrow_value_attention(3 * query, keys, tokens)
    torch.testing.assert_close(found.double(), dense(3 * query, keys, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_scores_beyond_what_exponentials_can_hold(monkeypatch, order):
    """The top of a row may lie in the first tile or in the last."""
    monkeypatch.setattr(narrow_values, "_TILE", 8)
    random = torch.Generator().manual_seed(0)
    query, tokens = torch.randn(1, 1, 10, 128, generator=random), torch.randn(1, 40, 16, generator=random)
    keys = query[:, :, :1] * torch.linspace(-30, 30, 40).flip(0 if order < 0 else ())[:, None]
    found = narrow_value_attention(query, keys, tokens)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), dense(query, keys, tokens), rtol=1e-3, atol=1e-4)


def test_can_be_stopped_between_tiles(monkeypatch):
    monkeypatch.setattr(narrow_values, "_TILE", 8)
    calls = []

    def check_cancelled():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        narrow_value_attention(torch.randn(1, 1, 80, 128), torch.randn(1, 1, 40, 128), torch.randn(1, 40, 16), check_cancelled)
    assert len(calls) == 3, "of ten rows of tiles"


def test_memory_attention_by_tiles_is_that_by_rows(tmp_path, monkeypatch):
    """Heads of the tiny model are narrow: told that they are wide, they go by tiles, and nothing else changes."""
    model = load_sam2(tiny_sam2.make_sam2(tmp_path / "tiny.safetensors", 1, 128)).model
    random = torch.Generator().manual_seed(0)
    memories = [[(age, torch.randn(64, model.mem_dim, generator=random).bfloat16()) for age in (0, 1)] for _ in range(2)]
    pointers = torch.randn(2, 4, model.mem_dim, generator=random)
    image = torch.randn(1, 64, model.hidden_dim, generator=random)
    calls = []
    by_tiles = narrow_values._by_tiles
    monkeypatch.setattr(narrow_values, "_by_tiles", lambda *args: calls.append(1) or by_tiles(*args))

    def run():
        with torch.inference_mode():
            attention = BatchedMemoryAttention(model, torch.ones(1, model.mem_dim, 8, 8))
            return attention(image, torch.zeros_like(image), [BankGroup([0, 1], memories, pointers, torch.zeros_like(pointers))])

    by_rows = run()
    assert not calls
    monkeypatch.setattr(narrow_values, "_WIDE", 1)
    monkeypatch.setattr(narrow_values, "_TILE", 24)
    torch.testing.assert_close(run(), by_rows, rtol=1e-4, atol=1e-4)
    assert len(calls) == len(model.memory_attention.layers)
