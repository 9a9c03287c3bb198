"""Corrections by hand: against the package's own predictor, and everything that must not change or cannot be."""

import functools

import pytest
import sam2_oracle
import tiny_sam2
import torch
from as_published import segment
from moving_shapes import make_prompts, moving_shapes

from decaf.errors import DecafError
from decaf.report import Report
from decaf.sam2 import load_sam2
from decaf.sam2.fast_steps import FastSteps
from decaf.sam2.package_steps import PackageSteps
from decaf.tracking import Marks, TrackMemo, correct, feature_cache, is_kept
from decaf.tracking.correction import sweep_prompted
from decaf.tracking.frames import FeatureCache, FrameEncoder
from decaf.tracking.segmenter import Clicks


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(seed, version) -> our model and the package's predictor with the same weights, at 64 px."""

    @functools.cache
    def get(seed=1, version="2.1"):
        ours = load_sam2(tiny_sam2.make_sam2(tmp_path_factory.mktemp("sam2") / "tiny.safetensors", seed, 64, version))
        predictor = tiny_sam2.build(sam2_oracle.predictor_class(), 64, version).eval()
        predictor.load_state_dict(ours.model.state_dict())
        return ours, predictor

    return get


def tracked(ours, length=9, height=60, width=76, seed=1):
    """A clip and at least two objects in it."""
    clip = moving_shapes(length, height, width, seed)
    tracks = segment(ours, clip, make_prompts(clip, 8, seed), score_threshold=-1.0, max_tracks=3)
    assert len(tracks.tracks) >= 2
    return clip, tracks


def same(masks, theirs):
    """Equal but for pixels that rounding may turn."""
    expected = theirs > 0
    assert expected.any() and not expected.all(), "masks that are all empty or all full compare nothing"
    assert (theirs[masks != expected].abs() <= 2e-2).all() and (masks != expected).float().mean() < 1e-3


def blob(height, width, seed=0):
    cells = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    noise = torch.nn.functional.interpolate(cells, size=(height, width), mode="bicubic")
    return noise[0, 0] > 0.6


MARKS = {
    "a point": ([(0.3, 0.4)], [], None),
    "points of both kinds": ([(0.3, 0.4), (0.5, 0.5)], [(0.7, 0.2)], None),
    "a negative point": ([], [(0.5, 0.5)], None),
    "a box": ([], [], (0.2, 0.3, 0.6, 0.9)),
    "a box and points": ([(0.4, 0.5)], [(0.25, 0.35)], (0.2, 0.3, 0.6, 0.9)),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed, version", [(1, "2.1"), (3, "2"), (2, "2.1, often unseen")])
@pytest.mark.parametrize("mode", ["refine", "add", "replace"])
@pytest.mark.parametrize("marked", MARKS)
def test_equals_the_predictor(models, tmp_path, seed, version, mode, marked):
    ours, predictor = models(seed, version)
    clip, tracks = tracked(ours, seed=seed)
    height, width = clip.frame_size
    positive, negative, box = MARKS[marked]
    first = correct(ours, clip, tracks, Marks(2, [(0.6, 0.6)]), number=1)  # an earlier correction, which stays a key frame
    before = first.masks(1)
    anchors = {} if mode == "replace" else {2: before[2]}
    if mode == "add":
        anchors[tracks.tracks[1].frame] = before[tracks.tracks[1].frame]
    anchors.pop(5, None)
    base = None if mode == "replace" or not before[5].any() else before[5]
    if base is None and marked == "a negative point":
        with pytest.raises(DecafError, match="Only negative points"):
            correct(ours, clip, first, Marks(5, positive, negative, box), number=1, mode=mode)
        return
    size = torch.tensor([width, height])
    points = torch.tensor(positive + negative).view(-1, 2) * size if positive or negative else None
    labels = torch.tensor([1] * len(positive) + [0] * len(negative)) if positive or negative else None
    pixels = None if box is None else torch.tensor(box) * torch.cat([size, size])
    state = sam2_oracle.start(predictor, clip, tmp_path)
    theirs = sam2_oracle.correct(predictor, state, {t: m for t, m in anchors.items() if m.any()}, 5, base, points, labels, pixels)
    if not (theirs > 0).any():
        with pytest.raises(DecafError, match="finds nothing"):
            correct(ours, clip, first, Marks(5, positive, negative, box), number=1, mode=mode)
        return
    found = correct(ours, clip, first, Marks(5, positive, negative, box), number=1, mode=mode)
    same(found.masks(1), theirs)
    assert found.tracks[1].corrected == ((5,) if mode == "replace" else (2, 5))
    for place in range(len(tracks.tracks)):
        if place != 1:
            assert found.tracks[place] == tracks.tracks[place] and torch.equal(found.masks(place), tracks.masks(place))


@pytest.mark.parametrize("clicked", [False, True])
def test_a_mask_of_ones_own(models, tmp_path, clicked):
    """For a new object, alone and with clicks on it."""
    ours, predictor = models()
    clip, tracks = tracked(ours)
    mask = blob(*clip.frame_size)
    marks = Marks(4, [(0.5, 0.5)] if clicked else [], [], None, mask)
    height, width = clip.frame_size
    points, labels = (torch.tensor([[0.5 * width, 0.5 * height]]), torch.tensor([1])) if clicked else (None, None)
    theirs = sam2_oracle.correct(predictor, sam2_oracle.start(predictor, clip, tmp_path), {}, 4, mask, points, labels, None)
    found = correct(ours, clip, tracks, marks)
    count = len(tracks.tracks)
    same(found.masks(count), theirs)
    new = found.tracks[count]
    assert (new.id, new.frame, new.corrected, new.attention, new.consistency) == (count, 4, (4,), 0, 0)
    assert (new.predicted_iou == 1) != clicked
    assert found.tracks[:count] == tracks.tracks and torch.equal(found.union(objects=range(count)), tracks.union())


def test_the_packages_own_steps_give_the_same(models):
    """Step by step, the fast ones too, with a prompt that is still to come among the memories."""
    ours, _ = models(3, "2.1")
    clip, tracks = tracked(ours, seed=3)
    clicks = Clicks(torch.tensor([[0.3, 0.6], [0.8, 0.2]]), torch.tensor([True, False]))
    found = []
    for steps in (PackageSteps, FastSteps):
        segmenter = steps(ours.model)
        encoder = FrameEncoder(segmenter, clip, FeatureCache(0), lambda: None)
        prompts = {
            1: segmenter.remember(encoder.encode(1), [blob(*clip.frame_size)]),
            6: segmenter.remember_clicks(encoder.encode(6), clicks, None)[0],
        }
        frames, logits = zip(*sweep_prompted(segmenter, encoder, prompts), strict=True)
        assert frames == (1, 2, 3, 4, 5, 6, 7, 8, 0)
        found.append(torch.cat(logits))
    assert (found[0] - found[1]).abs().max() <= 2e-2 and found[0].std() > 0


def test_one_sweep_and_none_where_features_are_kept(models):
    ours, _ = models()
    clip, tracks = tracked(ours)
    report, calls = Report(lambda *call: calls.append(call)), []
    features = feature_cache(ours, aside=1 << 30)
    found = correct(ours, clip, tracks, Marks(5, [(0.4, 0.4)]), number=0, progress=report, features=features)
    assert report.counts["sam2_correction_encodings"] == len(clip)
    assert [call[:2] for call in calls if call[2].endswith("corrected object")][-1] == (len(clip), len(clip))
    again = Report()
    for number, marks in ((0, Marks(3, [], [(0.2, 0.2)])), (None, Marks(8, [(0.7, 0.7)]))):
        found = correct(ours, clip, found, marks, number=number, progress=again, features=features)
    assert again.counts["sam2_correction_encodings"] == 0
    alone = correct(ours, clip, tracks, Marks(5, [(0.4, 0.4)]), number=0)
    assert torch.equal(alone.masks(0), correct(ours, clip, tracks, Marks(5, [(0.4, 0.4)]), number=0, features=features).masks(0))


def test_what_cannot_be(models):
    ours, _ = models()
    clip, tracks = tracked(ours)
    height, width = clip.frame_size

    def refused(marks, clip=clip, tracks=tracks, **more):
        with pytest.raises(DecafError) as error:
            correct(ours, clip, tracks, marks, **more)
        return str(error.value)

    point = [(0.5, 0.5)]
    assert "frames 0 to 8" in refused(Marks(9, point)) and "frame -1" in refused(Marks(-1, point))
    assert f"{width}x{height}" in refused(Marks(0, [(1.5, 0.5)])) and "(114, 30)" in refused(Marks(0, [(1.5, 0.5)]))
    assert "negative point (38, -6)" in refused(Marks(0, point, [(0.5, -0.1)]))
    assert "(nan, 0.5)" in refused(Marks(0, [(float("nan"), 0.5)]))
    assert "is empty or" in refused(Marks(0, box=(0.5, 0.5, 0.5, 0.9))) and "box" in refused(Marks(0, box=(0.5, 0.5, 0.9, 1.1)))
    assert "There is no object 7" in refused(Marks(0, point), number=7) and "0, 1" in refused(Marks(0, point), number=7)
    assert "40x30" in refused(Marks(0, mask=torch.ones(30, 40, dtype=torch.bool)))
    assert "empty" in refused(Marks(0, mask=torch.zeros(height, width, dtype=torch.bool)))
    assert "Nothing is marked" in refused(Marks(0))
    assert "Only negative" in refused(Marks(0, [], point)) and "a new object" in refused(Marks(0, [], point))
    assert "'undo'" in refused(Marks(0, point), mode="undo")
    assert "tracks were made" in refused(Marks(0, point), clip=moving_shapes(5, height, width, 1))
    assert "is not the clip that the tracks were made from" in refused(Marks(0, point), clip=moving_shapes(9, height, width, 77))


def test_an_equal_correction_runs_no_model(models):
    ours, _ = models()
    clip, tracks = tracked(ours)
    number, memo = tracks.tracks[0].id, TrackMemo()
    inside = tracks.masks(0, 4, 5)[0].nonzero().double().mean(0).tolist()
    on = ((inside[1] + 0.5) / 76, (inside[0] + 0.5) / 60)

    def made(x=on[0], frame=4, of=tracks, **more):
        report = Report()
        found = correct(ours, clip, of, Marks(frame, positive=[(x, on[1])]), number=number, progress=report, memo=memo, **more)
        return found, report.counts.get("sam2_correction_encodings", 0)

    first, encoded = made()
    assert encoded == len(clip)
    assert is_kept(memo, clip, tracks, Marks(4, positive=[on]), number=number)
    # The same objects as another threshold gives them, of which another has left.
    again, encoded = made(of=tracks.picked([0]))
    assert encoded == 0 and torch.equal(again.masks(0, 0, len(clip)), first.masks(0, 0, len(clip))) and again.tracks[0] == first.tracks[0]
    others = ({"x": on[0] + 0.01}, {"frame": 5}, {"mode": "replace"}, {"mode": "add"}, {"of": first, "frame": 5})
    assert all(made(**other)[1] == len(clip) for other in others), "another point, frame, mode or mask is another correction"
