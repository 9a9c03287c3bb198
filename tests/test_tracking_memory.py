"""What a host is told to keep free for the SAM 2 stage, against what PyTorch's allocator was asked for."""

from pathlib import Path

import pytest
import tiny_sam2
import torch
from as_published import segment
from live_memory import LiveMemory
from moving_shapes import make_prompts, moving_shapes

import decaf.demo
from decaf.sam2 import load_sam2, segmenter
from decaf.tracking import memory_needed

BUNDLED = Path(decaf.demo.__file__).parent / "models" / "sam2.safetensors"
CPU = torch.device("cpu")
WITHIN = 0.25


@pytest.mark.slow
@pytest.mark.parametrize("objects", [1, 8])
@pytest.mark.parametrize("which", ["bundled", "tiny"])
def test_what_is_said_is_taken(tmp_path, monkeypatch, which, objects):
    """With all points on one key frame, and every object followed."""
    sam2 = load_sam2(BUNDLED if which == "bundled" else tiny_sam2.make_sam2(tmp_path / "tiny.safetensors", 3, 256))
    clip = moving_shapes(8, 64, 64, 3)
    prompts = make_prompts(clip, objects, 3, keys=[0])
    # What a GPU's libraries take would hide everything else.
    monkeypatch.setattr(segmenter, "_LIBRARY_BYTES", 0)
    with sam2.segmenter():  # its trial, which is not of the clip
        pass
    said = memory_needed(sam2, CPU, len(clip), points=objects, frame_size=clip.frame_size)
    with LiveMemory() as memory:
        tracks = segment(sam2, clip, prompts, score_threshold=0.0, nms_iou=1.0)
    assert len(tracks.tracks) == objects
    assert abs(said / memory.peak - 1) < WITHIN, f"said {said / 1e6:.2f} MB, taken {memory.peak / 1e6:.2f} MB"


def test_points_on_several_frames_take_no_more(tmp_path, monkeypatch):
    sam2 = load_sam2(tiny_sam2.make_sam2(tmp_path / "tiny.safetensors", 3, 128))
    clip = moving_shapes(8, 64, 64, 3)
    monkeypatch.setattr(segmenter, "_LIBRARY_BYTES", 0)
    said = memory_needed(sam2, CPU, len(clip), points=12, frame_size=clip.frame_size)
    with LiveMemory() as memory:
        assert len(segment(sam2, clip, make_prompts(clip, 12, 3), score_threshold=0.2).tracks) > 0
    assert said / 3 < memory.peak <= said * (1 + WITHIN)


def test_more_frames_and_larger_pictures_take_more(tmp_path):
    small, large = (load_sam2(tiny_sam2.make_sam2(tmp_path / f"{size}.safetensors", 1, size)) for size in (64, 256))
    assert (
        memory_needed(small, CPU, 10) < memory_needed(small, CPU, 20) < memory_needed(small, CPU, 10**6) == memory_needed(small, CPU, 10**7)
    )
    assert memory_needed(small, CPU, 10) < memory_needed(large, CPU, 10)
    assert memory_needed(large, CPU, 10) <= memory_needed(large, torch.device("cuda"), 10)
