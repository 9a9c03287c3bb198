"""The bundled SAM 2 understands corrections: a negative point takes the neighbour away and leaves the object."""

import numpy as np
import pytest
import torch

from decaf.clips.base import clip_from_images
from decaf.data import Tracks
from decaf.demo import SAM2_FILE
from decaf.demo.scenes import make_scene
from decaf.errors import DecafError
from decaf.evaluation.metrics import region_similarity
from decaf.masks import MaskStore
from decaf.sam2 import load_sam2
from decaf.tracking import Marks, correct

FRAME = 3
# (seed, object, a point on it whose mask spills over onto a neighbour, a point on the neighbour), in pixels of frame 3: every clip of six
# frames from the seeds 70000000 to 70000199 in which one of six points does that.
SPILLS = (
    (70_000_021, 1, (199, 114), (250, 119)),
    (70_000_021, 2, (207, 146), (174, 122)),
    (70_000_045, 0, (135, 97), (190, 112)),
    (70_000_045, 3, (186, 89), (155, 73)),
    (70_000_115, 3, (250, 50), (209, 48)),
    (70_000_130, 2, (169, 139), (130, 105)),
    (70_000_151, 0, (70, 172), (58, 163)),
    (70_000_156, 1, (166, 170), (186, 155)),
    (70_000_168, 3, (99, 102), (41, 92)),
)


def at(point, height, width):
    return ((point[0] + 0.5) / width, (point[1] + 0.5) / height)


def mean_j(tracks, truth):
    return float(region_similarity(tracks.union(), truth).mean())


@pytest.fixture(scope="module")
def spilled():
    """Per case: clip, tracks of the point, the negative point, and the true masks."""
    sam2 = load_sam2(SAM2_FILE)
    cases = []
    for seed, index, on, off in SPILLS:
        scene = make_scene(seed, length=6)
        clip, truth = clip_from_images(torch.from_numpy(scene.frames)), torch.from_numpy(scene.masks[index])
        size = clip.frame_size
        nothing = Tracks(MaskStore(0, len(clip), size), ())
        cases.append((clip, correct(sam2, clip, nothing, Marks(FRAME, positive=[at(on, *size)])), at(off, *size), truth))
    return sam2, cases


def test_a_negative_point_on_a_spill_leaves_the_object(spilled):
    sam2, cases = spilled
    before, after, followed = [], [], []
    for clip, tracks, off, truth in cases:
        before.append(float(region_similarity(tracks.union()[FRAME : FRAME + 1], truth[FRAME : FRAME + 1]).mean()))
        try:
            corrected = correct(sam2, clip, tracks, Marks(FRAME, negative=[off]), number=0)
        except DecafError as error:  # nothing is left on any frame
            assert "finds nothing" in str(error)
            after.append(0.0)
            followed.append(0.0)
            continue
        x, y = off
        height, width = clip.frame_size
        assert not corrected.union()[FRAME, int(y * height), int(x * width)]
        after.append(float(region_similarity(corrected.union()[FRAME : FRAME + 1], truth[FRAME : FRAME + 1]).mean()))
        followed.append(mean_j(corrected, truth) - mean_j(tracks, truth))
    before, after = np.array(before), np.array(after)
    assert before.max() < 0.8, "the point's mask no longer spills: choose other clips"
    # One negative point made every one of these masks empty, or nearly, in a model that had seen positive points alone.
    assert (after > before).sum() >= len(cases) - 1
    assert np.median(after) > 0.8 and after.mean() > before.mean() + 0.12
    assert np.median(followed) > 0.1, "what was corrected on a frame is followed through the clip"
