"""Suppression and selection against numbers of the authors' implementation."""

import pytest
import torch
from safetensors.torch import load_file

from decaf.masks import pack_bits
from decaf.tracking.candidates import suppress
from decaf.tracking.selection import attention_consistency, final_scores, grid_coverage, select


def files(golden, pattern):
    found = sorted((golden / "tracklets").glob(pattern))
    if not found:
        pytest.skip(f"no {pattern} in {golden / 'tracklets'}")
    return [(path.name, load_file(path)) for path in found]


def test_suppression(golden):
    for name, data in files(golden, "nms_*.safetensors"):
        masks, scores = data["input.masks"].bool(), data["input.scores"]
        earlier, earlier_scores = data.get("input.previous_masks", masks[:0]).bool(), data.get("input.previous_scores", scores[:0])
        kept, deleted = suppress(pack_bits(masks), scores, pack_bits(earlier), earlier_scores, 0.7)
        assert kept == data["expected.keep"].tolist(), name
        assert deleted == data["expected.delete_previous"].tolist(), name


def test_selection(golden):
    for name, data in files(golden, "select_*.safetensors"):
        masks, attention = data["input.tracklets"].bool(), data["input.attention"]
        coverage = torch.stack([grid_coverage(tracklet, attention.shape[1:]) for tracklet in masks])
        consistency = attention_consistency(coverage, attention)
        final = final_scores(data["input.scores"], consistency)
        assert torch.allclose(consistency, data["expected.ac"], rtol=0, atol=1e-6), name
        assert torch.allclose(final, data["expected.final"], rtol=0, atol=1e-6), name

        selected = select(final, float(data["input.threshold"]))
        assert selected == data["expected.selected"].tolist(), name
        # What is propagated: each selected tracklet's mask on its own prompt frame, from the first frame to the last.
        prompts = data["input.prompt_frame"][selected]
        order = prompts.argsort(stable=True)
        assert data["input.key_frames"][prompts[order]].tolist() == data["expected.condition_frames"].sort().values.tolist(), name
        theirs = data["expected.condition_masks"].bool()[data["expected.condition_frames"].argsort(stable=True)]
        assert torch.equal(masks[selected, prompts][order], theirs), name
