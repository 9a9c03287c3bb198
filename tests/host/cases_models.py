"""What the nodes say of themselves, and how they find, load and unload models. Run by inside.py; each raises when something is wrong."""

from pathlib import Path

import comfy.model_management as mm
import torch
from kit import IDS, NODES, SETTINGS, error_of, extract, images, mllm, prompts, refused, run, sam2, segment, with_cancel

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
    encoders = folder_paths.folder_names_and_paths["text_encoders"]
    for kind in ("LLM", "sam2"):
        kept = folder_paths.folder_names_and_paths[kind]
        folder_paths.folder_names_and_paths[kind] = ([str(empty / kind)], set())
        folder_paths.folder_names_and_paths["text_encoders"] = ([str(empty / "text_encoders")], set())
        try:
            node = "LoadMLLM" if kind == "LLM" else "DecAFLoadSAM2"
            combo = next(item for item in NODES[node].FINALIZE_SCHEMA().inputs if item.id == "model")
            assert combo.default in combo.options
            message = refused(node, model=combo.default)
            assert str(empty / kind) in message and ("Qwen/Qwen2.5-VL-7B-Instruct" in message or "facebook/sam2.1-hiera-large" in message)
            assert error_of(node, model=combo.default) == message
        finally:
            folder_paths.folder_names_and_paths[kind] = kept
            folder_paths.folder_names_and_paths["text_encoders"] = encoders


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


def case_importing_the_pack_imports_nothing_heavy():
    """ComfyUI starts no later for it: what computes is imported when a node runs."""
    assert not SETTINGS["imported"] & {"transformers", "sam2", "torchvision", "huggingface_hub", "scipy"}, SETTINGS["imported"]


def case_sam2_computes_in_the_precision_that_is_chosen():
    for precision, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):  # auto: of a CPU
        assert run("DecAFLoadSAM2", model="bundled", precision=precision)[0].value.dtype == dtype


def case_every_family_is_offered():
    """What the registry knows is in the list, the description and the suggestion; nothing is written down a second time."""
    import sys

    load = sys.modules["pack_under_test.nodes.load"]
    families = sys.modules["pack_under_test.decaf.mllm.supported"].all_families()
    schema = NODES["LoadMLLM"].GET_SCHEMA()
    offered = [option.removeprefix("download: ") for option in schema.inputs[0].options if option.startswith("download: ")]
    assert len(families) >= 2 and offered == [repository for family in families for repository in family.repositories]
    assert all(family.title in schema.description and family.title in schema.search_aliases for family in families)
    assert load.SUGGESTED in offered


def case_without_sam2_only_its_loader_complains():
    import importlib.machinery
    import sys

    package = sys.modules["pack_under_test.decaf.sam2.package"]
    finder, find = importlib.machinery.PathFinder, importlib.machinery.PathFinder.find_spec
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "sam2"}
    package.sam2_package.cache_clear()
    finder.find_spec = lambda name, path=None, target=None: None if name == "sam2" else find(name, path, target)
    try:
        message = error_of("DecAFLoadSAM2", model="bundled")
        assert "sam2" in message and "-m pip install" in message and "rf-sam-2" in message
        frames = images(2)
        object, background, _ = extract(frames, max_key_frames=2)
        fused = run("FrameFusion", attention=run("ObjectBackgroundFusion", object=object, background=background)[0])[0]
        assert run("DecAFAttentionPreview", frames=frames, fused=fused)[0].shape[0] == 2
        assert run("AttentionToSAM2Prompts", fused=fused)[3] in (0, 1)
    finally:
        finder.find_spec = find
        sys.modules.update(kept)
        package.sam2_package.cache_clear()
