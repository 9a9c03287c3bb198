"""However long the clip, no stage holds more of it."""

import weakref

import pytest
import torch
from as_published import segment
from moving_shapes import moving_shapes

from decaf.clips import open_clip, write_video
from decaf.clips.base import Clip
from decaf.clips.identity import clip_info
from decaf.data import FusedAttention, SAM2Prompts
from decaf.report import silent
from decaf.results.write import _overlay
from decaf.sam2 import load_sam2
from decaf.tracking.memory_plan import TrackedObject


class CountedClip(Clip):
    """A clip that knows how many of its frames somebody holds. `most`: the most at a time."""

    def __init__(self, frames: Clip):
        self.name, self.frame_size, self._frames = frames.name, frames.frame_size, frames
        self.alive = self.most = 0

    def __len__(self):
        return len(self._frames)

    def _read(self, index):
        frame = self._frames[index].clone()
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(frame, self._dropped)
        return frame

    def _dropped(self):
        self.alive -= 1


@pytest.mark.slow
def test_frames_are_streamed_and_what_is_kept_does_not_grow(sam2_file, tmp_path, monkeypatch):
    """Two clips, one twice as long: the same number of frames, memories and pointers is alive at a time."""
    sam2, alive = load_sam2(sam2_file), []
    release = TrackedObject.release

    def counting(one, step):
        alive.append(len(one.memories) + len(one.pointers))
        release(one, step)

    monkeypatch.setattr(TrackedObject, "release", counting)
    found = {}
    for length in (52, 104):
        clip = CountedClip(moving_shapes(length, 24, 32))
        keys = [0, 20, 39]
        fused = FusedAttention(torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0)), clip_info(clip, keys))
        prompts = SAM2Prompts(torch.tensor([1, 1, 1]), torch.tensor([[0.3, 0.4], [0.6, 0.6], [0.5, 0.3]]), torch.ones(3), fused)
        tracks = segment(sam2, clip, prompts, score_threshold=0.0)
        path = tmp_path / f"{length}.mp4"
        write_video(path, _overlay(clip, tracks, "spotlight", silent), 25, clip.frame_size)
        assert len(open_clip(path)) == tracks.length == length and len(tracks.tracks) > 0
        found[length] = clip.most, max(alive)
        assert clip.alive <= 1
    assert found[52] == found[104] and found[104][0] <= 4
