"""Soft edges from a segmenter's logits: against shapes whose share of every pixel is known, on made-up scenes, and through every step behind."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn.functional import interpolate

from decaf.clips import clip_from_images
from decaf.data import Track, Tracks
from decaf.demo import SAM2_FILE
from decaf.demo.scenes import make_scene
from decaf.evaluation.metrics import region_similarity
from decaf.finishing import refine, tracks_from_masks
from decaf.masks import JoinedMasks, MaskStore
from decaf.sam2 import load_sam2
from decaf.settings import RefineSettings
from decaf.tracking import Marks, correct


def distance(shape, y, x, size):
    """To the contour of a made-up shape, in pixels of the frame, positive inside."""
    scale = min(size) / 100
    y, x = y / scale, x / scale - (size[1] / scale - 100) / 2
    if shape == "wave":
        return scale * (30 + 5 * np.sin(5 * np.arctan2(y - 50, x - 45)) - np.hypot(y - 50, x - 45))
    if shape == "slanted":
        return scale * (y - 20 - 0.3 * x) / np.hypot(1, 0.3)
    return scale * np.minimum(np.minimum(x - 20.3, 71.7 - x), np.minimum(y - 30.6, 60.2 - y))


def coverage(shape, size, samples=8):
    """(H, W) share of each pixel that lies in the shape."""
    found = np.zeros(size)
    for down in range(samples):
        for along in range(samples):
            y, x = np.mgrid[: size[0], : size[1]].astype(float)
            found += distance(shape, y + (down + 0.5) / samples, x + (along + 0.5) / samples, size) > 0
    return found / samples**2


def logits_of(shape, size, grid=(64, 64), steepness=0.6):
    """As SAM 2's: few, flat where it is sure."""
    y, x = ((np.mgrid[: grid[0], : grid[1]] + 0.5).T * np.array(size) / np.array(grid)).T
    return torch.from_numpy(np.clip(steepness * distance(shape, y, x, size), -12, 9)).float()


def enlarged(logits, size):
    return interpolate(logits[None, None], size=size, mode="bilinear", align_corners=False)[0, 0] > 0


def stored(*masks, logits, length=1):
    """Tracks of objects that look alike on all frames. `logits`: of each object, or None."""
    store = MaskStore(len(masks), length, masks[0].shape)
    for index, (mask, own) in enumerate(zip(masks, logits, strict=True)):
        for frame in range(length):
            store.put(index, frame, mask, own)
    return Tracks(store, tuple(Track(index, 0, (0.5, 0.5), 1.0, 1.0, 1.0) for index in range(len(masks))))


def near(mask, pixels=3):
    """(H, W) bool: within so many pixels of the contour."""
    mask = np.asarray(mask)
    return (ndimage.distance_transform_edt(mask) <= pixels) & (ndimage.distance_transform_edt(~mask) <= pixels)


def disagreement(alpha, truth, where):
    return np.abs(alpha / 255 - truth)[where].mean()


SIZES = [(1080, 1920), (720, 1280), (135, 241), (64, 64)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["wave", "slanted", "box"])
@pytest.mark.parametrize("size", SIZES)
def test_a_soft_edge_is_nearer_to_the_truth_than_stairs(shape, size):
    """What the logits say of a contour between pixels, against the share of each pixel that the shape covers."""
    grid = (256, 256) if size[0] > 500 else (64, 64)
    logits = logits_of(shape, size, grid, 0.6 * 100 / min(size))
    mask, truth = enlarged(logits, size), coverage(shape, size, 4 if size[0] > 500 else 8)
    alpha = stored(mask, logits=[logits]).alpha()[0].numpy()
    assert np.array_equal(alpha >= 128, mask), "the half level is the mask"
    edge = near(mask)
    assert len(np.unique(alpha[edge])) > 10
    assert np.array_equal(alpha[~near(mask, 2)], mask.numpy()[~near(mask, 2)] * np.uint8(255)), "narrow: nothing but the edge is soft"
    binary = mask.numpy() * 255
    whole = torch.from_numpy(truth >= 0.5)[None]
    assert region_similarity(torch.from_numpy(alpha >= 128)[None], whole) >= region_similarity(mask[None], whole)
    if shape != "box":  # its sides lie on the pixels, but for its corners: stairs of two steps
        assert disagreement(alpha, truth, edge) < 0.85 * disagreement(binary, truth, edge)
    seen = ndimage.gaussian_filter(truth, 0.6)
    assert disagreement(alpha, seen, edge) < 0.7 * disagreement(binary, seen, edge), "as a camera sees it"


def test_bits_stay_what_they_were_and_the_edge_takes_little():
    size = (1080, 1920)
    logits = logits_of("wave", size, (256, 256), 0.06)
    hard, soft = (stored(enlarged(logits, size), logits=[one]) for one in (None, logits))
    assert torch.equal(hard.union(), soft.union())
    assert torch.equal(hard.alpha(), hard.union() * torch.tensor(255, dtype=torch.uint8))
    assert torch.equal(soft.levels(), hard.alpha()), "who takes masks as they were made gets 0 and 255"
    print(f"{hard.store.nbytes} bytes, with its edge {soft.store.nbytes}")
    assert hard.store.nbytes < soft.store.nbytes < hard.store.nbytes + (3 << 10)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_logits_of_any_size(scale):
    """A segmenter may be hesitant or sure: the contour is where it is."""
    logits = logits_of("wave", (135, 241))
    mask = enlarged(logits, (135, 241))
    alphas = [stored(mask, logits=[logits * by]).alpha()[0].int() for by in (1, scale)]
    assert (alphas[0] - alphas[1]).abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 2), (37, 29), (20, 300)])
@pytest.mark.parametrize("grid", [(1, 1), (16, 16), (64, 48)])
def test_frames_of_any_size(size, grid):
    """Also smaller than the logits; and masks that fill the frame."""
    for seed in range(4):
        random = torch.Generator().manual_seed(seed)
        logits = interpolate(torch.randn(1, 1, 4, 4, generator=random), size=grid, mode="bicubic")[0, 0] + (seed == 3) * 9
        mask = enlarged(logits, size)
        alpha = stored(mask, logits=[logits]).alpha()[0]
        assert torch.equal(alpha >= 128, mask)
        assert not mask.all() or (alpha == 255).all()


def test_what_a_segmenter_says_that_sees_nothing():
    """Or that says what is no number: a hard edge."""
    nowhere = torch.full((16, 16), -1024.0)
    assert not stored(enlarged(nowhere, (30, 40)), logits=[nowhere]).alpha().any()
    odd = logits_of("wave", (30, 40), (16, 16))
    mask = enlarged(odd, (30, 40))
    odd[8, 4:12] = float("inf")
    alpha = stored(mask, logits=[odd]).alpha()[0]
    assert torch.equal(alpha >= 128, mask)


# -- several objects ---------------------------------------------------------------------------------------------------------------------


def halves(size=(90, 120)):
    """Two objects side by side with a slanted border, and their logits."""
    y, x = np.mgrid[:45, :60] * 2.0 + 1
    outer = np.minimum(np.minimum(x - 15, 105 - x), np.minimum(y - 12, 78 - y))
    between = (x - 60 + 0.4 * (y - 45)) / np.hypot(1, 0.4)
    logits = [torch.from_numpy(np.minimum(outer, side)).float() for side in (between, -between)]
    return [enlarged(one, size) for one in logits], logits


def test_neighbours_have_no_seam():
    masks, logits = halves()
    both = stored(*masks, logits=logits)
    together = both.alpha()[0].numpy()
    inner = ndimage.binary_erosion(ndimage.binary_closing(masks[0] | masks[1]), iterations=3)
    assert inner.sum() > 3000 and (together[inner & (masks[0] | masks[1]).numpy()] == 255).all()
    apart = stored(masks[0], logits=[logits[0]]), stored(masks[1], logits=[logits[1]])
    joined = JoinedMasks([(one.store, 0) for one in apart], 1, (90, 120))
    assert torch.equal(joined.alpha([0, 1], [0])[0], both.alpha()[0]) and torch.equal(joined.alpha([1], [0]), apart[1].alpha())
    assert not joined.finished and JoinedMasks([(refine(both, RefineSettings()).store, 0)], 1, (90, 120)).finished


def test_a_hard_mask_beside_a_soft_one_stays_hard():
    masks, logits = halves()
    mixed = stored(*masks, logits=[logits[0], None])
    alpha = mixed.alpha()[0]
    assert torch.equal(alpha >= 128, masks[0] | masks[1]) and torch.equal(mixed.alpha(objects=[1])[0] == 255, masks[1])
    assert (alpha[masks[1]] == 255).all()


# -- refined -----------------------------------------------------------------------------------------------------------------------------


def flawed(length=1):
    """A shape with a hole and a speck, as a segmenter would give it."""
    size = (180, 240)
    y, x = np.mgrid[:90, :120] * 2.0 + 1
    body = distance("wave", y, x, size)
    hole, speck = np.hypot(y - 95, x - 120) - 6.3, 5.2 - np.hypot(y - 25, x - 30)
    logits = torch.from_numpy(np.maximum(np.minimum(body, hole), speck)).float()
    return stored(enlarged(logits, size), logits=[logits], length=length)


@pytest.mark.parametrize(
    "settings",
    [
        RefineSettings(),
        RefineSettings(holes=300),
        RefineSettings(specks=300),
        RefineSettings(border=4, holes=300, specks=300, smooth=1, shortest=2),
        RefineSettings(grow=3),
        RefineSettings(grow=-3, holes=300),
    ],
    ids=str,
)
def test_refined_without_a_feather_keeps_a_soft_edge(settings):
    """As narrow everywhere, no shadow of what was dropped or filled, and half way where the refined mask ends."""
    tracks = flawed(3)
    refined = refine(tracks, settings)
    alpha, mask = refined.alpha(1, 2)[0].numpy(), refined.union(1, 2)[0].numpy()
    assert np.array_equal(alpha >= 128, mask) and len(np.unique(alpha[near(mask)])) > 20
    assert np.array_equal(alpha[~near(mask, 2.5)], mask[~near(mask, 2.5)] * np.uint8(255))
    if settings == RefineSettings():
        assert np.array_equal(alpha, tracks.alpha(1, 2)[0]) and np.array_equal(refined.levels(1, 2)[0], alpha), "a MASK of refined tracks is soft"
    elif not settings.grow:
        same = ~ndimage.binary_dilation(mask != tracks.union(1, 2)[0].numpy(), iterations=6)
        assert np.array_equal(alpha[same], tracks.alpha(1, 2)[0].numpy()[same]), "what is not changed is SAM 2's"


@pytest.mark.parametrize("width", [1, 2, 4.5, 12])
def test_a_feather_on_a_soft_edge_leaves_no_stairs(width):
    """Along a line that falls by a tenth of a pixel per column, the alpha on the contour changes from column to column by no more than it
    should; from the bits alone it jumps."""
    y, x = np.mgrid[:45, :60] * 2.0 + 1
    line = torch.from_numpy(y - 30 - 0.1 * x).float()
    mask = enlarged(line, (90, 120))
    alphas = []
    for logits in (line, None):
        refined = refine(stored(mask, logits=[logits]), RefineSettings(feather=width))
        alpha = refined.alpha()[0].numpy()
        assert np.array_equal(alpha >= 128, mask) and np.array_equal(refined.union()[0], mask)
        assert np.array_equal(alpha[~near(mask, width + 3)], mask[~near(mask, width + 3)] * np.uint8(255))
        alphas.append(alpha)
    y, x = np.mgrid[:90, :120] + 0.5
    ideal = np.clip((y - 30 - 0.1 * x) / np.hypot(1, 0.1) / (2 * width) + 0.5, 0, 1)
    ideal = 255 * ideal**2 * (3 - 2 * ideal)
    error, stairs = (np.abs(alpha - ideal)[:, 8:-8].max() for alpha in alphas)
    print(width, error, stairs)
    assert error < 45 / width + 6 and (error < 0.8 * stairs or width > 4), (error, stairs)


def test_a_mask_with_a_wide_edge_loses_its_specks_with_their_halo():
    soft = torch.from_numpy(ndimage.gaussian_filter((distance("wave", *np.mgrid[:100, :120], (100, 120)) > 0).astype(float), 4)).float()
    soft += torch.from_numpy(8 * 8 * ndimage.gaussian_filter(np.pad(np.ones((4, 4)), ((8, 88), (108, 8))), 3)).float() / 16
    given = tracks_from_masks(soft.clamp(0, 1)[None])
    kept = refine(given, RefineSettings(specks=200))
    alpha = kept.alpha()[0]
    assert given.alpha()[0, :20, 98:].max() > 127 and not alpha[:20, 100:].any()
    assert torch.equal(alpha[40:60], given.alpha()[0, 40:60]) and alpha[40:60].unique().numel() > 50, "its own edge stays as wide"


# -- from the bundled SAM 2 ----------------------------------------------------------------------------------------------------------------


def test_tracks_of_made_up_scenes_have_soft_edges():
    """On every frame of what SAM 2 tracks, J of the half level is that of the mask, and the edge has many values."""
    scene = make_scene(5, size=(280, 364), length=4, count=(2, 2), lively=False)
    clip, sam2 = clip_from_images(torch.from_numpy(scene.frames)), load_sam2(SAM2_FILE)
    tracks = Tracks(MaskStore(0, 4, (280, 364)), ())
    for thing in scene.masks[:, 1]:
        y, x = ((torch.from_numpy(thing).nonzero().float().mean(0) + 0.5) / torch.tensor([280, 364])).tolist()
        tracks = correct(sam2, clip, tracks, Marks(1, [(x, y)]))
    alpha, truth = tracks.alpha(), torch.from_numpy(scene.masks.any(0))
    assert torch.equal(alpha >= 128, tracks.union())
    soft, hard = region_similarity(alpha >= 128, truth), region_similarity(tracks.union(), truth)
    assert (soft >= hard).all() and soft.mean() > 0.8
    for one, mask in zip(alpha, tracks.union(), strict=True):
        assert one[torch.from_numpy(near(mask))].unique().numel() > 20
