"""What the nodes must do inside ComfyUI. Plain functions, run by inside.py; each raises when something is wrong."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import InputImpl, Types

NODES: dict = {}
SETTINGS: dict = {}
_MADE: dict = {}

IDS = {
    "LoadMLLM", "ExtractRolloutAttention", "ObjectBackgroundFusion", "FrameFusion", "AttentionToSAM2Prompts", "SAM2VideoPropagate",
    "DecAFLoadSAM2", "DecAFAttentionPreview", "DecAFTracksToMask",
}  # fmt: skip


# -- how a node is run -----------------------------------------------------------------------------------------------------------------


def run(node, **inputs):
    """Executes a node the way ComfyUI does: on a locked clone of its class, with the defaults of inputs that are not given."""
    cls = NODES[node]
    given = {item.id: item.default for item in cls.GET_SCHEMA().inputs if getattr(item, "default", None) is not None} | inputs
    with torch.inference_mode():
        return cls.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**given)


def error_of(node, **inputs) -> str:
    """The message of the DecafError that the node must raise."""
    try:
        run(node, **inputs)
    except ValueError as error:
        assert type(error).__name__ == "DecafError", repr(error)
        return str(error)
    raise AssertionError(f"{node} took it")


def refused(node, **inputs) -> str:
    """What the node says to values when they are queued."""
    answer = NODES[node].validate_inputs(**inputs)
    assert isinstance(answer, str), f"{node} would queue {inputs}"
    return answer


def images(frames=6, height=72, width=96, channels=3):
    """IMAGE: a bright square on a dark gradient, moving to the right."""
    clip = torch.linspace(0.1, 0.5, width)[None, None, :, None].repeat(frames, height, 1, channels)
    for index in range(frames):
        left = min(index * 6, max(width - 24, 0))
        clip[index, height // 3 : height // 3 * 2 + 1, left : left + 24] = 0.9
    return clip


def video(name="clip.mp4"):
    return InputImpl.VideoFromFile(str(Path(SETTINGS["base"]) / "input" / name))


def mllm(family="qwen2_5_vl"):
    if family not in _MADE:
        _MADE[family] = run("LoadMLLM", model=f"tiny_{family}")[0]
    return _MADE[family]


def sam2():
    if "sam2" not in _MADE:
        _MADE["sam2"] = run("DecAFLoadSAM2", model="tiny_sam2.safetensors")[0]
    return _MADE["sam2"]


def extract(frames, family="qwen2_5_vl", **inputs):
    inputs = {"query": "the bright square", "tokens_per_frame": 32, "max_key_frames": 4} | inputs
    return run("ExtractRolloutAttention", mllm=mllm(family), frames=frames, **inputs)


def attention(length):
    """Object and background attention of images(length), extracted once."""
    if ("attention", length) not in _MADE:
        _MADE["attention", length] = extract(images(length)).args[:2]
    return _MADE["attention", length]


def fused(length, constant=None):
    """Fused attention of images(length); `constant`: a map of one value everywhere."""
    object, background = attention(length)
    made = run("FrameFusion", attention=run("ObjectBackgroundFusion", object=object, background=background)[0])[0]
    return made if constant is None else replace(made, map=torch.full_like(made.map, constant))


def prompts(length, threshold=0.9):
    return run("AttentionToSAM2Prompts", fused=fused(length), threshold=threshold)[0]


def segment(length, given=None, **inputs):
    return run("SAM2VideoPropagate", sam2=sam2(), frames=images(length), prompts=given or prompts(length), **inputs)


def with_cancel(node, **inputs):
    """Presses Cancel at the first progress that the node reports; it must stop there, not at its end."""
    reports = []

    def hook(value, total, preview, node_id=None):
        reports.append((value, total))
        mm.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        run(node, **inputs)
    except mm.InterruptProcessingException:
        assert len(reports) < 3, reports
        return
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        mm.interrupt_current_processing(False)
    raise AssertionError(f"{node} ran to its end; it reported {reports}")


# -- schema ----------------------------------------------------------------------------------------------------------------------------


def case_the_ids_are_those_that_workflows_use():
    assert set(NODES) == IDS


def case_everything_has_a_tooltip_and_a_description():
    for name, node in NODES.items():
        schema = node.GET_SCHEMA()
        assert schema.description and schema.display_name and schema.search_aliases and schema.category == "DecAF", name
        for slot in [*schema.inputs, *schema.outputs]:
            assert slot.tooltip, f"{name}.{slot.id}"


def case_every_node_has_a_help_page():
    for name in NODES:
        text = (Path(SETTINGS["pack"]) / "web" / "docs" / f"{name}.md").read_text()
        for slot in [*NODES[name].GET_SCHEMA().inputs, *NODES[name].GET_SCHEMA().outputs]:
            assert slot.id in text or slot.display_name in text, f"the help of {name} does not name {slot.id}"


# -- loading ---------------------------------------------------------------------------------------------------------------------------


def case_combos_are_valid_without_a_model_and_say_where_models_go():
    import folder_paths

    empty = Path(SETTINGS["scratch"]) / "empty"
    for kind in ("LLM", "sam2"):
        kept = folder_paths.folder_names_and_paths[kind]
        folder_paths.folder_names_and_paths[kind] = ([str(empty / kind)], set())
        try:
            node = "LoadMLLM" if kind == "LLM" else "DecAFLoadSAM2"
            combo = next(item for item in NODES[node].FINALIZE_SCHEMA().inputs if item.id == "model")
            assert combo.default in combo.options
            message = refused(node, model=combo.default)
            assert str(empty / kind) in message and ("Qwen/Qwen2.5-VL-7B-Instruct" in message or "facebook/sam2.1-hiera-large" in message)
            assert error_of(node, model=combo.default) == message
        finally:
            folder_paths.folder_names_and_paths[kind] = kept


def case_a_model_that_went_away_is_named():
    assert "gone" in refused("LoadMLLM", model="gone") and "gone" in error_of("LoadMLLM", model="gone")
    assert "gone.pt" in refused("DecAFLoadSAM2", model="gone.pt") and "gone.pt" in error_of("DecAFLoadSAM2", model="gone.pt")


def case_a_path_is_no_model():
    assert "../../secret" in error_of("LoadMLLM", model="../../secret")


def case_models_in_folders_of_extra_model_paths_are_listed():
    import folder_paths

    other = Path(SETTINGS["scratch"]) / "elsewhere"
    (other / "Qwen" / "mine").mkdir(parents=True)
    (other / "Qwen" / "mine" / "config.json").write_text("{}")
    folder_paths.add_model_folder_path("LLM", str(other))
    combo = next(item for item in NODES["LoadMLLM"].FINALIZE_SCHEMA().inputs if item.id == "model")
    assert "Qwen/mine" in combo.options and "tiny_internvl" in combo.options
    folder_paths.folder_names_and_paths["LLM"][0].remove(str(other))


def case_a_folder_with_half_a_model_is_refused_by_name():
    folder = Path(SETTINGS["base"]) / "models" / "LLM" / "half"
    folder.mkdir()
    (folder / "config.json").write_text((folder.parent / "tiny_qwen2_5_vl" / "config.json").read_text())
    assert "model.safetensors" in error_of("LoadMLLM", model="half")


def case_a_text_only_model_is_refused():
    folder = Path(SETTINGS["base"]) / "models" / "LLM" / "text"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    assert "llama" in error_of("LoadMLLM", model="text")


def case_damaged_and_foreign_checkpoints_are_refused():
    folder = Path(SETTINGS["base"]) / "models" / "sam2"
    (folder / "damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not a header")
    torch.save({"image_encoder.pos_embed": torch.zeros(1)}, folder / "sam1.pt")
    assert "damaged.safetensors" in error_of("DecAFLoadSAM2", model="damaged.safetensors")
    assert "sam1.pt" in error_of("DecAFLoadSAM2", model="sam1.pt")


def case_a_pickle_in_a_checkpoint_is_not_run():
    import pickle

    class Payload:
        def __reduce__(self):
            return Path.write_text, (Path(SETTINGS["scratch"]) / "ran", "")

    folder = Path(SETTINGS["base"]) / "models" / "sam2"
    (folder / "payload.pt").write_bytes(pickle.dumps({"model": Payload()}))
    assert "payload.pt" in error_of("DecAFLoadSAM2", model="payload.pt")
    torch.save({"model": Payload()}, folder / "payload2.pt")
    assert "payload2.pt" in error_of("DecAFLoadSAM2", model="payload2.pt")
    assert not (Path(SETTINGS["scratch"]) / "ran").exists()


def case_a_download_starts_only_when_picked_and_goes_to_the_models_folder():
    import huggingface_hub

    asked = []

    def fetch(repo, *, local_dir, allow_patterns, **_):
        asked.append((repo, Path(local_dir)))
        assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in allow_patterns)
        source = Path(SETTINGS["base"]) / "models" / "LLM" / "tiny_qwen2_5_vl"
        Path(local_dir).mkdir(parents=True)
        for file in source.iterdir():
            (Path(local_dir) / file.name).write_bytes(file.read_bytes())
        return str(local_dir)

    kept, huggingface_hub.snapshot_download = huggingface_hub.snapshot_download, fetch
    try:
        run("LoadMLLM", model="tiny_qwen2_vl")
        assert not asked
        for _ in range(2):
            run("LoadMLLM", model="download: Qwen/Qwen2.5-VL-3B-Instruct")
    finally:
        huggingface_hub.snapshot_download = kept
    folder = Path(SETTINGS["base"]) / "models" / "LLM" / "Qwen2.5-VL-3B-Instruct"
    assert asked == [("Qwen/Qwen2.5-VL-3B-Instruct", folder)], "fetched once, then found"


def case_cancel_stops_loading():
    with_cancel("LoadMLLM", model="tiny_internvl")


# -- memory ----------------------------------------------------------------------------------------------------------------------------


def case_models_live_under_the_memory_manager():
    given = prompts(2)
    for managed, use in ((mllm(), lambda: extract(images(1))), (sam2(), lambda: segment(2, given))):
        mm.unload_all_models()
        assert managed.patcher not in [loaded.model for loaded in mm.current_loaded_models]
        use()
        assert managed.patcher in [loaded.model for loaded in mm.current_loaded_models]
        assert managed.patcher.loaded_size() == managed.patcher.model_size() > 0
        mm.unload_all_models()
        assert managed.patcher not in [loaded.model for loaded in mm.current_loaded_models] and managed.patcher.loaded_size() == 0
        use()  # again from RAM: the record keeps its weights


def case_the_cache_of_results_finds_the_model():
    from comfy.model_patcher import is_model_patcher_output

    assert is_model_patcher_output(mllm()) and is_model_patcher_output(sam2())


def case_dropping_the_result_frees_the_model():
    import gc
    import weakref

    made = run("LoadMLLM", model="tiny_qwen2_vl")[0]
    run("ExtractRolloutAttention", mllm=made, frames=images(1), query="square", tokens_per_frame=16)
    module = weakref.ref(made.value.model)
    del made
    gc.collect()
    mm.cleanup_models_gc()
    gc.collect()
    assert module() is None


# -- attention -------------------------------------------------------------------------------------------------------------------------


def case_three_families_give_two_attentions():
    for family in ("qwen2_vl", "qwen2_5_vl", "internvl"):
        object, background, answers = extract(images(3), family, max_key_frames=2).args
        assert object.kind == "object" and background.kind == "background"
        assert object.frame.shape[0] == 2 and object.clip.key_frames == (0, 2) and "the bright square" in answers
        assert object.frame.isfinite().all() and object.video.device.type == "cpu"


def case_class_name_generates_an_answer():
    object, _, answers = extract(images(1), setting="class name").args
    assert len(object.answers) == 2 and answers.count("\n") >= 2


def case_video_and_its_frames_give_the_same():
    from_file = extract(video(), tokens_per_frame=16)[0].clip
    from_frames = extract(video().get_components().images, tokens_per_frame=16)[0].clip
    assert from_file.key_frames == from_frames.key_frames == (0, 3, 7, 11)
    # ComfyUI enlarges the colour planes in another way, which shows along edges.
    assert (from_file.thumbnails.float() - from_frames.thumbnails.float()).abs().mean() < 2


def case_a_trimmed_video_is_trimmed():
    assert extract(video().as_trimmed(0.25, 0.5), max_key_frames=1)[0].clip.length == 6


def case_a_video_in_memory_is_taken():
    made = InputImpl.VideoFromComponents(Types.VideoComponents(images=images(3), frame_rate=Fraction(7)))
    assert extract(made, max_key_frames=1)[0].clip.length == 3


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
        message = refused("ExtractRolloutAttention", query=query, setting="expression")
        assert error_of("ExtractRolloutAttention", mllm=mllm(), frames=images(1), query=query) == message
    assert NODES["ExtractRolloutAttention"].validate_inputs(query=None, setting="expression") is True  # linked
    assert NODES["ExtractRolloutAttention"].validate_inputs(query="赤い四角 العربية", setting="class name") is True
    assert extract(images(1), query="赤い四角 العربية")[0].frame.isfinite().all()


def case_own_questions_are_asked_and_checked():
    asked = extract(images(1), object_question="Where is {query}", background_question="Not {query}")
    assert asked[0].question.startswith("Where is the bright square") and asked[1].question.startswith("Not the bright square")
    assert "{query}" in refused("ExtractRolloutAttention", query="it", setting="expression", object_question="Where?")
    assert "{object}" in refused("ExtractRolloutAttention", query="it", setting="class name", background_question="{query}")


def case_a_start_layer_beyond_the_model_is_refused():
    assert "99" in error_of("ExtractRolloutAttention", mllm=mllm(), frames=images(1), query="the square", start_layer=99)


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
    maps = [run("FrameFusion", attention=sharp, video_weight=weight)[0].map for weight in (0.0, 1.0)]
    assert not torch.equal(*maps)


# -- prompts, masks --------------------------------------------------------------------------------------------------------------------


def case_prompts_come_in_the_forms_that_others_take():
    made, points, boxes, frame = run("AttentionToSAM2Prompts", fused=fused(6), threshold=0.6).args
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
    made, points, boxes, frame = run("AttentionToSAM2Prompts", fused=fused(6), threshold=0.6).args
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
    assert overlay.get_frame_count() == 6 and fps == 24 and report
    assert torch.equal(run("DecAFTracksToMask", tracks=tracks, objects="")[0], mask)


def case_a_video_brings_its_frame_rate():
    clip = video()
    object, background, _ = extract(clip, max_key_frames=1).args
    fused = run("FrameFusion", attention=run("ObjectBackgroundFusion", object=object, background=background)[0])[0]
    given = run("AttentionToSAM2Prompts", fused=fused, threshold=1.0)[0]
    result = run("SAM2VideoPropagate", sam2=sam2(), frames=clip, prompts=given)
    assert result[3] == 12 and float(result[2].get_frame_rate()) == 12 and result[0].shape == (12, 72, 96)


def case_a_clip_of_one_frame_previews_a_picture_and_a_longer_one_a_video():
    for length, suffix in ((1, ".png"), (2, ".mp4")):
        shown = segment(length).ui.as_dict()["images"][0]
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
    pictures, mask = run("DecAFAttentionPreview", frames=clip, fused=given.fused).args
    dotted = run("DecAFAttentionPreview", frames=clip, fused=given.fused, prompts=given)[0]
    assert pictures.shape == (4, 72, 96, 3) and mask.shape == (4, 72, 96) and 0 <= pictures.min() and pictures.max() <= 1
    assert not torch.equal(pictures, clip[list(given.fused.clip.key_frames)]) and not torch.equal(pictures, dotted)
    assert mask.any() and not mask.all()
    assert not run("DecAFAttentionPreview", frames=clip, fused=fused(6, constant=0.0))[1].any()


def case_cancel_stops_the_preview():
    clip = images(6)
    with_cancel("DecAFAttentionPreview", frames=clip, fused=fused(6))
