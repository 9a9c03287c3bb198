"""Which objects the attention means: scores against sums in float64, and what is picked."""

import math
from dataclasses import replace

import pytest
import torch
from made_attention import fused

from decaf.data import Track, Tracks
from decaf.errors import DecafError
from decaf.masks import MaskStore
from decaf.settings import MATCHES, PICKS, PickSettings
from decaf.tracking.match import agreement, density, pick_by_attention
from decaf.tracking.selection import attention_consistency

ONE, ALL, FIXED = PICKS


def random_case(seed=0, objects=5):
    random = torch.Generator().manual_seed(seed)
    coverage = (torch.rand(objects, 4, 6, 8, generator=random) - 0.5).clamp(0, 1) * 2
    coverage[1, 2:] = 0
    coverage[2] = 0
    return coverage, torch.rand(4, 6, 8, generator=random)


def test_scores_are_those_of_plain_sums():
    coverage, attention = random_case()
    found, mean = agreement(coverage, attention), density(coverage, attention)
    for index, covered in enumerate(coverage.double().tolist()):
        product = own = attended = area = 0.0
        for frame, (cells, values) in enumerate(zip(covered, attention.double().tolist(), strict=True)):
            flat, map_ = sum(cells, []), sum(values, [])
            if not any(flat):
                assert index == 2 or (index == 1 and frame >= 2)
                continue
            product += sum(c * a for c, a in zip(flat, map_, strict=True))
            own += sum(c * c for c in flat)
            attended += sum(a * a for a in map_)
            area += sum(flat)
        wanted = product / math.sqrt(own * attended) if own else 0.0
        assert found[index].item() == pytest.approx(wanted, abs=1e-6)
        assert mean[index].item() == pytest.approx(product / area if area else 0.0, abs=1e-6)


def test_agreement_is_one_for_what_is_attended_and_less_for_a_part_or_more():
    attention = torch.zeros(2, 6, 8)
    attention[:, 1:4, 1:5] = 1
    whole, part, more = attention.clone(), attention.clone(), torch.ones(2, 6, 8)
    part[:, 2:] = 0
    briefly = attention.clone()
    briefly[1] = 0
    found = agreement(torch.stack([whole, part, more, 1 - attention, briefly, torch.zeros(2, 6, 8)]), attention)
    assert found[0] == pytest.approx(1) and found[4] == pytest.approx(1), "an object that is there for a part of the clip can win"
    assert found[1] < 0.7 and found[2] < 0.7 and found[3] == 0 and found[5] == 0
    assert density(part[None], attention)[0] == pytest.approx(1), "which is why density takes parts for the whole"


def boxes(places, length=3, size=(90, 120)):
    """Tracks of objects, each a box (top, bottom, left, right) in cells of 15 pixels on all frames, or on some of them."""
    store = MaskStore(len(places), length, size)
    for index, (top, bottom, left, right, *frames) in enumerate(places):
        for frame in frames or range(length):
            mask = torch.zeros(size, dtype=torch.bool)
            mask[15 * top : 15 * bottom, 15 * left : 15 * right] = True
            store.put(index, frame, mask)
    return Tracks(store, tuple(Track(7 + index, 0, (0.5, 0.5), 0.9, 0.0, 0.0) for index in range(len(places))))


def attended(presence=None):
    """A strong spot, and a weaker one of another size."""
    maps = torch.zeros(3, 6, 8)
    maps[:, 1:3, 1:3], maps[:, 4, 5:7] = 1.0, 0.9
    maps[1, 2, 2] = 0.5
    return replace(fused(maps), presence=presence, query="the ball.")


PLACES = [(0, 1, 0, 8), (4, 5, 5, 7), (1, 3, 1, 3), (3, 4, 3, 4)]


def picks(settings=None, places=PLACES, given=None, **changes):
    picked, matched = pick_by_attention(boxes(places), given or attended(), replace(settings or PickSettings(), **changes))
    assert [track.id for track in matched.tracks] == [7 + index for index in range(len(places))]
    return picked, matched


def test_one_several_or_all_that_match():
    picked, matched = picks()
    assert [track.id for track in picked.tracks] == [9] and picked.message == ""
    assert torch.equal(picked.union(), boxes(PLACES).masks(2))
    assert [round(track.match, 2) for track in matched.tracks] == [0, 0.55, 0.83, 0]  # 5.4 / sqrt(6 * 16.11), 11.5 / sqrt(12 * 16.11)
    assert [track.id for track in picks(pick=ALL)[0].tracks] == [8, 9]
    assert [track.id for track in picks(pick=ALL, share=0.9)[0].tracks] == [9]
    assert [track.id for track in picks(pick=FIXED, number=2)[0].tracks] == [8, 9]
    assert [track.id for track in picks(pick=FIXED, number=4)[0].tracks] == [8, 9], "nothing is picked that does not match at all"
    assert picked.clip is None and picks(pick=FIXED, number=1)[0].tracks == picked.tracks


@pytest.mark.parametrize("rule", MATCHES)
def test_every_rule_sets_the_match_and_the_score(rule):
    given = attended()
    _, matched = picks(match=rule)
    coverage = torch.zeros(4, 3, 6, 8)
    for index, (top, bottom, left, right) in enumerate(PLACES):
        coverage[index, :, top:bottom, left:right] = 1
    wanted = {"agreement": agreement, "density": density, "consistency": attention_consistency}[rule](coverage, given.map)
    assert [track.match for track in matched.tracks] == pytest.approx(wanted.tolist(), abs=1e-6)
    assert [track.score for track in matched.tracks] == [track.match for track in matched.tracks]
    assert [track.attention for track in matched.tracks] == pytest.approx(density(coverage, given.map).tolist(), abs=1e-6)
    assert [track.consistency for track in matched.tracks] == pytest.approx(attention_consistency(coverage, given.map).tolist(), abs=1e-6)
    best = matched.best(most=1)
    assert [track.id for track in best.tracks] == [9], "so that objects picked by score are those that match"
    assert matched.best(0.5).message == "" and {track.id for track in matched.best(0.5).tracks} <= {8, 9}


def test_frame_and_point_are_where_the_attention_sees_most_of_it():
    maps = torch.zeros(3, 6, 8)
    maps[0, 1, 1], maps[2, 2, 2] = 0.5, 1.0
    track = pick_by_attention(boxes([(1, 3, 1, 3)]), replace(fused(maps), presence=None))[0].tracks[0]
    assert track.frame == 2 and track.xy == pytest.approx((2.5 / 8, 2.5 / 6))


def test_nothing_is_picked_where_the_model_sees_nothing():
    picked, matched = picks(given=attended(presence=0.05))
    assert not picked.tracks and not picked.union().any() and picked.length == 3
    assert '"the ball" is not in this clip' in picked.message and "0.05" in picked.message
    assert max(track.match for track in matched.tracks) > 0.7, "others can still be picked by their number"
    assert picks(given=attended(presence=0.05), presence_threshold=0.0)[0].tracks
    assert picks(given=attended(presence=0.25))[0].tracks and not picks(given=attended(presence=0.25), presence_threshold=0.3)[0].tracks


def test_nothing_is_picked_that_is_not_there_or_not_meant():
    for places, given, said in (
        ([], attended(), "no object to pick from"),
        ([(1, 1, 1, 1), (2, 2, 2, 2)], attended(), "not seen on any of the 3 key frames"),
        ([(0, 0, 0, 0)], attended(), "The object to pick from is not seen"),
        (PLACES, fused(torch.zeros(3, 6, 8)), "Nothing is attended"),
        ([(3, 4, 3, 4), (0, 1, 0, 8)], attended(), "none of the 2 objects matches"),
        ([(3, 4, 3, 4)], attended(), "the object does not match"),
    ):
        picked, _ = picks(places=places, given=given)
        assert not picked.tracks and said in picked.message and not picked.union().any()
    assert "0.83" in picks(least=0.9)[0].message and picks(least=0.82)[0].tracks
    negative = picks(places=[(3, 4, 3, 4), (0, 1, 0, 8)], match="consistency", least=0.0)
    assert max(track.match for track in negative[1].tracks) < 0 and not negative[0].tracks


def test_an_object_that_is_seen_on_other_frames_alone_is_not_picked():
    given = replace(attended(), clip=replace(attended().clip, length=5, key_frames=(0, 2, 4)))
    tracks = boxes([(1, 3, 1, 3, 1, 3), (4, 5, 5, 7)], length=5)
    picked, matched = pick_by_attention(tracks, given)
    assert [track.id for track in picked.tracks] == [8] and matched.tracks[0].match == 0


def test_settings_and_attention_that_cannot_be_are_refused():
    def refused(given=None, **changes):
        with pytest.raises(DecafError) as error:
            picks(given=given, **changes)
        return str(error.value)

    assert "no way to pick" in refused(pick="some") and "no way to pick" in refused(match="iou")
    assert "at least one" in refused(number=0)
    for name in ("share", "least", "presence_threshold"):
        for value in (-0.1, 1.1, float("nan")):
            assert f"'{name}'" in refused(**{name: value})
    good = attended()
    for wrong in (good.map[:2], good.map[0], good.map * float("nan")):
        assert "does not fit its clip" in refused(given=replace(good, map=wrong))
    assert "does not fit its clip" in refused(given=replace(good, clip=replace(good.clip, key_frames=(0, 1, 3))))


def test_it_can_be_cancelled_and_shows_its_progress():
    told = []
    pick_by_attention(boxes(PLACES), attended(), progress=lambda *progress: told.append(progress))
    assert [done for done, *_ in told] == list(range(13)) and {total for _, total, _ in told} == {12}

    class Stop(Exception):
        pass

    def stop(done, total, what):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        pick_by_attention(boxes(PLACES), attended(), progress=stop)
