"""What the nodes make of clips: attention, prompts, masks, pictures. Run by inside.py; each raises when something is wrong."""

import gc
import json
from fractions import Fraction
from pathlib import Path

import comfy.model_management as mm
import numpy as np
import torch
from comfy_api.latest import InputImpl, Types
from kit import (
    NODES,
    SETTINGS,
    attention,
    error_of,
    extract,
    extract_all,
    fused,
    images,
    mllm,
    prompts,
    refused,
    run,
    sam2,
    segment,
    video,
    with_cancel,
)

# -- attention -------------------------------------------------------------------------------------------------------------------------


def case_three_families_give_two_attentions():
    for family in ("qwen2_vl", "qwen2_5_vl", "internvl"):
        object, background, answers = extract(images(3), family, max_key_frames=2)
        assert object.kind == "object" and background.kind == "background"
        assert object.frame.shape[0] == 2 and object.clip.key_frames == (0, 2) and "the bright square" in answers
        assert object.frame.isfinite().all() and object.video.device.type == "cpu"


def case_class_name_generates_an_answer():
    object, _, answers = extract(images(1), setting="class name")
    assert len(object.answers) == 2 and answers.count("\n") >= 2


def case_video_and_its_frames_give_the_same():
    from_file = extract(video(), tokens_per_frame=16)[0].clip
    from_frames = extract(video().get_components().images, tokens_per_frame=16)[0].clip
    assert from_file.key_frames == from_frames.key_frames == (0, 3, 7, 11)
    # ComfyUI enlarges the colour planes in another way, which shows along edges.
    assert (from_file.thumbnails.float() - from_frames.thumbnails.float()).abs().mean() < 2


def case_the_next_query_does_not_decode_again():
    import sys

    host = sys.modules["pack_under_test.nodes.host"]
    path = Path(SETTINGS["scratch"]) / "again.mp4"
    path.write_bytes(Path(video().get_stream_source()).read_bytes())
    clip, opened, open_clip = InputImpl.VideoFromFile(str(path)), [], host.open_clip
    host.open_clip = lambda source, **more: opened.append(source) or open_clip(source, **more)
    try:
        first = extract(clip, tokens_per_frame=16)[0]
        again = extract(clip, query="the slope", tokens_per_frame=16)[0]
        assert len(opened) == 1 and torch.equal(first.clip.thumbnails, again.clip.thumbnails)
        path.write_bytes(path.read_bytes() + b"another file by now")
        extract(clip, tokens_per_frame=16)
        assert len(opened) == 2
    finally:
        host.open_clip = open_clip
    del clip
    gc.collect()
    assert not [one for one in host._opened if one.get_stream_source() == str(path)]


def case_no_file_stays_open_and_few_clips_are_held():
    """Of clips too long for the frames that are held; ComfyUI keeps the VIDEO for as long as the graph does not change."""
    import os
    import sys

    base, host = (sys.modules[f"pack_under_test.{name}"] for name in ("decaf.clips.video_file", "nodes.host"))
    kept, base.FrameCache = base.FrameCache, lambda size, budget: kept(size, 3 * 72 * 96 * 3)
    videos = []
    try:
        for name in ("one", "two", "three"):
            path = Path(SETTINGS["scratch"]) / f"{name}.mp4"
            path.write_bytes(Path(video().get_stream_source()).read_bytes())
            videos.append(InputImpl.VideoFromFile(str(path)))
            object, background, _ = extract(videos[-1], tokens_per_frame=16)
            made = run("FrameFusion", attention=run("ObjectBackgroundFusion", object=object, background=background)[0])[0]
            run("DecAFAttentionPreview", frames=videos[-1], fused=made)
            run("SAM2VideoPropagate", sam2=sam2(), frames=videos[-1], prompts=run("AttentionToSAM2Prompts", fused=made)[0])
            if Path("/proc/self/fd").is_dir():
                assert str(path) not in {os.readlink(link) for link in os.scandir("/proc/self/fd") if os.path.lexists(link)}
            os.replace(path, path.with_suffix(".moved"))  # refused by Windows if it is open
    finally:
        base.FrameCache = kept
    assert len([one for one in videos if one in host._opened]) == 2 and videos[0] not in host._opened


def case_a_trimmed_video_is_trimmed():
    assert extract(video().as_trimmed(0.25, 0.5), max_key_frames=1)[0].clip.length == 6


def case_a_trimmed_video_is_streamed_and_is_what_comfyui_makes_of_it():
    """The same number of frames and the same pictures as of ComfyUI's own reader, for many trims, none of which is asked of that reader."""
    import random
    import sys

    import av

    host = sys.modules["pack_under_test.nodes.host"]
    draw = random.Random(3)
    for name, rate, options in (
        ("closed.mp4", Fraction(25), {"g": "12", "bf": "3", "b_strategy": "0"}),
        ("open.mkv", Fraction(30000, 1001), {"g": "12", "bf": "2", "x264-params": "open-gop=1"}),
        ("whole.mp4", Fraction(10), {"g": "999"}),
    ):
        path = Path(SETTINGS["scratch"]) / name
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = 96, 72, "yuv420p"
            for index, picture in enumerate(images(60)):
                shade = np.uint8(40 + 3 * index)
                pixels = (picture.numpy() * 60).astype(np.uint8) + shade  # every frame has a brightness of its own
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode())
        long = float(60 / rate)
        trims = [(0.0, 0.3), (0.48, 0.0), (-0.4, 0.0), (-0.4, 0.2), (long / 2, 99.0), (float(12 / rate), float(12 / rate))]
        trims += [(draw.uniform(0, long * 0.9), draw.uniform(0.1, long / 2)) for _ in range(12)]
        for start, duration in trims:
            trimmed = InputImpl.VideoFromFile(str(path), start_time=start, duration=duration)
            theirs = trimmed.get_components().images
            trimmed.get_components = lambda: 1 / 0
            ours = host.clip_of(trimmed)
            assert len(ours) == len(theirs) > 0, (name, start, duration, len(ours), len(theirs))
            for index in range(len(ours)):
                apart = (ours[index].float() - theirs[index] * 255).abs()
                # ComfyUI enlarges the colour planes in another way, which shows along edges; frames differ by 3.
                assert apart.mean() < 1, (name, start, duration, index, float(apart.mean()))
            assert host.clip_of(trimmed) is ours, "opened once"


def case_a_trim_without_frames_is_refused():
    message = error_of("ExtractRolloutAttention", mllm=mllm(), frames=InputImpl.VideoFromFile(video().get_stream_source(), start_time=90), query="it")
    assert "clip.mp4" in message and "trim" in message


def case_a_video_in_memory_is_taken():
    made = InputImpl.VideoFromComponents(Types.VideoComponents(images=images(3), frame_rate=Fraction(7)))
    assert extract(made, max_key_frames=1)[0].clip.length == 3


def case_a_video_in_memory_is_not_encoded_to_be_read_again():
    memory = InputImpl.VideoFromComponents(Types.VideoComponents(images=images(4), frame_rate=Fraction(12)))
    memory.get_stream_source = lambda: 1 / 0
    assert extract(memory, max_key_frames=2)[0].clip.length == 4


def case_a_host_that_does_not_tell_of_trimming_gives_frames():
    class Older:
        def get_components(self):
            return video().get_components()

    assert extract(Older(), max_key_frames=2)[0].clip.length == len(video().get_components().images)


def case_frames_of_odd_kinds_are_taken():
    shapes = (images(1), images(2), images(2, channels=4), images(2, channels=1), images(1, 1, 1), images(1, 16, 4000))
    for clip in shapes:
        attention = extract(clip, tokens_per_frame=16)[0]
        assert attention.clip.frame_size == tuple(clip.shape[1:3]) and attention.frame.isfinite().all(), clip.shape


def case_frames_that_are_none_are_refused():
    spoilt = images(2)
    spoilt[1, 3, 3, 0] = float("nan")
    for clip in (spoilt, images(2)[:0], torch.rand(2, 8, 8, 2)):
        assert error_of("ExtractRolloutAttention", mllm=mllm(), frames=clip, query="the square")


def case_a_video_without_pictures_is_refused():
    import av

    path = Path(SETTINGS["scratch"]) / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    assert "sound.mp4" in error_of("ExtractRolloutAttention", mllm=mllm(), frames=InputImpl.VideoFromFile(str(path)), query="the square")


def case_queries_are_checked_when_they_are_queued():
    for query in ("", "  \n ", "x" * 10_000):
        message = refused("ExtractRolloutAttention", query=query)
        assert error_of("ExtractRolloutAttention", mllm=mllm(), frames=images(1), query=query) == message
    assert NODES["ExtractRolloutAttention"].validate_inputs(query=None) is True  # linked
    assert NODES["ExtractRolloutAttention"].validate_inputs(query="赤い四角 العربية") is True
    assert extract(images(1), query="赤い四角 العربية")[0].frame.isfinite().all()


def case_one_query_a_line():
    objects, backgrounds, answers, _ = extract_all(images(3), query="the bright square\n\n  the slope? \n")
    assert [one.query for one in objects] == [one.query for one in backgrounds] == ["the bright square.", "the slope?"]
    assert len(answers) == 2 and "the slope?" in answers[1]
    alone = extract(images(3), query="the slope?")[0]
    torch.testing.assert_close(objects[1].frame, alone.frame, rtol=1e-4, atol=1e-9)
    assert "2,000" in refused("ExtractRolloutAttention", query="the square\n" + "x" * 3000)


def case_presence_decides_whether_there_are_points():
    there = fused(4)
    assert 0 < there.presence < 1
    made, coords, boxes, _, presence = run("AttentionToSAM2Prompts", fused=there, threshold=0.9, presence_threshold=0.0).args
    assert len(made.key) and coords != "[]" and presence == there.presence
    made, coords, boxes, *_ = run("AttentionToSAM2Prompts", fused=there, threshold=0.9, presence_threshold=1.0).args
    assert len(made.key) == 0 and coords == "[]" and not any(boxes)
    mask, tracks, _, _, report = segment(4, made).args
    assert not mask.any() and "is not in this clip" in report and "presence threshold to 0" in report


def case_own_questions_are_asked_and_checked():
    asked = extract(images(1), object_question="Where is {query}", background_question="Not {query}")
    assert asked[0].question.startswith("Where is the bright square") and asked[1].question.startswith("Not the bright square")
    assert "{query}" in _wrong_question(object_question="Where?")
    assert "{object}" in _wrong_question(setting="class name", background_question="{query}")


def _wrong_question(**inputs):
    return error_of("ExtractRolloutAttention", mllm=mllm(), frames=images(1), query="it", **inputs)


def case_a_start_layer_beyond_the_model_is_refused():
    assert "99" in error_of("ExtractRolloutAttention", mllm=mllm(), frames=images(1), query="the square", start_layer=99)


def case_every_setting_of_extracting_reaches_the_method():
    import sys

    settings = sys.modules["pack_under_test.decaf.settings"].AttentionSettings
    package, taken = sys.modules["pack_under_test.decaf"], []
    found = tuple(attention(4))

    def take(mllm, clip, queries, settings, **rest):
        taken.append(settings)
        return [found]

    plain, package.extract_attentions = package.extract_attentions, take
    try:
        extract(
            images(4), setting="class name", max_key_frames=5, tokens_per_frame=48, start_layer=1, detail="fast", not_this="the hand",
            first_frame=1, last_frame=2, key_frames="1, 2", single_frames="zoom", key_frames_by="presence",
        )  # fmt: skip
        extract(images(4))
    finally:
        package.extract_attentions = plain
    expected = settings("class name", 5, 48, 1, "fast", "the hand.", 1, 2, (1, 2), single_frames="zoom", key_frames_by="presence")
    assert taken[0] == expected, taken[0]
    assert taken[1] == settings(max_key_frames=4, tokens_per_frame=32)


def case_key_frames_are_found_by_presence():
    found, background, _ = extract(images(9), max_key_frames=2, key_frames_by="presence")
    assert 1 <= len(found.clip.key_frames) <= 2 and found.clip.key_frames == background.clip.key_frames
    assert 0 <= found.presence <= 1 and len(found.frame) == len(found.clip.key_frames)


def case_cancel_stops_extracting():
    with_cancel("ExtractRolloutAttention", mllm=mllm(), frames=images(8), query="the square", max_key_frames=8, tokens_per_frame=64)


# -- fusion ----------------------------------------------------------------------------------------------------------------------------


def case_fusion_refuses_what_does_not_belong_together():
    object, background = attention(4)
    other = attention(6)[1]
    coarse = extract(images(4), tokens_per_frame=16)[1]
    assert error_of("ObjectBackgroundFusion", object=background, background=object)
    assert error_of("ObjectBackgroundFusion", object=object, background=other)
    assert error_of("ObjectBackgroundFusion", object=object, background=coarse)
    assert error_of("FrameFusion", attention=background)


def case_sigma_and_video_weight_count():
    object, background = attention(4)
    soft = run("ObjectBackgroundFusion", object=object, background=background, sigma=3.0)[0]
    sharp = run("ObjectBackgroundFusion", object=object, background=background, sigma=0.0)[0]
    assert not torch.equal(soft.frame, sharp.frame)
    maps = [run("FrameFusion", attention=sharp, video_weight=weight, method="as published")[0].map for weight in (0.0, 1.0)]
    assert not torch.equal(*maps)


# -- prompts, masks --------------------------------------------------------------------------------------------------------------------


def case_prompts_come_in_the_forms_that_others_take():
    made, points, boxes, frame, _ = run("AttentionToSAM2Prompts", fused=fused(6), threshold=0.6).args
    dots = json.loads(points)
    assert dots and all(0 <= dot["x"] < 96 and 0 <= dot["y"] < 72 and isinstance(dot["x"], int) for dot in dots)
    assert len(boxes) == 4 and all(set(box) == {"x", "y", "width", "height"} for one in boxes for box in one)
    assert frame in made.fused.clip.key_frames


def case_sam3_takes_our_points():
    """Core's SAM3 Detect, its own code, over a model that writes down what it is asked: the real one is fixed at 500 million parameters."""
    from comfy.model_patcher import ModelPatcher
    from comfy_extras.nodes_sam3 import SAM3_Detect

    asked = []

    class Stand(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.diffusion_model = self._segmenter()

        def get_dtype(self):
            return torch.float32

        def _segmenter(self):
            def forward_segment(frame, point_inputs=None, box_inputs=None, mask_inputs=None):
                asked.append((point_inputs, box_inputs))
                return torch.ones(1, 1, 1008, 1008)

            return type("Segmenter", (), {"forward_segment": staticmethod(forward_segment)})()

    model = ModelPatcher(Stand(), mm.get_torch_device(), mm.unet_offload_device())
    made, points, boxes, frame, _ = run("AttentionToSAM2Prompts", fused=fused(6), threshold=0.6).args
    clip = images(6)
    masks, _ = SAM3_Detect.execute(model, clip[frame : frame + 1], positive_coords=points).args
    coordinates, labels = asked[0][0]["point_coords"][0], asked[0][0]["point_labels"][0]
    ours = made.xy[made.key == made.fused.clip.key_frames.index(frame)]
    assert masks.shape == (1, 72, 96) and masks.all() and labels.eq(1).all() and len(coordinates) == len(ours)
    assert (coordinates / 1008 - ours).abs().max() < 1 / 72, "whole pixels of the frame"
    asked.clear()
    masks, _ = SAM3_Detect.execute(model, clip[list(made.fused.clip.key_frames)], bboxes=boxes).args
    assert masks.shape == (4, 72, 96) and [bool(mask.any()) for mask in masks] == [bool(one) for one in boxes]
    none = run("AttentionToSAM2Prompts", fused=fused(6, constant=0.0), threshold=0.6)
    assert not SAM3_Detect.execute(model, clip[:1], positive_coords=none[1], bboxes=none[2]).args[0].any()


def case_masks_have_the_length_and_size_of_the_clip():
    mask, tracks, overlay, fps, report = segment(6).args
    assert mask.shape == (6, 72, 96) and mask.dtype == torch.float32 and mask.device == mm.intermediate_device()
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert overlay.get_frame_count() == 6 and fps == 24 and "half of its attention on frame" in report
    assert torch.equal(run("DecAFTracksToMask", tracks=tracks, objects="")[0], mask)


def case_a_video_brings_its_frame_rate():
    clip = video()
    object, background, _ = extract(clip, max_key_frames=1)
    fused = run("FrameFusion", attention=run("ObjectBackgroundFusion", object=object, background=background)[0])[0]
    given = run("AttentionToSAM2Prompts", fused=fused, threshold=1.0)[0]
    result = run("SAM2VideoPropagate", sam2=sam2(), frames=clip, prompts=given)
    assert result[3] == 12 and float(result[2].get_frame_rate()) == 12 and result[0].shape == (12, 72, 96)


def case_a_clip_of_one_frame_previews_a_picture_and_a_longer_one_a_video():
    for length, suffix in ((1, ".png"), (2, ".mp4")):
        shown = run("DecAFShowObjects", frames=images(length), tracks=segment(length)[1]).ui.as_dict()["images"][0]
        assert shown["filename"].endswith(suffix) and (Path(SETTINGS["base"]) / "temp" / shown["filename"]).is_file()


def case_nothing_found_is_an_empty_mask_of_full_length():
    made = run("AttentionToSAM2Prompts", fused=fused(4, constant=0.0), threshold=0.8)
    assert made[1] == "[]" and not any(made[2])
    mask, tracks, _, _, report = segment(4, made[0]).args
    assert mask.shape == (4, 72, 96) and not mask.any() and report
    for objects in ("", "0"):
        assert not run("DecAFTracksToMask", tracks=tracks, objects=objects)[0].any()


def case_objects_are_picked_by_number():
    mask, tracks, _, _, report = segment(2, prompts(2, 0.6), score_threshold=0.0, nms_iou=1.0).args
    numbers = [track.id for track in tracks.tracks]
    assert numbers and all(f"object {number}:" in report for number in numbers)
    one = run("DecAFTracksToMask", tracks=tracks, objects=str(numbers[0]))[0]
    assert torch.equal(one, tracks.masks(0).float())
    assert torch.equal(run("DecAFTracksToMask", tracks=tracks, objects=", ".join(map(str, numbers)))[0], mask)
    assert "999" in error_of("DecAFTracksToMask", tracks=tracks, objects="999")
    assert "'the'" in error_of("DecAFTracksToMask", tracks=tracks, objects="the dog")


def case_prompts_of_another_clip_are_refused():
    given = prompts(6)
    for clip in (images(5), images(6, 96, 72), images(6).flip(2)):
        assert error_of("SAM2VideoPropagate", sam2=sam2(), frames=clip, prompts=given)
        assert error_of("DecAFAttentionPreview", frames=clip, fused=given.fused)


def case_cancel_stops_propagating():
    with_cancel("SAM2VideoPropagate", sam2=sam2(), frames=images(6), prompts=prompts(6))


def case_the_preview_shows_heat_mask_and_points():
    clip = images(6)
    given = prompts(6, 0.5)
    pictures, mask, *_ = run("DecAFAttentionPreview", frames=clip, fused=given.fused).args
    dotted = run("DecAFAttentionPreview", frames=clip, fused=given.fused, prompts=given)[0]
    assert pictures.shape == (4, 72, 96, 3) and mask.shape == (4, 72, 96) and 0 <= pictures.min() and pictures.max() <= 1
    assert not torch.equal(pictures, clip[list(given.fused.clip.key_frames)]) and not torch.equal(pictures, dotted)
    assert mask.any() and not mask.all()
    assert not run("DecAFAttentionPreview", frames=clip, fused=fused(6, constant=0.0))[1].any()


def case_cancel_stops_the_preview():
    clip = images(6)
    with_cancel("DecAFAttentionPreview", frames=clip, fused=fused(6))


# -- sample clip -----------------------------------------------------------------------------------------------------------------------


def case_a_sample_clip_runs_on_the_bundled_models():
    clip, query, truth, queries = run("DecAFSampleClip", clip_seed=3, kind="colour", frames=8).args
    assert clip.shape[0] == truth.shape[0] == 8 and query in queries.splitlines()
    again = run("DecAFSampleClip", clip_seed=3, kind="colour", frames=8).args
    assert torch.equal(again[0], clip) and again[1] == query
    model, tracker = run("LoadMLLM", model="bundled").args[0], run("DecAFLoadSAM2", model="bundled").args[0]
    found = [one[0] for one in run("ExtractRolloutAttention", mllm=model, frames=clip, query=query).args]
    fused = run("FrameFusion", attention=run("ObjectBackgroundFusion", object=found[0], background=found[1]).args[0]).args[0]
    given = run("AttentionToSAM2Prompts", fused=fused).args[0]
    mask = run("SAM2VideoPropagate", sam2=tracker, frames=clip, prompts=given).args[0]
    both, either = ((mask > 0) & (truth > 0)).sum(), ((mask > 0) | (truth > 0)).sum()
    assert both / either > 0.7, f"the mask of '{query}' is elsewhere: IoU {both / either:.2f}"


def case_a_clip_without_such_a_query_says_which_it_has():
    kinds = {kind: None for kind in NODES["DecAFSampleClip"].GET_SCHEMA().inputs[1].options}
    messages = []
    for seed in range(12):
        for kind in kinds:
            try:
                run("DecAFSampleClip", clip_seed=seed, kind=kind, frames=1)
            except ValueError as error:
                messages.append(str(error))
    assert messages and all("no query of the kind" in message for message in messages)
