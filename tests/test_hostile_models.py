"""Model folders that were made to do harm: their code is not run, their numbers are not believed, and nothing hangs."""

import json
import os
import shutil
import sys
import time
import types

import pytest
import torch
from random_clips import clip_of
from safetensors.torch import load_file, save_file
from slow import EACH_FAMILY

from decaf.attention.extract import extract_attention
from decaf.errors import DecafError
from decaf.mllm import all_families, find_mllm, load_mllm
from decaf.mllm.engine import ATTENTION


@pytest.fixture(params=["qwen2_5_vl"])
def model(request, mllm_folder, tmp_path):
    """A tiny model to change."""
    folder = tmp_path / "model"
    shutil.copytree(mllm_folder(request.param), folder)
    return folder


every_family = pytest.mark.parametrize("model", EACH_FAMILY, indirect=True)


def change(path, content=None, **entries):
    """Adds entries to a JSON file, at the top or at "part.name"."""
    whole = content if content is not None else json.loads(path.read_text()) if path.exists() else {}
    for name, value in entries.items():
        part = whole
        *parts, last = name.split("__")
        for step in parts:
            part = part.setdefault(step, {})
        part[last] = value
    path.write_text(json.dumps(whole))


def refused(folder, *words, seconds=5.0):
    start = time.perf_counter()
    with pytest.raises(DecafError) as caught:
        load_mllm(folder)
    told = str(caught.value)
    assert time.perf_counter() - start < seconds
    assert str(folder) in told and all(word in told for word in words) and 40 < len(told) < 600 and "\n" not in told, told


def asked(mllm):
    return extract_attention(mllm, clip_of(2), "the cup", tokens_per_frame=16)


def equal(found, expected):
    return all(torch.equal(one.video, two.video) and torch.equal(one.frame, two.frame) for one, two in zip(found, expected, strict=True))


# -- code ------------------------------------------------------------------------------------------------------------------------------------

EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
class Evil:
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()
"""
MAPS = {
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoTokenizer"),
    "tokenizer_config.json": ("AutoTokenizer", "AutoProcessor"),
    "preprocessor_config.json": ("AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor"),
    "processor_config.json": ("AutoProcessor",),
    "video_preprocessor_config.json": ("AutoVideoProcessor", "AutoProcessor"),
    "generation_config.json": ("AutoModel",),
}


@every_family
@pytest.mark.parametrize("where", [*MAPS, "all of them"])
def test_python_of_a_model_folder_is_not_run(model, where, tmp_path, monkeypatch):
    """Even where somebody would say yes to it: nobody is asked."""
    expected = asked(load_mllm(model))
    mark = tmp_path / "ran"
    (model / "evil.py").write_text(EVIL.format(mark=str(mark)))
    for file in MAPS if where == "all of them" else (where,):
        change(model / file, auto_map={name: ["evil.Evil", None] if "Tokenizer" in name else "evil.Evil" for name in MAPS[file]})
    questions = []
    monkeypatch.setattr("builtins.input", lambda *text: questions.append(text) or "y")
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert equal(asked(load_mllm(model)), expected)
    assert not mark.exists() and not questions


@every_family
def test_the_chat_template_of_a_folder_is_not_run(model):
    """It is a program; one of a few bytes can run for ever or fill the memory."""
    expected = asked(load_mllm(model))
    for template in ("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", "{{ 'A' * 10**10 }}", "{% if %}"):
        (model / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        (model / "chat_template.jinja").write_text(template)
        change(model / "tokenizer_config.json", chat_template=template)
        assert equal(asked(load_mllm(model)), expected)
    for path in model.glob("chat_template.*"):
        path.unlink()
    assert equal(asked(load_mllm(model)), expected)


@every_family
@pytest.mark.parametrize("choice", ["eager", "flash_attention_2", "owner/kernel", "flex_attention", {"": "eager"}, 5])
def test_the_attention_is_ours_whatever_the_configuration_says(model, choice):
    expected = asked(load_mllm(model))
    for place in ("", "text_config__", "vision_config__"):
        if place.startswith("text") and "text_config" not in json.loads((model / "config.json").read_text()):
            continue
        change(
            model / "config.json",
            **{place + name: choice for name in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")},
            **{place + "output_attentions": True, place + "output_hidden_states": True, place + "use_kernels": True},
        )
    mllm = load_mllm(model)
    tower = next(getattr(mllm.model.model, name) for name in ("visual", "vision_tower", "vision_model") if hasattr(mllm.model.model, name))
    assert tower.config._attn_implementation == "sdpa" and mllm.engine.text_tower.config._attn_implementation == ATTENTION
    assert equal(asked(mllm), expected)


def test_an_adapter_does_not_lead_to_another_model(model):
    change(model / "adapter_config.json", base_model_name_or_path="/somewhere/else", peft_type="LORA")
    refused(model, "adapter_config.json", "Merge")


# -- numbers ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry, value",
    [
        ("num_hidden_layers", 100_000),
        ("vision_config__depth", 100_000),
        ("num_hidden_layers", 512),
        ("vocab_size", 10**9),
        ("hidden_size", 2**40),
        ("intermediate_size", 1_000_000),
        ("vision_config__intermediate_size", 10**6),
        ("vision_config__patch_size", 10**6),
        ("vision_config__in_channels", 10**5),
        ("num_attention_heads", 10**9),
        ("vocab_size", 10**400),
        ("hidden_size", 10**400),
        ("rms_norm_eps", float("inf")),
        ("vision_config__more", [10**300, float("nan")]),
    ],
)
def test_more_numbers_than_the_files_hold(model, entry, value):
    change(model / "config.json", **{entry: value})
    refused(model, "ownload")


@pytest.mark.parametrize("model, name", [("internvl", "hidden_size"), ("internvl", "num_hidden_layers")], indirect=["model"])
def test_more_numbers_than_the_files_of_another_family_hold(model, name):
    for part in ("text_config", "vision_config"):
        change(model / "config.json", **{f"{part}__{name}": 100_000})
        refused(model, "ownload")


@every_family
@pytest.mark.parametrize("tower", ["text", "vision"])
@pytest.mark.parametrize("layers", [0, 1])
def test_fewer_layers_than_the_files_hold(model, tower, layers):
    """The model would run without the others, and its maps would be of another model."""
    config = json.loads((model / "config.json").read_text())
    part = config.get(f"{tower}_config", config)
    name = next(name for name in ("num_hidden_layers", "depth") if name in part)
    assert part[name] > 1
    part[name] = layers
    if "deepstack_visual_indexes" in config["vision_config"]:
        config["vision_config"]["deepstack_visual_indexes"] = []
    change(model / "config.json", config)
    refused(model)


@pytest.mark.parametrize(
    "entry, value",
    [
        ("window_size", 0),
        ("window_size", -112),
        ("window_size", 1),
        ("patch_size", 0),
        ("patch_size", "14"),
        ("patch_size", 65),
        ("spatial_merge_size", 0),
        ("spatial_merge_size", 10**5),
        ("temporal_patch_size", 0),
        ("temporal_patch_size", True),
        ("tokens_per_second", -3),
        ("patch_size", None),
    ],
)
def test_numbers_that_pictures_are_cut_by(model, entry, value):
    change(model / "config.json", **{f"vision_config__{entry}": value})
    refused(model, entry, "ownload")


@pytest.mark.parametrize("model", ["internvl"], indirect=True)
@pytest.mark.parametrize("entries", [{"downsample_ratio": 0}, {"downsample_ratio": 1e-9}, {"vision_config__image_size": [113, 113]}])
def test_tiles_that_cannot_be(model, entries):
    change(model / "config.json", **entries)
    refused(model, "ownload")


def test_tokens_beyond_the_vocabulary(model):
    """The tokenizer of a larger model loads without a complaint; its tokens would be looked up outside the table."""
    weights = load_file(model / "model.safetensors")
    small = {name: value[:300].clone() if name in ("model.embed_tokens.weight", "lm_head.weight") else value for name, value in weights.items()}
    save_file(small, model / "model.safetensors", metadata={"format": "pt"})
    change(model / "config.json", vocab_size=300)
    refused(model, "300", "not of one model")


def test_a_tokenizer_that_cannot_be_used(model):
    change(model / "tokenizer.json", {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []})
    refused(model, "ownload")
    (model / "tokenizer.json").write_text("[" * 100_000)
    refused(model, "ownload")


@pytest.mark.parametrize("model", ["internvl"], indirect=True)
@pytest.mark.parametrize(
    "part, entries",
    [
        ("text_config", {"model_type": "detr", "use_pretrained_backbone": True, "use_timm_backbone": False, "backbone": "evil/repo"}),
        ("text_config", {"model_type": "timm_wrapper", "architecture": "x"}),
        ("text_config", {"model_type": "qwen2_moe", "num_experts": 100_000}),
        ("text_config", {"model_type": "qwen3_moe", "num_experts": 128}),  # some sizes of InternVL3.5
        ("text_config", {"model_type": "gpt_oss"}),
        ("vision_config", {"model_type": "timm_backbone", "backbone": "evil/repo"}),
        ("vision_config", {"model_type": ["internvl_vision"]}),
    ],
)
def test_towers_of_other_kinds_are_refused(model, part, entries):
    """Some kinds fetch a part of themselves by a name in the configuration."""
    change(model / "config.json", **{f"{part}__{name}": value for name, value in entries.items()})
    refused(model, "tower", "Choose another")


@pytest.mark.parametrize(
    "name, why",
    [
        ("qwen3_5", "linear attention"),
        ("qwen3_5_moe", "linear attention"),
        ("qwen3_next", "linear attention"),
        ("gemma3", "sliding windows"),
        ("gemma3n", "sliding windows"),
        ("gemma4", "sliding windows"),
        ("gemma4_unified", "sliding windows"),
        ("molmo", "never run"),
        ("molmo2", "see later ones"),
        ("paligemma", "see later ones"),
        ("mllama", "cross-attention"),
        ("llama4", "chunks"),
    ],
)
def test_models_without_plain_attention_are_refused_with_the_reason(model, name, why):
    change(model / "config.json", model_type=name)
    refused(model, f'"{name}"', why, "rollout is not supported", "such as Qwen/Qwen3-VL-8B-Instruct")
    assert any("Qwen/Qwen3-VL-8B-Instruct" in family.repositories for family in all_families())


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe", "florence2", "smolvlm_next", "qwen"])
def test_other_models_are_refused_with_what_is_supported(model, name):
    change(model / "config.json", model_type=name)
    refused(model, f'"{name}"', "not supported", "qwen2_5_vl", "qwen3_vl_moe", "internvl")


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention", 5])
def test_layers_without_plain_attention_are_refused(model, kind):
    change(model / "config.json", layer_types=["full_attention", kind, kind, "full_attention"])
    refused(model, str(kind), "some layers", "full attention in every layer")


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "gptq", "nonsense", ["x"], None])
def test_quantisation_that_may_fetch_kernels_is_refused(model, method):
    change(model / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refused(model, "quantised", "Choose another version")


def test_a_normaliser_that_makes_gigabytes_of_a_word(model):
    doubling = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    change(model / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [doubling] * 40})
    refused(model, "tokenizer.json", "rewrites", "ownload")
    change(model / "tokenizer.json", normalizer=doubling)
    refused(model, "tokenizer.json", "rewrites", "ownload")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_tokenizer_file_that_is_too_large_to_be_one(model, name):
    with (model / name).open("r+b") as file:
        file.truncate(65 << 20)
    refused(model, name, "bytes")


def test_a_config_nested_too_deeply(model):
    nested = 1
    for _ in range(200):
        nested = {"a" * 9000: nested}
    change(model / "config.json", more=nested)
    refused(model, "levels deep", "ownload")


# -- files -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe\x00", b"[]", b'"text"', b"5"])
def test_files_that_are_not_what_they_should_be(model, name, content):
    expected = asked(load_mllm(model))
    (model / name).write_bytes(content)
    try:
        mllm = load_mllm(model)
    except DecafError as error:
        assert str(model) in str(error) and len(str(error)) < 600
    else:  # what is not needed may be damaged
        assert equal(asked(mllm), expected)


@pytest.mark.parametrize("numbers", [[0.5, 0.5], ["a", 0, 0], [float("nan"), 0.5, 0.5], [1e9, 1, 1], 5, None, [0.5] * 10**5])
def test_picture_numbers_that_cannot_be(model, numbers):
    change(model / "preprocessor_config.json", image_mean=numbers)
    refused(model, "image_mean", "ownload")


def test_nothing_else_of_the_picture_processor_is_believed(model):
    """A few bytes could ask for pictures of gigabytes."""
    expected = asked(load_mllm(model))
    hostile = {"do_pad": True, "pad_size": {"height": 10**6, "width": 10**6}, "do_center_crop": True, "crop_size": 10**6, "size": 10**6}
    change(model / "preprocessor_config.json", **hostile, resample=99, image_processor_type="Nonsense", rescale_factor=1e30)
    assert equal(asked(load_mllm(model)), expected)
    change(model / "preprocessor_config.json", patch_size=10**6)
    refused(model, "preprocessor_config.json is that of another model", "patch_size of 1000000")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin", "sub/model.safetensors", "a\0.safetensors", 5, None, ""])
def test_an_index_stays_in_its_folder(model, name):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(model, "incomplete", "index")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_pipe_is_not_waited_for(model, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    refused(model, name)


def test_a_config_that_is_too_large_to_be_one(model):
    with (model / "config.json").open("r+b") as file:
        file.truncate(9 << 20)
    refused(model, "config.json", "bytes")


# -- the library underneath, and the network ---------------------------------------------------------------------------------------------------


def test_transformers_that_cannot_be_imported_is_named_with_its_root_cause(model, monkeypatch):
    broken = types.ModuleType("transformers")

    def missing(name):
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            try:
                raise OSError("libtorchaudio.so: undefined symbol: torch_library_impl")
            except OSError as error:
                raise RuntimeError("Failed to import transformers.audio_utils") from error
        except RuntimeError as error:
            raise ModuleNotFoundError(f"Could not import module '{name}'. Are this object's requirements defined correctly?") from error

    broken.__getattr__ = missing
    monkeypatch.setitem(sys.modules, "transformers", broken)
    refused(model, "libtorchaudio.so", "undefined symbol")


def test_a_mistyped_folder_is_not_looked_for_on_the_network(model, monkeypatch, tmp_path):
    import huggingface_hub

    reached = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: reached.append(args) or str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("model/Qwen", "model/", "modle/x/y", "a b/c", "-x/y", "x/y\0", "x/", "/x", "./x/y", "https://host/x", "x\\y", ".", ""):
        with pytest.raises(DecafError):
            load_mllm(find_mllm(name)) if name in ("model/", ".", "") else find_mllm(name)
            if name == "model/":
                raise DecafError("it is there")
    assert not reached
    find_mllm("owner/model-7B.instruct")
    assert reached
