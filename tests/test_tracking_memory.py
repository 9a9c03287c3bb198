"""What a host is told to keep free for the SAM 2 stage, against the tensors that are alive while it works."""

from pathlib import Path

import pytest
import tiny_sam2
import torch
from counted_memory import Alive
from moving_shapes import make_prompts, moving_shapes

import decaf.demo
from decaf.sam2 import load_sam2, segmenter
from decaf.tracking import memory_needed, segment
from decaf.tracking.masks import MASK_BYTES

BUNDLED = Path(decaf.demo.__file__).parent / "models" / "sam2.safetensors"
CPU = torch.device("cpu")


@pytest.mark.parametrize("which", ["bundled", "tiny"])
def test_no_more_is_taken_than_was_said(tmp_path, monkeypatch, which):
    sam2 = load_sam2(BUNDLED if which == "bundled" else tiny_sam2.make_sam2(tmp_path / "tiny.safetensors", 3, 128))
    clip = moving_shapes(8, 64, 64, 3)
    prompts = make_prompts(clip, 12, 3)
    # Room for what a GPU's libraries take, and for the masks of large frames, would hide everything else.
    monkeypatch.setattr(segmenter, "_LIBRARY_BYTES", 0)
    said = memory_needed(sam2, CPU, len(clip)) - MASK_BYTES
    with Alive() as alive:
        tracks = segment(sam2, clip, prompts, score_threshold=0.2)
    assert len(tracks.tracks) > 0
    assert said / 12 < alive.most <= said


def test_more_frames_and_larger_pictures_take_more(tmp_path):
    small, large = (load_sam2(tiny_sam2.make_sam2(tmp_path / f"{size}.safetensors", 1, size)) for size in (64, 256))
    assert (
        memory_needed(small, CPU, 10) < memory_needed(small, CPU, 20) < memory_needed(small, CPU, 10**6) == memory_needed(small, CPU, 10**7)
    )
    assert memory_needed(small, CPU, 10) < memory_needed(large, CPU, 10)
    assert memory_needed(large, CPU, 10) <= memory_needed(large, torch.device("cuda"), 10)
