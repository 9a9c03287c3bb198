"""From points to tracks: against the slow way, and in every odd situation."""

import dataclasses
import functools

import pytest
import sam2_oracle
import tiny_sam2
import torch
from as_published import segment
from moving_shapes import make_prompts, moving_shapes

from decaf.clips.base import clip_from_images
from decaf.data import FusedAttention, SAM2Prompts
from decaf.errors import DecafError
from decaf.masks import pack_bits
from decaf.report import Report
from decaf.sam2 import load_sam2, memory_attention, narrow_values
from decaf.sam2.encoder import FastEncoder
from decaf.tracking import TrackMemo, feature_cache
from decaf.tracking.candidates import suppress
from decaf.tracking.memo import Found


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


def dense(tracks):
    """(N, T, H, W) bool"""
    return torch.stack([tracks.masks(place) for place in range(len(tracks.tracks))])


CASES = [
    # model's seed and version; length, height, width, points, score threshold
    (1, "2.1", 1, 64, 64, 3, 0.8),
    (3, "2", 2, 50, 70, 5, 0.7),
    (3, "2.1", 7, 64, 48, 9, 0.6),
    (1, "2", 20, 40, 56, 12, 0.55),
    (5, "2.1", 18, 64, 64, 12, 0.4),
]


@pytest.mark.slow
@pytest.mark.parametrize("seed, version, length, height, width, points, threshold", CASES)
def test_equals_the_slow_way(models, tmp_path, seed, version, length, height, width, points, threshold):
    ours, predictor = models(seed, version)
    clip = moving_shapes(length, height, width, seed)
    prompts = make_prompts(clip, points, seed)
    kept, logits = sam2_oracle.segment(predictor, clip, prompts, tmp_path, score_threshold=threshold)
    assert (logits > 0).any() and not (logits > 0).all()

    report = Report()
    tracks = segment(ours, clip, prompts, score_threshold=threshold, progress=report)
    assert len(tracks.tracks) == len(kept) and (tracks.length, tracks.frame_size) == (length, (height, width))
    for number, (track, theirs) in enumerate(zip(tracks.tracks, kept, strict=True)):
        assert track.id == number
        assert track.frame == prompts.fused.clip.key_frames[theirs["key"]]
        assert track.xy == tuple(prompts.xy[theirs["point"]].tolist())
        assert track.attention == float(prompts.value[theirs["point"]])
        assert track.predicted_iou == pytest.approx(theirs["iou"], abs=1e-5)
        assert track.consistency == pytest.approx(theirs["consistency"], abs=2e-3)
        assert track.score == pytest.approx(theirs["final"], abs=1e-3)
        masks, expected = tracks.masks(number), logits[number] > 0
        assert (masks & expected).sum() >= 0.999 * (masks | expected).sum()
        assert (logits[number][masks != expected].abs() <= 2e-2).all()
    counts = report.counts
    assert counts["sam2_key_encodings"] <= len(prompts.fused.map)
    assert counts["sam2_key_encodings"] + counts["sam2_clip_encodings"] == length  # key frames are not encoded again for the clip


def test_the_map_decides_when_nothing_else_differs(models):
    """A tracklet over what was attended to is kept before one that is not."""
    ours, _ = models(3)
    clip = moving_shapes(4, 64, 64, 3)
    prompts = make_prompts(clip, 8, 3, keys=[0])
    low, high = (segment(ours, clip, prompts, score_threshold=t) for t in (-1.0, 2.0))
    assert len(low.tracks) > len(high.tracks) == 1
    assert high.tracks[0].score == max(track.score for track in low.tracks)
    limited = segment(ours, clip, prompts, score_threshold=-1.0, max_tracks=2)
    assert [t.score for t in limited.tracks] == [t.score for t in low.tracks if t.score >= sorted(t.score for t in low.tracks)[-2]]
    assert [t.id for t in limited.tracks] == [0, 1]


def test_another_threshold_tracks_only_what_was_not_tracked(models):
    ours, _ = models(3)
    clip = moving_shapes(7, 64, 64, 3)
    prompts, other = make_prompts(clip, 8, 3), make_prompts(clip, 8, 4)
    features, memo = feature_cache(ours, aside=1 << 30), TrackMemo()

    def run(prompts, threshold, **more):
        report, calls = Report(lambda *call: calls.append(call)), []
        tracks = segment(ours, clip, prompts, score_threshold=threshold, progress=report, features=features, memo=memo, **more)
        assert report.counts["sam2_key_encodings"] + report.counts["sam2_clip_encodings"] == (7 if first else 0)
        alone = segment(ours, clip, prompts, score_threshold=threshold, **more)
        assert tracks.tracks == alone.tracks and tracks.message == alone.message
        assert torch.equal(dense(tracks), dense(alone))
        return tracks, {what for *_, what in calls}

    scores = sorted({track.score for track in segment(ours, clip, prompts, score_threshold=-1.0).tracks})
    assert len(scores) > 3, "objects must differ in score"
    first = True
    low, _ = run(prompts, scores[-4])
    first = False
    high, steps = run(prompts, scores[-3])
    assert len(high.tracks) < len(low.tracks) and not steps, "nothing is left to do"
    assert not run(prompts, scores[-3], max_tracks=1)[1] and not run(dataclasses.replace(prompts), scores[-4])[1]
    lowest, steps = run(prompts, -1.0)
    assert len(lowest.tracks) > len(low.tracks) and steps == {"SAM 2: tracking through the clip"}
    assert "SAM 2: points and tracklets on the key frames" in run(other, 0.7)[1], "another query is another search"
    assert "SAM 2: points and tracklets on the key frames" in run(prompts, 0.7, nms_iou=0.3)[1]


def test_a_memo_keeps_the_latest(models):
    memo, found = TrackMemo(2), [Found(make_prompts(moving_shapes(3, 40, 50), 4, seed), 0.7, []) for seed in range(3)]
    for each in found:
        memo.keep(each)
    assert [memo.found(each.prompts, 0.7) for each in found] == [None, *found[1:]]
    moved = dataclasses.replace(found[2].prompts, xy=found[2].prompts.xy.flip(0))
    assert memo.found(moved, 0.7) is None and memo.found(found[2].prompts, 0.6) is None


def test_half_precision(models, monkeypatch):
    ours, _ = models(3)
    clip = moving_shapes(5, 40, 50, 3)
    prompts = make_prompts(clip, 6, 3)
    exact = segment(ours, clip, prompts, max_tracks=1)
    attention, dtypes = memory_attention.narrow_value_attention, set()
    watched = lambda *args: dtypes.update(x.dtype for x in args[:3]) or attention(*args)  # noqa: E731
    monkeypatch.setattr(memory_attention, "narrow_value_attention", watched)
    rough = segment(dataclasses.replace(ours, dtype=torch.bfloat16), clip, prompts, max_tracks=1)
    assert dtypes == {torch.bfloat16}, "nothing is widened only to be narrowed again"
    assert [t.xy for t in rough.tracks] == [t.xy for t in exact.tracks]
    a, b = rough.union(), exact.union()
    assert 0.7 < (a & b).sum() / (a | b).sum() < 1  # random weights magnify the rounding


def test_no_points(models):
    ours, _ = models()
    clip = moving_shapes(3, 40, 50)
    tracks = segment(ours, clip, make_prompts(clip, 0))
    assert (tracks.length, tracks.frame_size) == (3, (40, 50)) and tracks.tracks == () and "Nothing found" in tracks.message
    assert tracks.union().shape == (3, 40, 50) and not tracks.union().any()


def test_empty_masks(models):
    ours, _ = models()
    clip = moving_shapes(3, 40, 50)
    bias = ours.model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias
    before = bias.clone()
    bias.fill_(-1000)  # nothing is ever seen
    try:
        tracks = segment(ours, clip, make_prompts(clip, 4))
    finally:
        bias.copy_(before)
    assert (tracks.length, tracks.frame_size) == (3, (40, 50)) and tracks.tracks == () and "empty mask at all 4 points" in tracks.message


@pytest.mark.parametrize("height, width", [(1, 1), (3, 1), (16, 400), (400, 16)])
def test_frames_of_odd_shape(models, height, width):
    ours, _ = models()
    clip = clip_from_images(torch.rand(3, height, width, 3, generator=torch.Generator().manual_seed(0)))
    tracks = segment(ours, clip, make_prompts(clip, 3), score_threshold=0.0)
    assert tracks.union().shape == (3, height, width) and len(tracks.tracks) > 0


def test_a_constant_map(models):
    ours, _ = models()
    clip = moving_shapes(3, 40, 50)
    prompts = make_prompts(clip, 4)
    flat = FusedAttention(torch.ones(3, 6, 7), prompts.fused.clip)
    tracks = segment(ours, clip, SAM2Prompts(prompts.key, prompts.xy, prompts.value, flat), score_threshold=0.1)
    assert all(track.consistency == 0 for track in tracks.tracks) and len(tracks.tracks) > 0


def test_another_clip(models):
    ours, _ = models()
    prompts = make_prompts(moving_shapes(3, 40, 50), 4)
    with pytest.raises(DecafError, match="3 frames, but .* has 4"):
        segment(ours, moving_shapes(4, 40, 50), prompts)


def test_many_points_in_small_batches(models, monkeypatch):
    """How many objects and points go at once does not change what comes out."""
    ours, _ = models(3)
    clip = moving_shapes(6, 48, 64, 3)
    prompts = make_prompts(clip, 30, 3)
    whole = segment(ours, clip, prompts, score_threshold=0.3)
    monkeypatch.setattr("decaf.tracking.track._PIXELS_AT_ONCE_ON_CPU", 2 * 64 * 64)
    monkeypatch.setattr("decaf.tracking.masks._BYTES_AT_ONCE", 1)
    small = segment(ours, clip, prompts, score_threshold=0.3)
    assert [(t.frame, t.xy) for t in small.tracks] == [(t.frame, t.xy) for t in whole.tracks] and len(whole.tracks) > 2
    for number in range(len(whole.tracks)):
        a, b = whole.masks(number), small.masks(number)
        assert (a & b).sum() >= 0.999 * (a | b).sum()


class Cancelled(BaseException):
    pass


def test_progress_and_cancel(models):
    ours, _ = models()
    clip = moving_shapes(6, 40, 50)
    prompts = make_prompts(clip, 5)
    calls = []
    expected = segment(ours, clip, prompts, progress=lambda *call: calls.append(call))
    for what in ("SAM 2: points and tracklets on the key frames", "SAM 2: tracking through the clip"):
        done = [(done, total) for done, total, name in calls if name == what]
        assert done[0][0] == 0 and done == sorted(done) and all(d <= total == done[0][1] for d, total in done)
        assert len(done) >= 6
    for stop in (0, 3, len(calls) - 1):
        seen = []

        def cancel(*call, seen=seen, stop=stop):
            seen.append(call)
            if len(seen) > stop:
                raise Cancelled

        with pytest.raises(Cancelled):
            segment(ours, clip, prompts, progress=cancel)
        assert len(seen) == stop + 1
    again = segment(ours, clip, prompts)
    assert torch.equal(dense(again), dense(expected))


@pytest.mark.parametrize(
    "place, name, wide",
    [
        (FastEncoder, "__call__", 128),
        (memory_attention.BatchedMemoryAttention, "__call__", 128),
        (memory_attention, "narrow_value_attention", 1),
    ],
    ids=["encoder", "memory", "tiles"],
)
def test_cancel_within_a_frame(models, monkeypatch, place, name, wide):
    """At 1024 pixels a CPU takes seconds for each of these."""
    monkeypatch.setattr(narrow_values, "_WIDE", wide)
    ours, _ = models()
    clip = moving_shapes(3, 40, 50)
    inside, work = [], getattr(place, name)

    def watched(*args):
        inside.append(1)
        result = work(*args)
        inside.pop()
        return result

    def cancel(*call):
        if inside:
            raise Cancelled

    monkeypatch.setattr(place, name, watched)
    with pytest.raises(Cancelled):
        segment(ours, clip, make_prompts(clip, 2), progress=cancel)


@pytest.mark.parametrize("failures", [1, 2])
def test_out_of_gpu_memory(models, monkeypatch, failures):
    """Once more with less at a time; then an error of the same kind, which the host knows, that says what helps."""
    ours, _ = models(3)
    clip = moving_shapes(5, 40, 50, 3)
    prompts = make_prompts(clip, 8, 3)
    expected = segment(ours, clip, prompts, score_threshold=0.3)
    heads, sizes = ours.model._forward_sam_heads, []

    def forward(*args, **more):
        sizes.append(len(more.get("backbone_features", args[0] if args else None)))
        if sizes[-1] > 1 or failures == 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return heads(*args, **more)

    monkeypatch.setattr(ours.model, "_forward_sam_heads", forward)
    if failures == 2:
        with pytest.raises(torch.cuda.OutOfMemoryError, match="smaller SAM 2 model"):
            segment(ours, clip, prompts)
        return
    tracks = segment(ours, clip, prompts, score_threshold=0.3)
    assert max(sizes) > 1
    assert [t.xy for t in tracks.tracks] == [t.xy for t in expected.tracks]
    assert (dense(tracks) != dense(expected)).float().mean() < 0.001


def packed(*spans):
    """(n, 1, 4) packed masks of one row, 32 pixels wide, with the pixels start..stop-1 set."""
    x = torch.arange(32)
    return pack_bits(torch.stack([((start <= x) & (x < stop))[None] for start, stop in spans]))


NONE = torch.zeros(0, 1, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    "masks, scores, earlier, earlier_scores, kept, deleted",
    [
        ([(0, 10)], [1.0], [], [], [0], []),
        ([(0, 10), (0, 10)], [1.0, 1.0], [], [], [0], []),  # the first of equals
        ([(0, 10)], [1.0], [(0, 10)], [1.0], [], []),  # the earlier of equals
        ([(0, 10)], [1.1], [(0, 10)], [1.0], [0], [0]),
        ([(0, 10)], [1.0], [(0, 10), (0, 9)], [0.9, 1.1], [], []),  # beaten by one, it does not delete the other
        ([(0, 10)], [0.9], [(0, 7)], [1.0], [0], []),  # IoU of 0.7 exactly is not above 0.7
        ([(0, 10), (2, 12)], [1.0, 0.9], [], [], [0, 1], []),
        ([(0, 0), (0, 0)], [1.0, 0.9], [(0, 0)], [2.0], [0, 1], []),  # empty masks overlap nothing
    ],
)
def test_corner_cases_of_suppression(masks, scores, earlier, earlier_scores, kept, deleted):
    previous = packed(*earlier) if earlier else NONE
    assert suppress(packed(*masks), torch.tensor(scores), previous, torch.tensor(earlier_scores), 0.7) == (kept, deleted)


def test_what_is_named_as_not_this_is_dropped(models):
    """Whatever its score is. Nothing is encoded again for it, and without anything left a message says why."""
    model, _ = models(3)
    clip = moving_shapes(6, 64, 64, 3)
    prompts, memo, report = make_prompts(clip, 9, 3), TrackMemo(), Report()
    every = segment(model, clip, prompts, score_threshold=0.0, memo=memo, progress=report)
    assert len(every.tracks) > 2
    done = dict(report.counts)

    def without(not_this, **more):
        told = dataclasses.replace(prompts, fused=dataclasses.replace(prompts.fused, not_this=not_this))
        return segment(model, clip, told, memo=memo, progress=report, **{"score_threshold": 0.0} | more)

    # All frames are key frames, so what lies over the key frames is the masks themselves.
    cover = torch.nn.functional.adaptive_avg_pool2d(dense(every).float(), prompts.fused.map.shape[1:])
    weights = torch.rand(prompts.fused.map.shape, generator=torch.Generator().manual_seed(5)) * 1.2
    meant = [track.xy for track, part in zip(every.tracks, cover, strict=True) if (part * weights).sum() <= (part * prompts.fused.map).sum()]
    assert 0 < len(meant) < len(every.tracks)
    assert [track.xy for track in without(weights).tracks] == meant
    assert [track.xy for track in without(torch.zeros_like(weights)).tracks] == [track.xy for track in every.tracks]
    assert [track.xy for track in without(weights, score_threshold=1.0).tracks][0] in meant, "the best guess is among the rest"
    nothing = without(torch.ones_like(weights))
    assert not nothing.tracks and "'not this'" in nothing.message
    assert report.counts == done
    with pytest.raises(DecafError, match="'not this' has the shape"):
        without(weights[1:])
