"""Masks in little memory: the same as held one by one, and bounded."""

import os
import tracemalloc

import pytest
import torch

from decaf.data import Track, Tracks
from decaf.errors import DecafError
from decaf.masks import MaskStore


def random_masks(objects, length, height, width, seed=0):
    """(N, T, H, W) bool; every third mask is empty."""
    random = torch.Generator().manual_seed(seed)
    masks = torch.rand(objects, length, height, width, generator=random) < 0.3
    masks[:, 1::3] = False
    return masks


def stored(masks, order=None, **more):
    objects, length = masks.shape[:2]
    store = MaskStore(objects, length, masks.shape[2:], **more)
    places = [(index, frame) for index in range(objects) for frame in range(length)]
    for place in torch.randperm(len(places), generator=torch.Generator().manual_seed(1)).tolist():
        index, frame = places[place]
        store.put(index, frame, masks[index, frame])
    return Tracks(store, tuple(Track(index, 0, (0.5, 0.5), 1.0, 1.0, 1.0) for index in range(objects)))


@pytest.mark.parametrize("held", [1, 300, 1 << 20])
@pytest.mark.parametrize("shape", [(3, 7, 20, 29), (1, 4, 1, 1), (2, 3, 16, 8), (0, 5, 6, 7)])
def test_what_comes_out_is_what_went_in(shape, held):
    """Whatever the order, the size, and whether it is memory or a file that holds them."""
    masks = random_masks(*shape)
    tracks = stored(masks, held=held)
    assert (tracks.length, tracks.frame_size) == (shape[1], shape[2:])
    assert tracks.store.any() == bool(masks.any())
    for start, stop in ((0, None), (1, 3), (2, 2), (shape[1] - 1, shape[1] + 5)):
        for index in range(shape[0]):
            assert torch.equal(tracks.masks(index, start, stop), masks[index, start:stop])
        assert torch.equal(tracks.union(start, stop), masks[:, start:stop].any(0))
        assert torch.equal(tracks.union(start, stop, objects=[]), torch.zeros_like(masks[:, start:stop].any(0)))
    if shape[0] == 3:
        assert torch.equal(tracks.union(objects=[0, 2]), masks[[0, 2]].any(0))


def test_the_last_mask_counts():
    masks = random_masks(1, 1, 9, 9)[0, 0]
    store = MaskStore(1, 1, (9, 9))
    for mask in (masks, ~masks, torch.zeros_like(masks)):
        store.put(0, 0, mask)
        assert torch.equal(store.union([0], [0])[0], mask)
    assert not store.any()


def disc(size, x, y, radius):
    ys, xs = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return (xs - x) ** 2 + (ys - y) ** 2 < radius**2


def test_memory_is_that_of_outlines_and_bounded():
    """Packed to bits alone, the forty masks would take 10 MB."""
    size, held = (1080, 1920), 64 << 10
    discs = [disc(size, 300 + 20 * frame, 500, 200) for frame in range(10)]
    tracemalloc.start()
    try:
        store = MaskStore(4, 10, size, held=held)
        before = tracemalloc.get_traced_memory()[0]
        for index in range(4):
            for frame in range(10):
                store.put(index, frame, discs[frame])
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held < store.nbytes < 40 * 8 << 10
    assert grown < held, "the rest is in a file"
    assert torch.equal(store.union([3], range(10)), torch.stack(discs))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device here that is always full")
def test_a_full_disk_is_told(monkeypatch):
    full = open("/dev/full", "w+b")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda *_, **__: full)
    store = MaskStore(1, 2, (9, 9), held=1)
    with pytest.raises(DecafError, match="could not be kept .*No space left.*TMPDIR"):
        store.put(0, 0, disc((9, 9), 4, 4, 3))


@pytest.mark.parametrize("held", [1, 1 << 20])
def test_objects_of_several_stores_join(held):
    first, second = random_masks(3, 5, 9, 21), random_masks(2, 5, 9, 21, seed=5)
    a, b = stored(first, held=held), stored(second, held=held)
    order = [(b.store, 1), (a.store, 0), (a.store, 2), (a.store, 0)]
    joined = MaskStore.joined(order, 5, (9, 21))
    expected = torch.stack([second[1], first[0], first[2], first[0]])
    assert joined.objects == 4
    for place, masks in enumerate(expected):
        assert torch.equal(joined.union([place], range(5)), masks)
    assert joined.nbytes == sum(MaskStore.joined([one], 5, (9, 21)).nbytes for one in order)
    picked = a.picked([2, 0])
    assert [track.id for track in picked.tracks] == [2, 0] and torch.equal(picked.masks(0), first[2]) and torch.equal(picked.masks(1), first[0])
