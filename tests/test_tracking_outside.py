"""Tracks of another tracker: read as they are packed, and refused where they are of another clip."""

import tracemalloc
from dataclasses import replace

import pytest
import torch
from made_attention import fused
from moving_shapes import moving_shapes

from decaf.clips.identity import clip_info
from decaf.data import Track, Tracks
from decaf.errors import DecafError
from decaf.masks import MaskStore
from decaf.tracking.outside import SAM3Masks, tracks_from

CLIP = fused(torch.zeros(3, 6, 8), (90, 120)).clip


def packed(masks):
    """(..., w) bool as bytes, the leftmost pixel in the lowest bit: written out bit by bit."""
    eights = masks.reshape(*masks.shape[:-1], masks.shape[-1] // 8, 8).to(torch.int64)
    return sum(eights[..., bit] * 2**bit for bit in range(8)).to(torch.uint8)


def sam3(length=3, objects=2, size=(90, 120), seed=0):
    """Track data and its masks (T, N, 64, 64) bool: boxes."""
    random = torch.Generator().manual_seed(seed)
    masks = torch.zeros(length, objects, 64, 64, dtype=torch.bool)
    for mask in masks.flatten(0, 1):
        top, left, high, wide = torch.randint(4, 28, (4,), generator=random).tolist()
        mask[top : top + high, left : left + wide] = True
    scores = [0.9 - 0.1 * index for index in range(objects)]
    return {"packed_masks": packed(masks), "n_frames": length, "scores": scores, "orig_size": size}, masks


def test_the_masks_are_those_that_were_packed():
    data, masks = sam3(size=(64, 64))
    tracks = tracks_from(data, replace(CLIP, frame_size=(64, 64)))
    for index in range(2):
        assert torch.equal(tracks.masks(index), masks[:, index])
        assert torch.equal(tracks.alpha(objects=[index]), masks[:, index].to(torch.uint8) * 255)
    assert torch.equal(tracks.union(1), masks[1:].any(1)) and not tracks.union(objects=[]).any()
    assert [track.id for track in tracks.tracks] == [0, 1] and [track.predicted_iou for track in tracks.tracks] == [0.9, 0.8]
    assert tracks.store.any() and not SAM3Masks(torch.zeros(2, 1, 4, 1, dtype=torch.uint8), (4, 8)).any()


@pytest.mark.parametrize("size", [(90, 120), (33, 47), (128, 64), (1, 1)])
def test_they_are_enlarged_as_core_does_it(size):
    data, masks = sam3()
    alpha = SAM3Masks(data["packed_masks"], size).alpha([0, 1], [2, 0])
    for mask, frame in zip(alpha, (2, 0), strict=True):
        whole = masks[frame].any(0).double()[None, None]
        wanted = torch.nn.functional.interpolate(whole, size=size, mode="bilinear", align_corners=False)[0, 0]
        assert (mask.double() / 255 - wanted).abs().max() < 0.5 / 255 + 1e-6
    union = SAM3Masks(data["packed_masks"], size).union([0, 1], [2, 0])
    assert torch.equal(union, alpha >= 128)


def test_frames_before_the_clip_are_left_out():
    data, masks = sam3(5, size=(64, 64))
    tracks = tracks_from(data, replace(CLIP, frame_size=(64, 64)), lead=2)
    assert tracks.length == 3 and torch.equal(tracks.masks(1), masks[2:, 1])
    data["packed_masks"][2:] = 0
    assert not tracks.store.any(), "what comes before the clip does not count"


def test_frames_that_were_tracked_smaller_are_the_same_clip():
    data, _ = sam3(size=(68, 90))
    assert tracks_from(data, CLIP).frame_size == (90, 120)


def test_masks_stay_packed():
    """300 frames of full HD with 16 objects: 77 MB packed as it came, 10 GB as bytes."""
    data = {"packed_masks": torch.zeros(300, 16, 126, 126, dtype=torch.uint8), "n_frames": 300, "scores": [], "orig_size": (1080, 1920)}
    data["packed_masks"][:, :, 20:90, 30:60] = 255
    clip = replace(CLIP, length=300, frame_size=(1080, 1920))
    tracemalloc.start()
    tracks = tracks_from(data, clip)
    for frame in (0, 150, 299):
        assert tracks.union(frame, frame + 1).any()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20  # of numpy: unpacked bits of a frame
    assert tracks.store._packed is data["packed_masks"]
    assert [track.predicted_iou for track in tracks.tracks] == [1.0] * 16, "where no score is told"


def test_masks_of_several_objects_come_object_by_object():
    masks = torch.rand(2, 3, 90, 120, generator=torch.Generator().manual_seed(1))
    tracks = tracks_from(masks.flatten(0, 1), CLIP)
    assert len(tracks.tracks) == 2 and tracks.length == 3
    for index in range(2):
        assert torch.equal(tracks.alpha(objects=[index]), (masks[index] * 255).round().to(torch.uint8))
    assert torch.equal(tracks.alpha(1), (masks[:, 1:].amax(0) * 255).round().to(torch.uint8))
    assert torch.equal(tracks.masks(0), tracks.alpha(objects=[0]) >= 128) and tracks.store.any()
    of_a_picture = tracks_from(masks[:, 0], replace(CLIP, length=1, key_frames=(0,)))
    assert len(of_a_picture.tracks) == 2 and of_a_picture.length == 1
    assert len(tracks_from(masks[0, 0], replace(CLIP, length=1)).tracks) == 1


def test_nothing_found_is_no_error():
    for data in (
        {"packed_masks": None, "n_frames": 3, "scores": [], "orig_size": (90, 120)},
        sam3(objects=0)[0],
    ):
        tracks = tracks_from(data, CLIP)
        assert not tracks.tracks and "found no object" in tracks.message
        assert tracks.union().shape == (3, 90, 120) and not tracks.union().any() and not tracks.store.any()


def refused(objects, clip=CLIP, lead=0):
    with pytest.raises(DecafError) as error:
        tracks_from(objects, clip, lead)
    return str(error.value)


def test_another_clip_is_refused():
    data, _ = sam3()
    assert "tracked 3 frames but" in refused(data, replace(CLIP, length=4))
    assert "of which 1 are before" in refused(data, CLIP, lead=1)
    assert "120x90" in refused(data, replace(CLIP, frame_size=(120, 90))) and "another shape" in refused(data | {"orig_size": (50, 120)})
    assert "tracked 7 frames" in refused({"packed_masks": None, "n_frames": 7, "scores": [], "orig_size": (90, 120)})
    assert "multiple" not in (said := refused(torch.zeros(7, 90, 120))) and "7 masks for a clip of 3 frames" in said
    assert "120x80" in refused(torch.zeros(3, 80, 120))


def test_what_holds_no_masks_is_refused():
    data, masks = sam3()
    without = ({}, {"packed_masks": None}, {"packed_masks": None, "n_frames": 3})
    for broken in (*without, *(data | wrong for wrong in ({"orig_size": None}, {"orig_size": (1, 2, 3)}, {"scores": ["high"]}))):
        assert "track_data of Run SAM3 Video Track" in refused(broken)
    for wrong in (masks, data["packed_masks"].float(), data["packed_masks"][0], "masks", data["packed_masks"][:, :, :0]):
        said = refused(data | {"packed_masks": wrong})
        assert "Run SAM3 Video Track" in said or "tracked 2 frames" in said or "tracked 5 frames" in said
    assert "orig_size" not in refused(data | {"orig_size": (0, 0)})
    assert "no objects to pick from" in refused("a text") and "no objects to pick from" in refused(None)
    assert "shape" in refused(torch.zeros(3, 90)[None, None]) and "shape" in refused(torch.zeros(0, 90, 120))


def test_tracks_of_another_clip_are_refused():
    clip, other = moving_shapes(6, 90, 120), moving_shapes(6, 90, 120, seed=8)
    record = clip_info(clip, (0, 3, 5))
    tracks = Tracks(MaskStore(1, 6, (90, 120)), (Track(0, 0, (0.5, 0.5), 1.0, 0.5, 0.5),), clip=clip_info(clip, (0, 5)))
    assert tracks_from(tracks, record) is tracks, "other key frames of the same clip"
    assert tracks_from(replace(tracks, clip=None), record).clip is None
    assert "another clip" in refused(replace(tracks, clip=clip_info(other, (0, 5))), record)
    assert "6 frames" in refused(tracks, replace(record, length=9))
    assert "120x90" in refused(tracks, replace(record, frame_size=(180, 240)))
