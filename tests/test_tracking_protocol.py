"""The seam between tracking and what segments: another segmenter, without SAM 2, goes all the way."""

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from decaf.clips.base import clip_from_images
from decaf.clips.identity import clip_info
from decaf.data import FusedAttention, SAM2Prompts
from decaf.report import Report
from decaf.tracking import segment
from decaf.tracking.segmenter import MemoryReach, Outputs


@dataclass(frozen=True)
class Picture:
    """Colours (S, S, 3), which are this segmenter's features."""

    colours: torch.Tensor
    nbytes: int


@dataclass(frozen=True)
class ByColour:
    """An object is what has the colour that it had when it was last seen. A memory is a colour; there are no pointers."""

    title = "By colour"
    name: str = "a segmenter by colour"
    image_size: int = 48
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    reach: MemoryReach = MemoryReach(memories=3, pointers=1)
    seen: list = field(default_factory=list)

    @contextlib.contextmanager
    def segmenter(self, check_cancelled=lambda: None):
        check_cancelled()
        yield self

    def working_bytes(self, at_once, objects):
        return 0

    def encode(self, picture):
        assert picture.dtype == torch.uint8 and picture.shape == (self.image_size, self.image_size, 3)
        return Picture(picture.float(), 4 * picture.numel())

    def _logits(self, features, colours):
        return 30 - (features.colours[None] - torch.stack(colours)[:, None, None]).norm(dim=-1)[:, None]

    def point_masks(self, features, xy):
        x, y = (xy * self.image_size).long().clamp(max=self.image_size - 1).T
        logits = self._logits(features, list(features.colours[y, x]))
        return logits, 1 - (logits > 0).float().mean((1, 2, 3))  # a large one is the ground

    def remember(self, features, masks):
        size = features.colours.shape[:2]
        small = [torch.nn.functional.interpolate(mask[None, None].float(), size=size)[0, 0] > 0.5 for mask in masks]
        colours = [features.colours[mask].mean(0) for mask in small]
        return Outputs(self._logits(features, colours), colours, [None] * len(masks))

    def track(self, features, banks, remember, length):
        for bank in banks:
            self.seen.append(([d for d, _ in bank.memories], [d for d, _ in bank.pointers]))
        logits = self._logits(features, [bank.memories[-1][1] for bank in banks])
        new = []
        for wanted, bank, one in zip(remember, banks, logits[:, 0] > 0, strict=True):
            colour = features.colours[one].mean(0) if one.any() else bank.memories[-1][1]
            new.append(colour if wanted else None)
        return Outputs(logits, new, [None] * len(banks))


COLOURS = ((220, 40, 40), (40, 60, 220))
GROUND = (128, 128, 128)


def two_squares(length=9, size=64, side=16):
    """A red square that goes right and a blue one that comes on the fourth frame: clip, and (2, T, H, W) truth."""
    frames = torch.tensor(GROUND, dtype=torch.uint8).repeat(length, size, size, 1)
    truth = torch.zeros(2, length, size, size, dtype=torch.bool)
    for t in range(length):
        for i, (top, left) in enumerate([(4, 4 + 4 * t), (40, 44 - 4 * t)]):
            if i == 0 or t >= 3:
                frames[t, top : top + side, left : left + side] = torch.tensor(COLOURS[i], dtype=torch.uint8)
                truth[i, t, top : top + side, left : left + side] = True
    return clip_from_images(frames.float() / 255), truth


def prompts_on(clip, truth):
    """Points on the objects on three key frames, two of them at one place; the map is where the objects are."""
    keys = (0, 4, 8)
    cover = torch.nn.functional.adaptive_avg_pool2d(truth.any(0)[list(keys)].float(), (8, 8))
    key, xy = [], []
    for i, k in ((0, 0), (0, 0), (0, 2), (1, 1), (1, 2)):
        y, x = truth[i, keys[k]].nonzero().float().mean(0) / clip.frame_size[0]
        key.append(k)
        xy.append((float(x), float(y)))
    fused = FusedAttention(cover / cover.amax(), clip_info(clip, keys))
    return SAM2Prompts(torch.tensor(key), torch.tensor(xy), torch.linspace(0.9, 1, len(key)), fused)


@pytest.mark.parametrize("batch", [1, 8])
def test_another_segmenter_goes_all_the_way(monkeypatch, batch):
    model = ByColour()
    monkeypatch.setattr("decaf.tracking.track._PIXELS_AT_ONCE_ON_CPU", batch * model.image_size**2)
    clip, truth = two_squares()
    calls = []
    report = Report(lambda *call: calls.append(call))
    tracks = segment(model, clip, prompts_on(clip, truth), score_threshold=0.3, method="as published", progress=report)
    assert len(tracks.tracks) == 2 and tracks.message == ""
    for track in tracks.tracks:
        truly = truth[0 if track.xy[1] < 0.5 else 1]
        masks = tracks.masks(track.id)
        assert (masks & truly).sum() > 0.85 * (masks | truly).sum()
        assert not masks[~truly.flatten(1).any(1)].any(), "not there, before it came"
    assert {what for *_, what in calls} == {
        "By colour: points and tracklets on the key frames",
        "By colour: tracking through the clip",
    }
    assert report.counts == {"sam2_key_encodings": 3, "sam2_clip_encodings": 6}
    for distances, pointers in model.seen:
        assert pointers == distances[:1], "the prompt's pointer alone"
        assert distances[0] > 0 and distances[1:] in ([], [1], [2, 1], [2])


def test_what_it_cannot_find_is_said_in_its_name():
    clip, truth = two_squares()

    class Blind(ByColour):
        title = "The blind one"

        def _logits(self, features, colours):
            return torch.full((len(colours), 1, 4, 4), -1.0)

    tracks = segment(Blind(), clip, prompts_on(clip, truth), method="as published")
    assert tracks.tracks == () and "The blind one gives an empty mask at all 5 points" in tracks.message


def test_the_package_is_not_needed_for_that():
    """Neither it nor the folder that knows it is imported."""
    code = (
        "import sys\n"
        "sys.modules['sam2'] = None\n"
        "import test_tracking_protocol as t\n"
        "clip, truth = t.two_squares()\n"
        "assert t.segment(t.ByColour(), clip, t.prompts_on(clip, truth), score_threshold=0.3).union().any()\n"
        "print([name for name in sys.modules if name.startswith(('decaf.sam2', 'sam2.', 'hydra'))])\n"
    )
    found = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=found)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
