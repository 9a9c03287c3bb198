"""ComfyUI's own language models behind a CLIP: maps, presence and answers are those of transformers with the same weights. Run by inside.py."""

import comfy.model_management as mm
import torch
from core_kit import clip, expect_equal, extract, key_frames_at_once, models, theirs
from kit import error_of, images, module, run, video, with_cancel
from small_core import FILES, folder_of, shrunk

# -- the same numbers ------------------------------------------------------------------------------------------------------------------


def case_core_maps_of_a_clip_are_those_of_transformers():
    for family in FILES:
        expect_equal(extract(clip(family)), extract(theirs(family)))


def case_core_maps_of_one_image_are_those_of_transformers():
    for family in FILES:
        for frames in (images(1), images(1, height=110, width=60)):
            expect_equal(extract(clip(family), frames), extract(theirs(family), frames))


def case_core_maps_of_a_video_file_are_those_of_transformers():
    for family in FILES:
        expect_equal(extract(clip(family), video(), max_key_frames=7), extract(theirs(family), video(), max_key_frames=7))


def case_core_maps_do_not_depend_on_the_batch():
    for family in FILES:
        with key_frames_at_once(1):
            one_by_one = extract(clip(family), tokens_per_frame=16)
        with key_frames_at_once(1 << 20):
            at_once = extract(clip(family), tokens_per_frame=16)
            expect_equal(at_once, extract(theirs(family), tokens_per_frame=16))
        expect_equal(one_by_one, at_once)


def case_core_answers_in_words_as_transformers_does():
    for family in FILES:
        found, expected = (extract(one, query="the square", setting="class name") for one in (clip(family), theirs(family)))
        assert found[0][0].answers and found[2] == expected[2]
        expect_equal(found, expected)


def case_core_model_is_loaded_by_name_from_text_encoders():
    for family, file in FILES.items():
        with shrunk(models() / "LLM" / folder_of(family)):
            loaded = run("LoadMLLM", model=file)[0]
        expect_equal(extract(loaded), extract(theirs(family)))


def case_core_model_computes_in_bf16_where_it_is_asked_to():
    for family, file in FILES.items():
        with shrunk(models() / "LLM" / folder_of(family)):
            loaded = run("LoadMLLM", model=file, dtype="bf16")[0]
        assert loaded.value.engine.dtype == torch.bfloat16
        expect_equal(extract(loaded), extract(theirs(family)), most=0.3)
        assert "fp16" in error_of("LoadMLLM", model=file, dtype="fp16")


def case_core_model_is_found_whatever_the_type_of_load_clip():
    import nodes

    types = {
        "qwen2_5_vl": ("stable_diffusion", "qwen_image", "hunyuan_image", "longcat_image", "omnigen2"),
        "qwen3_vl_4b": ("krea2", "mage", "lumina2"),
        "qwen3_vl_8b": ("ideogram4", "boogu", "joyimage", "wan"),
    }
    for family, names in types.items():
        for name in names:
            with shrunk(models() / "LLM" / folder_of(family)):
                loaded = nodes.CLIPLoader().load_clip(FILES[family], name)[0]
            found = module("nodes.core_mllm").managed(loaded).load(0)
            assert found.name == FILES[family] and found.family.name == ("Qwen2-VL" if family == "qwen2_5_vl" else "Qwen3-VL"), name


# -- under ComfyUI's management --------------------------------------------------------------------------------------------------------


def case_core_model_lives_under_the_memory_manager():
    from comfy.model_patcher import is_model_patcher_output

    for family in FILES:
        patcher = clip(family).patcher
        mm.unload_all_models()
        extract(clip(family), images(1), query="square")
        assert any(loaded.model is patcher for loaded in mm.current_loaded_models)
        mm.unload_all_models()
        assert not any(loaded.model is patcher for loaded in mm.current_loaded_models)
        assert is_model_patcher_output(module("nodes.core_mllm").managed(clip(family)))


def case_cancel_stops_a_core_model():
    for family in FILES:
        extract(clip(family), images(1), query="square")
        with_cancel("ExtractRolloutAttention", mllm=clip(family), frames=images(4), query="square")
