"""The streamed last-row rollout against the dense formula in float64."""

import pytest
import torch
from dense_rollout import dense_rows, random_rows, relative

from decaf.attention.rollout import last_row_rollout, visual_runs


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_bytes", [1, 5000, None])
def test_streamed_equals_dense(heads, groups, batch, dtype, block_bytes):
    """Rows of attention are made in float32 from the model's own numbers, so a low-precision model costs no further precision."""
    prefix, suffixes = random_rows(batch, heads, groups, (37, 9, 4), dtype=dtype)
    visual = torch.zeros(37, dtype=torch.bool)
    visual[[*range(5, 15), *range(18, 28), 33]] = True
    rows = last_row_rollout(prefix, suffixes, visual, block_bytes=block_bytes)
    for row, suffix in zip(rows, suffixes, strict=True):
        assert row.dtype == torch.float32
        assert relative(row, dense_rows(prefix, suffix, visual)) < 1e-5


def test_only_captured_layers_are_rolled_out():
    prefix, suffixes = random_rows(1, 4, 2, (20, 5))
    visual = torch.arange(20) >= 8
    whole = last_row_rollout(prefix, suffixes, visual)[0]
    for rows in (prefix, *suffixes):
        del rows.q[0], rows.k[0]
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
        last_row_rollout(prefix, suffixes, torch.ones(40, dtype=torch.bool), block_bytes=1, check_cancelled=tick)
    assert len(calls) == 7
