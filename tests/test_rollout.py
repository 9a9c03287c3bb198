"""The streamed last-row rollout against the dense formula in float64."""

import pytest
import torch
from dense_rollout import dense_rows, random_rows, relative

from decaf.errors import DecafError
from decaf.rollout import _attention, capture_attention, last_row_rollout, visual_runs


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_bytes", [1, 5000, None])
def test_streamed_equals_dense(heads, groups, batch, dtype, block_bytes):
    """Rows are made in float32 from the model's own numbers, so a low-precision model costs no further precision."""
    prefix, suffixes = random_rows(batch, heads, groups, (37, 9, 4), dtype=dtype)
    visual = torch.zeros(37, dtype=torch.bool)
    visual[[*range(5, 15), *range(18, 28), 33]] = True
    found = last_row_rollout(prefix, suffixes, visual, block_bytes=block_bytes)
    for row, suffix in zip(found, suffixes, strict=True):
        assert row.dtype == torch.float32
        assert relative(row, dense_rows(prefix, suffix, visual)) < 1e-5


def test_only_captured_layers_are_rolled_out():
    prefix, suffixes = random_rows(1, 4, 2, (20, 5))
    visual = torch.arange(20) >= 8
    whole = last_row_rollout(prefix, suffixes, visual)[0]
    for rows in (prefix, *suffixes):
        del rows.queries[0], rows.keys[0]
    upper = last_row_rollout(prefix, suffixes, visual)[0]
    assert relative(upper, dense_rows(prefix, suffixes[0], visual)) < 1e-5
    assert relative(upper, whole) > 1e-3


def test_a_question_does_not_change_another():
    prefix, suffixes = random_rows(2, 4, 2, (30, 6, 6))
    visual = torch.arange(30) < 20
    together = last_row_rollout(prefix, suffixes, visual)
    for row, suffix in zip(together, suffixes, strict=True):
        assert relative(row, last_row_rollout(prefix, [suffix], visual)[0]) < 1e-6


def test_visual_runs():
    mask = torch.tensor([1, 1, 0, 0, 1, 0, 1, 1, 1], dtype=torch.bool)
    assert visual_runs(mask) == [(0, 2), (4, 5), (6, 9)]
    assert visual_runs(torch.zeros(4, dtype=torch.bool)) == []


def test_every_block_can_be_cancelled():
    prefix, suffixes = random_rows(1, 4, 2, (40, 5))
    calls = []

    def tick():
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        last_row_rollout(prefix, suffixes, torch.ones(40, dtype=torch.bool), block_bytes=1, tick=tick)
    assert len(calls) == 7


@pytest.mark.parametrize(
    "extra, word", [({"sliding_window": 4}, "sliding window"), ({"softcap": 30.0}, "soft-capped"), ({"s_aux": 1}, "sinks")]
)
def test_other_attention_is_refused_by_name(extra, word):
    module = torch.nn.Module()
    module.layer_idx = 0
    states = torch.randn(1, 2, 8, 4)
    with capture_attention(0, lambda: None), pytest.raises(DecafError, match=word):
        _attention(module, states, states, states, None, scaling=0.5, **extra)


@pytest.mark.parametrize("room, moved", [(None, []), (3072, []), (2500, [2]), (1023, [0, 1, 2]), (0, [0, 1, 2])])
def test_queries_beyond_their_room_go_to_host_memory(monkeypatch, room, moved):
    """Each layer's take 1024 bytes here."""
    states = [torch.randn(1, 2, 32, 4) for _ in range(3)]
    gone = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: gone.append(self) or self)
    with capture_attention(0, lambda: None, room) as rows:
        for layer, one in enumerate(states):
            module = torch.nn.Module()
            module.layer_idx, module.is_causal, module.num_key_value_groups = layer, True, 1
            _attention(module, one, one, one, None, scaling=0.5)
    assert [layer for layer, one in enumerate(states) if any(one is other for other in gone)] == moved
    assert all(torch.equal(rows.queries[layer], one) for layer, one in enumerate(states))
