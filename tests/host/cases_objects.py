"""Objects that were found: shown, picked, corrected, and nothing computed twice. Run by inside.py; each raises when something is wrong."""

import gc
import json
import shutil
import sys
import weakref
from functools import partial
from pathlib import Path
from unittest.mock import patch

import comfy.model_management as mm
import torch
from kit import SETTINGS, attention, error_of, extract, images, mllm, prompts, run, sam2, segment, video, with_cancel


def pack(name):
    return sys.modules[f"pack_under_test.{name}"]


class Counted:
    """How many images SAM 2 encodes while it is open."""

    def __enter__(self):
        steps = pack("decaf.sam2.package_steps").PackageSteps
        self.images, encode = 0, steps.encode

        def counted(own, picture):
            self.images += 1
            return encode(own, picture)

        self._patch = patch.object(steps, "encode", counted)
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()


def fresh_sam2():
    """One that has seen no clip but a short one: at its first use its steps are tried, on pictures of their own."""
    model = run("DecAFLoadSAM2", model="tiny_sam2.safetensors")[0]
    run("SAM2VideoPropagate", sam2=model, frames=images(2), prompts=prompts(2))
    return model


def several(length=6, clip=None):
    """At least two objects of images(length), and their clip."""
    clip = images(length) if clip is None else clip
    found = run("SAM2VideoPropagate", sam2=sam2(), frames=clip, prompts=prompts(length, 0.6), score_threshold=0.0, nms_iou=1.0, method="as published")
    assert len(found[1].tracks) >= 2
    return clip, found[1]


def points(*places):
    return json.dumps([{"x": x, "y": y} for x, y in places])


def case_the_segmenting_node_shows_and_draws_nothing_itself():
    clip = images(6)
    with patch.object(pack("nodes.objects"), "draw_overlay", side_effect=AssertionError("drawn")) as draw:
        result = segment(6)
        assert set(result.ui.as_dict()) == {"text"} and not draw.called
    overlay = result[2]
    first, second = overlay.get_stream_source(), overlay.get_stream_source()
    assert first == second and Path(first).is_file()
    written = Path(first).stat().st_mtime_ns
    assert overlay.get_dimensions() == (96, 72) and overlay.get_frame_count() == 6 and float(overlay.get_duration()) == 0.25
    assert Path(first).stat().st_mtime_ns == written, "drawn once"
    Path(first).unlink()  # as when the folder for previews is emptied
    assert overlay.as_trimmed(0.0, 1 / 12).get_components().images.shape[1:] == (72, 96, 3)
    target = Path(SETTINGS["scratch"]) / "overlay.mp4"
    overlay.save_to(str(target))
    assert target.stat().st_size
    again = run("ExtractRolloutAttention", mllm=mllm(), frames=overlay, query="it", tokens_per_frame=16, max_key_frames=1)
    assert again[0][0].clip.length == 6 and clip.shape[0] == 6


def case_objects_are_shown_in_every_style():
    clip, tracks = several(3)
    pictures = {}
    for style in pack("decaf.settings").STYLES:
        result = run("DecAFShowObjects", frames=clip, tracks=tracks, style=style)
        shown = result.ui.as_dict()
        assert shown["animated"] == (True,) and (Path(SETTINGS["base"]) / "temp" / shown["images"][0]["filename"]).stat().st_size
        pictures[style] = result[0].get_components().images
        assert pictures[style].shape == (3, 72, 96, 3)
    styles = list(pictures.values())
    assert all((a - b).abs().mean() > 0.005 for place, a in enumerate(styles) for b in styles[:place])
    plain = run("DecAFShowObjects", frames=clip, tracks=tracks, style="outline", numbers=False)[0].get_components().images
    assert (plain - pictures["outline"]).abs().max() > 0.1, "numbers are drawn"
    faint = run("DecAFShowObjects", frames=clip, tracks=tracks, style="spotlight", opacity=0.0, numbers=False)[0].get_components().images
    assert (faint - clip).abs().mean() < (pictures["spotlight"] - clip).abs().mean()


def case_a_large_clip_is_shown_small_and_given_whole():
    clip = images(2, 600, 1601)
    whole = segment(2)[1]
    tracks = type(whole)(pack("decaf.masks").MaskStore(0, 2, (600, 1601)), ())
    result = run("DecAFShowObjects", frames=clip, tracks=tracks)
    shown = Path(SETTINGS["base"]) / "temp" / result.ui.as_dict()["images"][0]["filename"]
    assert pack("decaf.clips").open_clip(shown).frame_size == (240, 640) and result[0].get_dimensions() == (1602, 600)


def case_tracks_of_another_clip_are_told():
    clip, tracks = several(3)
    for other, said in ((images(4), "of 3 frames"), (images(3, 96, 72), "another shape"), (clip.flip(2), "is not the clip")):
        for node, more in (("DecAFShowObjects", {}), ("DecAFCorrectObjects", {"sam2": sam2(), "positive_points": points((5, 5))})):
            message = error_of(node, frames=other, tracks=tracks, **more)
            assert said in message and "tracks" in message, message


def case_how_many_objects_are_kept_is_set():
    clip, found = several()
    given = {"sam2": sam2(), "frames": clip, "prompts": prompts(6, 0.6), "nms_iou": 1.0, "score_threshold": 0.0}
    kept = {targets: run("SAM2VideoPropagate", **given, targets=targets)[1] for targets in ("auto", "one", "all")}
    assert kept["auto"].tracks == kept["one"].tracks, "the query is about one object"
    assert len(kept["one"].tracks) < len(kept["all"].tracks)
    assert torch.equal(run("SAM2VideoPropagate", **given)[0], kept["one"].union().float()), "a workflow saved without the inputs opens"
    assert run("SAM2VideoPropagate", **given, method="as published", targets="one")[1].tracks == found.tracks
    contrast = run("ObjectBackgroundFusion", object=attention(6)[0], background=attention(6)[1])[0]
    by_method = [run("FrameFusion", attention=contrast, method=method)[0].map for method in ("agreement", "as published")]
    assert torch.equal(run("FrameFusion", attention=contrast)[0].map, by_method[0]) and not torch.equal(*by_method)


def case_objects_are_picked_by_score_and_count():
    _, tracks = several()
    scores = sorted(track.score for track in tracks.tracks)
    middle = (scores[0] + scores[1]) / 2
    with patch.object(pack("decaf.sam2.segmenter").SAM2, "segmenter", side_effect=AssertionError("SAM 2 ran")):
        mask, picked = run("DecAFTracksToMask", tracks=tracks, objects="", score_threshold=middle).args
        assert [track.id for track in picked.tracks] == [track.id for track in tracks.tracks if track.score > middle]
        assert torch.equal(mask, picked.union().float()) and 0 < len(picked.tracks) < len(tracks.tracks)
        best = run("DecAFTracksToMask", tracks=tracks, objects="", max_objects=1)[1]
        assert [track.score for track in best.tracks] == [scores[-1]]
        number = best.tracks[0].id
        same = run("DecAFTracksToMask", tracks=best, objects=str(number))[0]
        assert torch.equal(same, tracks.masks(number).float()), "a picked object keeps its number"
        assert run("DecAFTracksToMask", tracks=tracks, objects="")[1].tracks == tracks.tracks
        mask, none = run("DecAFTracksToMask", tracks=tracks, objects="", score_threshold=1.0).args
    assert not none.tracks and "above 1" in none.message and mask.shape == (6, 72, 96) and not mask.any()


def case_a_correction_changes_one_object():
    clip, tracks = several()
    given = {"sam2": sam2(), "frames": clip, "tracks": tracks, "object": 1, "frame": 4}
    mask, found, report = run(
        "DecAFCorrectObjects", **given, positive_points=points((20, 30), (40, 36)), negative_points=points((80, 60)),
        box={"x": 10, "y": 20, "width": 50, "height": 40},
    ).args  # fmt: skip
    assert torch.equal(mask, found.union().float()) and "object 1: score" in report and "marked on frame 4" in report
    for place in range(len(tracks.tracks)):
        if place != 1:
            assert torch.equal(found.masks(place), tracks.masks(place))
    assert not torch.equal(found.masks(1), tracks.masks(1))
    library = pack("decaf.tracking")
    marks = library.Marks(4, [(20 / 96, 30 / 72), (40 / 96, 36 / 72)], [(80 / 96, 60 / 72)], (10 / 96, 20 / 72, 60 / 96, 60 / 72))
    alone = library.correct(sam2().value, pack("decaf.clips").clip_from_images(clip), tracks, marks, number=1)
    assert torch.equal(alone.masks(1), found.masks(1))
    own = torch.zeros(1, 72, 96)
    own[:, 20:50, 30:60] = 1
    count = len(tracks.tracks)
    for mask in (own, own.expand(6, -1, -1), own[0]):
        more, told = run("DecAFCorrectObjects", **given | {"tracks": found, "object": -1}, mask=mask).args[1:]
        assert [track.id for track in more.tracks] == [*range(count), count] and f"object {count}: marked on frame 4" in told
        inside = more.masks(count)[4] & (own[0] > 0)
        assert inside.sum() > 0.9 * own.sum(), "the mask is the object there"
    kept = run("DecAFTracksToMask", tracks=more, objects="", score_threshold=1.0)[1]
    assert {track.id for track in kept.tracks} == {1, count}, "what was marked by hand passes every threshold"
    mask, same, report = run("DecAFCorrectObjects", **given).args
    assert same is tracks and "Nothing is marked" in report and torch.equal(mask, tracks.union().float())


def case_the_frame_to_click_on_is_shown():
    clip = images(2, 600, 1601)
    tracks = type(several(2)[1])(pack("decaf.masks").MaskStore(0, 2, (600, 1601)), ())
    for frame, shown in ((1, 1), (9, 1)):  # a number that is too high has a picture as well
        given = {"sam2": sam2(), "frames": clip, "tracks": tracks, "frame": frame}
        (told,) = run("DecAFCorrectObjects", **given).ui.as_dict()["decaf_points"]
        picture = pack("nodes.host").Image.open(Path(SETTINGS["base"]) / "temp" / told["filename"])
        assert picture.size == (1024, 384) and {**told, "filename": ""} == {
            "filename": "", "subfolder": "", "type": "temp", "frame": shown, "width": 1601, "height": 600, "frames": 2,
        }  # fmt: skip
    clip, tracks = several()
    given = {"sam2": sam2(), "frames": clip, "tracks": tracks, "frame": 4}
    before, after = (run("DecAFCorrectObjects", **given, **marks).ui.as_dict() for marks in ({}, {"negative_points": points((30, 36))}))
    assert set(before) == set(after) == {"text", "decaf_points"}, "under another name the page would show it, too"
    assert before["decaf_points"][0]["filename"] != after["decaf_points"][0]["filename"]


def case_marks_that_cannot_be_are_sentences():
    clip, tracks = several()
    given = {"sam2": sam2(), "frames": clip, "tracks": tracks}

    def said(**marks):
        return error_of("DecAFCorrectObjects", **given, **marks)

    one = points((5, 5))
    assert "frames 0 to 5" in said(frame=6, positive_points=one)
    assert "frames 0 to 5" in said(frame=6, mask=torch.ones(6, 72, 96))
    assert "(96.5" in (told := said(positive_points=points((96.5, 3)))).replace("(96,", "(96.5,") and "96x72" in told
    assert "There is no object 77" in said(object=77, positive_points=one) and "48x36" in said(mask=torch.ones(1, 36, 48))
    assert "shape (2, 72, 96)" in said(mask=torch.ones(2, 72, 96)) and "is empty" in said(mask=torch.zeros(1, 72, 96))
    assert "'positive_points' holds" in said(positive_points="the dog") and "'negative_points'" in said(negative_points='[{"x": 1}]')
    assert "'negative_points'" in said(negative_points="7") and "one box" in said(box=[{"x": 1, "y": 1, "width": 5, "height": 5}] * 2)
    assert "'box' holds" in said(box={"x": 1, "y": 1}) and "empty or" in said(box={"x": 90, "y": 1, "width": 50, "height": 5})
    assert "nan" in said(positive_points='[{"x": NaN, "y": 1}]') and "Only negative" in said(object=-1, negative_points=one)


def case_cancel_stops_a_correction_and_drawing():
    clip, tracks = several()
    with_cancel("DecAFShowObjects", frames=clip, tracks=tracks)
    with_cancel("DecAFCorrectObjects", sam2=sam2(), frames=clip, tracks=tracks, positive_points=points((30, 30)))


def case_another_threshold_query_or_correction_encodes_nothing_again():
    for clip in (images(6), video()):
        model = fresh_sam2()
        given = whole_prompts(clip)
        with Counted() as first:
            low = run("SAM2VideoPropagate", sam2=model, frames=clip, prompts=given[0], score_threshold=0.0, method="as published")[1]
        length = low.length
        assert first.images == length
        with Counted() as later, patch.object(pack("decaf.tracking.track"), "_find_tracklets", side_effect=AssertionError("searched again")):
            high = run("SAM2VideoPropagate", sam2=model, frames=clip, prompts=given[0], score_threshold=1.0, method="as published")[1]
            assert len(high.tracks) == 1 and "best guess" in high.message
        with later:
            run("SAM2VideoPropagate", sam2=model, frames=clip, prompts=given[1], score_threshold=0.0)
            run("DecAFCorrectObjects", sam2=model, frames=clip, tracks=low, frame=2, positive_points=points((30, 30)))
        assert later.images == 0
        alone = run("SAM2VideoPropagate", sam2=sam2(), frames=clip, prompts=given[1], score_threshold=0.0)
        again = run("SAM2VideoPropagate", sam2=model, frames=clip, prompts=given[1], score_threshold=0.0)
        assert torch.equal(alone[0], again[0]) and alone[4] == again[4]


def whole_prompts(clip):
    """Of two queries."""
    made = []
    for query in ("the bright square", "the dark ground"):
        object, background, _ = extract(clip, query=query)
        fused = run("FrameFusion", attention=run("ObjectBackgroundFusion", object=object, background=background)[0])[0]
        made.append(run("AttentionToSAM2Prompts", fused=fused, threshold=0.6, presence_threshold=0.0)[0])
    assert not torch.equal(made[0].fused.map, made[1].fused.map)
    return made


def case_what_is_kept_goes_with_the_clip_the_model_or_the_hosts_word():
    model, clip = fresh_sam2(), images(4)
    run_on = partial(run, "SAM2VideoPropagate", prompts=prompts(4))
    run_on(sam2=model, frames=clip)
    held = model.kept.nbytes
    assert 0 < held <= pack("nodes.kept").KEPT_BYTES and held == 4 * model.value.feature_bytes()
    equal = clip.clone()
    with Counted() as other:
        run_on(sam2=model, frames=equal)
    assert other.images == 4 and model.kept.nbytes == held, "an equal clip is not known to be the same; only the latest is kept"
    run_on(sam2=model, frames=clip)
    mm.unload_all_models()
    assert model.kept.nbytes == 0, "on a CPU it is the memory that is to be freed"
    run_on(sam2=model, frames=clip)
    assert model.kept.nbytes == held
    del clip
    gc.collect()
    assert model.kept.nbytes == 0, "nobody can ask about it any more"
    gone = weakref.ref(model.kept)
    del model
    gc.collect()
    assert gone() is None


def case_what_is_kept_stays_within_its_budget():
    model, clip = fresh_sam2(), images(6)
    one = model.value.feature_bytes()
    with patch.object(pack("nodes.kept"), "KEPT_BYTES", int(2.5 * one)):
        for threshold, wanted in ((0.9, 6), (0.6, 4)):
            given = prompts(6, threshold)
            with Counted() as counted:
                mask = run("SAM2VideoPropagate", sam2=model, frames=clip, prompts=given)[0]
            assert model.kept.nbytes == 2 * one and counted.images == wanted, counted.images
    assert torch.equal(mask, segment(6, given)[0])


def case_a_file_that_has_changed_is_another_clip():
    host, path = pack("nodes.host"), Path(SETTINGS["base"]) / "input" / "changing.mp4"
    shutil.copy(path.with_name("clip.mp4"), path)
    first, second = (host.file_stamp(video("changing.mp4")) for _ in range(2))
    assert first == second and len(first) == 5
    trimmed = host.file_stamp(video("changing.mp4").as_trimmed(0.1, 0.5))
    assert trimmed != first
    path.write_bytes(path.read_bytes() + b"\0")
    assert host.file_stamp(video("changing.mp4")) != first
    assert host.file_stamp(images(2)) is None
