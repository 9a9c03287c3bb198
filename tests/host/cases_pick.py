"""Objects of SAM 3, of masks and of our own tracks picked by attention; and the images for a tracker. Run by inside.py; each raises when
something is wrong."""

from dataclasses import replace
from pathlib import Path

import av
import folder_paths
import torch
from comfy_extras.nodes_post_processing import BatchMasksNode
from comfy_extras.nodes_sam3 import SAM3_TrackPreview, SAM3_TrackToMask, SAM3_VideoTrack
from kit import error_of, extract_all, fused, images, run, segment, video, with_cancel
from recorded_sam3 import boxes, model, track_data

SIZE = (72, 96)


def attended(masks, index, presence=None):
    """Fused attention of images(len(masks)) that lies on one object of `masks` (T, N, h, w)."""
    made = fused(len(masks))
    grid = made.map.shape[1:]
    maps = torch.stack([torch.nn.functional.adaptive_avg_pool2d(masks[frame, index][None].float(), grid)[0] for frame in made.clip.key_frames])
    return replace(made, map=maps * 0.9 + 0.05, presence=presence)


def same_as_core(mask, data, indices):
    """Whether our mask is that of core's own node for these objects; alpha is kept in 256 levels."""
    theirs = SAM3_TrackToMask.execute(data, ",".join(map(str, indices))).args[0]
    return mask.shape == theirs.shape and (mask - theirs).abs().max() <= 0.5 / 255 + 1e-6


def case_the_object_that_the_attention_means_is_picked_from_sam3():
    masks = boxes(6)
    data = track_data(masks, SIZE, [0.95, 0.8, 0.7])
    for index in range(3):
        mask, tracks, everything, report = run("DecAFPickTracks", fused=attended(masks, index), objects=data, presence_threshold=0.0).args
        assert [track.id for track in tracks.tracks] == [index] and report.startswith(f"Picked of 3 objects: {index}.")
        assert [track.id for track in everything.tracks] == [0, 1, 2] and report.count("match") == 3
        assert [track.predicted_iou for track in everything.tracks] == [0.95, 0.8, 0.7]
        assert same_as_core(mask, data, [index])
        assert mask.dtype == torch.float32 and mask.any() and not mask.all()
        other = (index + 1) % 3
        chosen, kept = run("DecAFTracksToMask", tracks=everything, objects=str(other)).args
        assert same_as_core(chosen, data, [other]) and kept.tracks[0].match < tracks.tracks[0].match
    mask, tracks, *_ = run("DecAFPickTracks", fused=attended(masks, 0), objects=data, pick="a fixed number", number=3, least_match=0.0).args
    assert same_as_core(mask, data, [track.id for track in tracks.tracks])
    assert same_as_core(run("DecAFTracksToMask", tracks=everything)[0], data, [0, 1, 2])


def case_core_s_preview_shows_the_same_objects():
    """It numbers and colours them as the track data are numbered: what is blue there is object 0 here."""
    masks = boxes(6)[:, :2]
    data = track_data(masks, (288, 384))
    given = replace(attended(masks, 1), clip=replace(fused(6).clip, frame_size=(288, 384)))
    mask, tracks, *_ = run("DecAFPickTracks", fused=given, objects=data, presence_threshold=0.0).args
    shown = SAM3_TrackPreview.execute(data, opacity=1.0).ui.as_dict()["images"][0]
    with av.open(str(Path(folder_paths.get_temp_directory()) / shown["filename"])) as container:
        frames = torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]).float() / 255
    colours = torch.tensor(SAM3_TrackPreview.COLORS[:2])
    nearest = torch.cdist(frames.flatten(0, 2), torch.cat([colours, torch.zeros(1, 3), torch.ones(1, 3)])).argmin(1).reshape(frames.shape[:3])
    there, ours = nearest == tracks.tracks[0].id, mask >= 0.5
    assert tracks.tracks[0].id == 1
    iou = (there & ours).sum() / (there | ours).sum()
    assert iou > 0.93, f"{iou:.3f}: its numbers and the colours of a video that is small take the rest"


def case_a_tracker_takes_our_images_and_its_tracks_come_back():
    """Core's Run SAM3 Video Track, its own code, over a model that answers with recorded masks, from a file that is read small and in both
    orders."""
    masks, asked = boxes(12), []
    clip = video()
    made = fused(12)
    whole, lead = run("DecAFFrameOfVideo", frames=clip, which="all frames", longest_side=48).args
    assert whole.shape == (12, 36, 48, 3) and lead == 0
    tracked = SAM3_VideoTrack.execute(whole, model(masks, asked), initial_mask=torch.ones(1, 36, 48)).args[0]
    assert torch.equal(asked[0]["images"], whole.movedim(-1, 1)) and tracked["orig_size"] == (36, 48)
    mask = run("DecAFPickTracks", fused=attended(masks, 2), objects=tracked, presence_threshold=0.0)[0]
    assert same_as_core(mask, tracked | {"orig_size": SIZE}, [2]), "in the size of the clip, not of the smaller images"
    there, lead = run("DecAFFrameOfVideo", frames=clip, which="back, then all", frame=4, longest_side=48).args
    assert lead == 4 and len(there) == 16 and torch.equal(there[4:], whole) and torch.equal(there[:5], whole[:5].flip(0))
    back = torch.cat([masks[1:5].flip(0), masks])
    tracked = SAM3_VideoTrack.execute(there, model(back, asked), initial_mask=torch.ones(1, 36, 48)).args[0]
    again = run("DecAFPickTracks", fused=attended(masks, 2), objects=tracked, lead=lead, presence_threshold=0.0)[0]
    assert torch.equal(again, mask)
    said = error_of("DecAFPickTracks", fused=made, objects=tracked)
    assert "has tracked 16 frames" in said and "clip of 12" in said


def case_masks_of_any_node_are_picked_from():
    """Put together by core's Batch Masks, or one MASK of one object, or of an image."""
    masks = torch.nn.functional.interpolate(boxes(6).float(), size=SIZE)
    batch = BatchMasksNode.execute({f"mask{index}": masks[:, index] for index in range(3)}).args[0]
    assert batch.shape == (18, *SIZE)
    mask, tracks, everything, _ = run("DecAFPickTracks", fused=attended(masks, 1), objects=batch, presence_threshold=0.0).args
    assert [track.id for track in tracks.tracks] == [1] and torch.equal(mask, masks[:, 1]) and len(everything.tracks) == 3
    alone = run("DecAFPickTracks", fused=attended(masks, 1), objects=masks[:, 1], presence_threshold=0.0)[0]
    assert torch.equal(alone, masks[:, 1])
    picture = attended(masks[3:4], 0)
    assert torch.equal(run("DecAFPickTracks", fused=picture, objects=masks[3], presence_threshold=0.0)[0], masks[3:4, 0])


def case_own_tracks_are_picked_from_and_corrected():
    found = segment(6, score_threshold=0.0)[1]
    mask, tracks, everything, report = run("DecAFPickTracks", fused=fused(6), objects=found, presence_threshold=0.0, least_match=0.0).args
    assert {track.id for track in everything.tracks} == {track.id for track in found.tracks} and tracks.clip is found.clip
    assert torch.equal(mask, run("DecAFTracksToMask", tracks=tracks)[0])
    refined = run("DecAFRefineMask", masks=tracks, feather=2.0, specks=0)[0]
    assert run("DecAFPickTracks", fused=fused(6), objects=refined, presence_threshold=0.0, least_match=0.0)[1].tracks
    told = run("DecAFApplyMask", frames=images(6), masks=tracks, effect="cut out")[1]
    assert "6 frames" in told and run("DecAFShowObjects", frames=images(6), tracks=everything).ui


def case_nothing_is_picked_with_a_reason():
    masks = boxes(6)
    data = track_data(masks, SIZE)
    for given, objects, said in (
        (attended(masks, 0, presence=0.1), data, "is not in this clip"),
        (attended(masks, 0), {"packed_masks": None, "n_frames": 6, "scores": [], "orig_size": SIZE}, "found no object"),
        (attended(masks, 0), torch.zeros(12, *SIZE), "masks are empty"),
        (replace(attended(masks, 0), map=torch.zeros_like(fused(6).map)), data, "Nothing is attended"),
    ):
        mask, tracks, everything, report = run("DecAFPickTracks", fused=given, objects=objects).args
        assert mask.shape == (6, *SIZE) and not mask.any() and not tracks.tracks and said in report, report
        assert not run("DecAFTracksToMask", tracks=tracks)[0].any()
    mask, _, everything, report = run("DecAFPickTracks", fused=attended(masks, 0, presence=0.1), objects=data).args
    assert report.count("object ") == 3 and same_as_core(run("DecAFTracksToMask", tracks=everything, objects="0")[0], data, [0])


def case_objects_of_another_clip_are_refused():
    masks = boxes(6)
    data = track_data(masks, SIZE)
    for objects, said in (
        (track_data(boxes(5), SIZE), "tracked 5 frames"),
        (data | {"orig_size": (96, 72)}, "72x96"),
        (data | {"packed_masks": data["packed_masks"].float()}, "not packed"),
        (torch.zeros(7, *SIZE), "7 masks"),
        (torch.zeros(6, 36, 48), "48x36"),
        (segment(2)[1], "2 frames"),
        ({"boxes": []}, "takes tracks of objects or masks"),
    ):
        message = error_of("DecAFPickTracks", fused=fused(6), objects=objects)
        assert said in message, message
    assert "no frame 12" in error_of("DecAFFrameOfVideo", frames=video(), frame=12)


def case_picking_and_reading_can_be_cancelled():
    with_cancel("DecAFPickTracks", fused=fused(6), objects=segment(6)[1])
    with_cancel("DecAFFrameOfVideo", frames=images(6), which="all frames")


def case_one_frame_is_the_clip_s_own():
    clip = images(6)
    one, lead = run("DecAFFrameOfVideo", frames=clip, frame=3).args
    assert lead == 0 and one.shape == (1, 72, 96, 3) and (one[0] - clip[3]).abs().max() <= 0.5 / 255 + 1e-6
    from_file = run("DecAFFrameOfVideo", frames=video(), frame=3)[0][0]
    theirs = video().get_components().images
    away = (from_file - theirs).abs().mean((1, 2, 3))  # their reader turns YUV into RGB a little differently
    assert away.argmin() == 3 and away[3] < 2 / 255, away


def case_the_class_name_is_given_alone():
    *_, answers, names = extract_all(images(2), query="the bright square\nthe slope", setting="class name", max_key_frames=1)
    assert len(names) == 2
    for text, name in zip(answers, names, strict=True):
        assert f"leaving out any {name}, in a word" in text
    *_, names = extract_all(images(2), query="the bright square\nthe slope?", max_key_frames=1)
    assert names == ["the bright square", "the slope"]
    own = "Not the {object}; {object} is out"
    *_, answers, names = extract_all(images(2), setting="class name", background_question=own, max_key_frames=1)
    assert own.replace("{object}", names[0]) in answers[0]
