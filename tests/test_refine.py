"""Masks refined: each step against scipy or against what is drawn, and lazily over a clip."""

import sys

import numpy as np
import pytest
import torch
from scipy import ndimage

from decaf.data import Track, Tracks
from decaf.errors import DecafError
from decaf.finishing import refine, tracks_from_masks
from decaf.finishing.edges import distance, extended_to_border, feathered, grown, without_holes_and_specks
from decaf.masks import MaskStore
from decaf.settings import RefineSettings


def disc(size=(90, 120), y=45, x=60, radius=20):
    ys, xs = np.mgrid[: size[0], : size[1]]
    return (ys - y) ** 2 + (xs - x) ** 2 <= radius**2


def blobs(seed, size=(61, 83)):
    """A few irregular shapes, some of them at the frame's border."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=size), 4)
    return noise > np.quantile(noise, 0.7)


def iou(first, second):
    return (first & second).sum() / (first | second).sum()


# -- one mask --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("reach", [1, 5, 40, 200])
def test_distance_is_euclidean(seed, reach):
    mask = blobs(seed)
    exact = ndimage.distance_transform_edt(~mask)
    found = distance(mask, reach)
    near = exact <= reach
    assert np.abs(found - exact)[near].max() < 1e-4
    assert (found[~near] > reach).all()


@pytest.mark.parametrize("by", [1, 3, 12, -1, -3, -12])
@pytest.mark.parametrize("seed", range(3))
def test_grown_by_a_disc(by, seed):
    mask = blobs(seed)
    ys, xs = np.mgrid[-abs(by) : abs(by) + 1, -abs(by) : abs(by) + 1]
    brush = ys**2 + xs**2 <= by * by
    expected = ndimage.binary_dilation(mask, brush) if by > 0 else ndimage.binary_erosion(mask, brush, border_value=1)
    assert np.array_equal(grown(mask, by), expected)


def test_what_is_empty_or_full_stays_so():
    for mask in (np.zeros((5, 7), bool), np.ones((5, 7), bool)):
        for changed in (grown(mask, 3), grown(mask, -3), without_holes_and_specks(mask, 9, 9), extended_to_border(mask, 1)):
            assert np.array_equal(changed, mask)
        assert np.array_equal(feathered(mask, 3), mask * np.uint8(255))


@pytest.mark.parametrize("width", [1, 2, 3.5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_a_soft_edge_keeps_its_contour(width, seed):
    """More than two values within three pixels of the contour, the half level where it was, and nothing changed farther than the width."""
    mask = blobs(seed, (122, 166))
    alpha = feathered(mask, width)
    inside, outside = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
    near = (inside <= 3) & (outside <= 3)
    assert len(np.unique(alpha[near])) > 2 + (width > 1) * 6
    assert np.array_equal(alpha >= 128, mask), "so that J of the half level is that of the mask"
    far = np.maximum(inside, outside) > width + 3
    assert np.array_equal(alpha[far], mask[far] * np.uint8(255))


def test_a_soft_edge_has_no_stairs():
    """Along a slanted line: a column's step to the next is far smaller than a stair, whose half is 127."""
    ys, xs = np.mgrid[:120, :160]
    alpha = feathered(ys > 40 + xs / 5, 3).astype(int)
    line = alpha[np.rint(40 + np.arange(160) / 5).astype(int) + 2, np.arange(160)][10:-10]
    assert np.abs(np.diff(line)).max() < 40 and 140 < line.mean() < 230


def test_holes_and_specks_by_their_size():
    mask = disc()
    mask[40:43, 58:62] = False  # 12 pixels
    mask[50:55, 55:65] = False  # 50 pixels
    mask[5:8, 5:9] = True  # 12 pixels
    mask[80, 100] = mask[81, 101] = True  # 2 pixels, touching at a corner
    filled = without_holes_and_specks(mask, 12, 0)
    assert filled[40:43, 58:62].all() and not filled[50:55, 55:65].any() and filled[5:8, 5:9].all()
    kept = without_holes_and_specks(mask, 0, 12)
    assert kept[5:8, 5:9].all() and not kept[80:82, 100:102].any() and not kept[40:43, 58:62].any()
    assert without_holes_and_specks(mask, 0, 2)[81, 101]
    assert np.array_equal(without_holes_and_specks(mask, 50, 13), disc())


def test_an_opening_at_the_border_is_no_hole():
    mask = np.ones((20, 20), bool)
    mask[0:3, 8:12] = mask[10:12, 10:12] = False
    filled = without_holes_and_specks(mask, 100, 0)
    assert not filled[0:3, 8:12].any() and filled[10:12, 10:12].all()


def test_border():
    mask = np.zeros((20, 30), bool)
    mask[3:10, 3:27] = True
    wider = extended_to_border(mask, 3)
    assert wider[:10].all() and not wider[10:].any()
    assert extended_to_border(mask, 10) is mask, "nothing would be left to repeat"


# -- over a clip -----------------------------------------------------------------------------------------------------------------------


def stored(masks, **more):
    """Tracks of (N, T, H, W) masks."""
    masks = torch.as_tensor(np.asarray(masks))
    store = MaskStore(len(masks), masks.shape[1], masks.shape[2:])
    for index, one in enumerate(masks):
        for frame, mask in enumerate(one):
            store.put(index, frame, mask)
    return Tracks(store, tuple(Track(10 + index, 0, (0.5, 0.5), 1.0, 1.0, 1.0) for index in range(len(masks))))


def moving(length=12, speed=4, **more):
    return np.stack([disc(x=20 + speed * frame, radius=12, **more) for frame in range(length)])


def test_nothing_set_changes_nothing():
    masks = np.stack([moving(), moving(speed=2)])
    tracks = stored(masks)
    same = refine(tracks, RefineSettings())
    assert same.tracks == tracks.tracks and same.length == 12 and same.frame_size == (90, 120)
    assert torch.equal(same.union(), tracks.union()) and torch.equal(same.alpha(), tracks.union() * torch.tensor(255, dtype=torch.uint8))
    assert torch.equal(same.masks(1), torch.from_numpy(masks[1]))


@pytest.mark.parametrize("speed", [0, 4, 15])
def test_flicker_goes_and_movement_stays(speed):
    """At 15 pixels a frame, the object of 25 pixels hardly meets itself two frames on."""
    length = 7
    true = moving(length, speed=speed)
    noisy = true.copy()
    noisy[3, 40:50, 20 + speed * 3 : 20 + speed * 3 + 12] = False  # a bite, in one frame
    noisy[4, 70:76, 10:16] = True  # a flash
    smooth = refine(stored(noisy[None]), RefineSettings(smooth=1)).union().numpy()
    for frame in range(length):
        assert iou(smooth[frame], true[frame]) > 0.97, frame
    assert not smooth[4, 70:76, 10:16].any() and smooth[3, 42:48, 22 + speed * 3 : 30 + speed * 3].all()


def test_an_object_lost_in_one_frame_is_there_again():
    masks = moving(speed=0)
    masks[5] = False
    assert refine(stored(masks[None]), RefineSettings(smooth=1)).union()[5].any()
    masks = moving(speed=0)
    masks[6:] = False
    ended = refine(stored(masks[None]), RefineSettings(smooth=2)).union().any(-1).any(-1)
    assert ended.tolist() == [True] * 6 + [False] * 6, "what ends, ends when it did"


def test_short_appearances_are_dropped():
    masks = np.stack([moving(), moving()])
    masks[0, [3, 4, 8, 9, 10]] = False  # seen in 0 to 2, 5 to 7, 11
    kept = refine(stored(masks), RefineSettings(shortest=3))
    assert kept.masks(0).any(-1).any(-1).nonzero().flatten().tolist() == [0, 1, 2, 5, 6, 7]
    assert torch.equal(kept.masks(1), torch.from_numpy(masks[1])), "each object for itself"
    assert refine(stored(masks), RefineSettings(shortest=4)).masks(0).any() is not True
    assert not refine(stored(masks), RefineSettings(shortest=4)).masks(0).any()


def test_neighbours_have_no_seam():
    left, right = np.zeros((2, 1, 40, 60), bool)
    left[:, 10:30, 10:30] = right[:, 10:30, 30:50] = True
    alpha = refine(stored(np.stack([left, right])), RefineSettings(feather=4)).alpha()[0]
    assert alpha[20, 25:35].min() == 255
    assert refine(stored(np.stack([left, right])), RefineSettings(feather=4)).alpha(objects=[0])[0, 20, 29] < 200


def test_any_order_gives_the_same():
    tracks = stored(np.stack([moving(), moving(speed=1)]))
    settings = RefineSettings(border=2, holes=20, specks=20, smooth=2, shortest=3, grow=2, feather=2)
    straight = refine(tracks, settings).alpha()
    mixed = refine(tracks, settings)
    for frame in np.random.default_rng(0).permutation(12).tolist():
        assert torch.equal(mixed.alpha(frame, frame + 1)[0], straight[frame])


class Counting:
    """A mask store that counts what is read."""

    def __init__(self, store):
        self._store, self.length, self.frame_size, self.read = store, store.length, store.frame_size, 0

    def union(self, objects, frames):
        self.read += len(objects) * len(frames)
        return self._store.union(objects, frames)

    def alpha(self, objects, frames):
        return self._store.alpha(objects, frames)

    def any(self):
        return self._store.any()


def test_nothing_of_the_clip_s_size_is_made():
    """However long the clip, as many masks are kept; and each is read once, in the order of the clip."""
    kept = {}
    for length in (40, 80):
        tracks = stored(moving(length, speed=1)[None])
        source = Counting(tracks.store)
        refined = refine(Tracks(source, tracks.tracks), RefineSettings(smooth=2, shortest=4, feather=2, holes=9))
        assert source.read == 0
        for frame in range(length):
            refined.alpha(frame, frame + 1)
        assert source.read == length
        kept[length] = len(refined.store._kept)
    assert kept[40] == kept[80] < 40


def test_a_mask_of_floats():
    soft = torch.zeros(3, 20, 30)
    soft[:, 5:15, 5:25] = 1
    soft[1, 5:15, 25] = 0.6
    soft[2, 0, 0] = float("nan")
    tracks = tracks_from_masks(soft)
    assert tracks.alpha(1, 2)[0, 8, 25] == 153 and tracks.union(1, 2)[0, 8, 25] and not tracks.union(2, 3)[0, 0, 0]
    assert refine(tracks, RefineSettings(grow=1)).union(1, 2)[0, 8, 26]
    with pytest.raises(DecafError, match=r"shape \(3, 20, 30, 1\)"):
        tracks_from_masks(soft[..., None])


def test_no_objects():
    tracks = refine(stored(np.zeros((0, 3, 5, 6), bool)), RefineSettings(smooth=2, feather=2))
    assert not tracks.alpha().any() and not tracks.union().any() and tracks.alpha().shape == (3, 5, 6)


@pytest.mark.parametrize(("name", "value"), [("grow", 129), ("feather", float("nan")), ("smooth", -1), ("holes", -5), ("border", 65)])
def test_settings_out_of_range(name, value):
    with pytest.raises(DecafError, match=f"'{name}' is .* not between"):
        refine(stored(moving()[None]), RefineSettings(**{name: value}))


def test_without_scipy(monkeypatch):
    """Known at once, not half way through a clip; and nothing else needs it."""
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(DecafError, match="scipy is needed.*pip install scipy.*to 0"):
        refine(stored(moving()[None]), RefineSettings(specks=4))
    assert refine(stored(moving()[None]), RefineSettings(border=2, smooth=1, shortest=2, grow=-2, feather=2)).alpha().any()
