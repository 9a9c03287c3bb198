"""Files in models/text_encoders and CLIPs that were made to do harm: each ends in a sentence, and the list of models stays. Run by inside.py."""

import json
import struct
import time
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from unittest.mock import patch

import torch
from comfy_api.latest import InputImpl, Types
from core_kit import clip, clip_of, extract, models
from kit import NODES, error_of, images, module, refused, run
from safetensors.torch import load_file, save_file
from small_core import FILES, folder_of, shrunk

FEW = {"frames": images(2), "query": "the bright square", "max_key_frames": 2}
NORM = "model.language_model.layers.0.input_layernorm.weight"
TOWER = "model.visual.deepstack_merger_list.0.norm.weight"


def entries(**changes):
    """Tensors that a Qwen3-VL 4B is known by, the last one changed."""
    return {
        NORM: {"dtype": "BF16", "shape": [2560], "data_offsets": [0, 5120]},
        TOWER: {"dtype": "BF16", "shape": [4096], "data_offsets": [5120, 13312]} | changes,
    }


def refusal(mllm) -> str:
    return error_of("ExtractRolloutAttention", mllm=mllm, **FEW)


def case_core_headers_that_are_no_headers():
    path = models() / "text_encoders" / "odd \u202e\u4e2d '\".safetensors"
    changed = [
        {"dtype": ["BF16"]}, {"dtype": 5}, {"dtype": "X" * 100_000}, {"dtype": "\x1b[31m\n"}, {"shape": "ab"}, {"shape": ["a"]}, {"shape": None},
        {"shape": [[1]]}, {"shape": [-4096]}, {"shape": [10**400] * 2}, {"shape": [1.5]}, {"shape": [float("nan")]}, {"shape": [2] * 100_000},
        {"data_offsets": [0, "x"]}, {"data_offsets": [0, 10**400]}, {"data_offsets": [-5, -4]}, {"data_offsets": [0, float("nan")]},
        {"data_offsets": None}, {"data_offsets": {"1": 4}}, {"data_offsets": [0]},
    ]  # fmt: skip
    headers = [b"55", b'"x"', b"null", b"true", b"NaN", b"[1]", b"[" * 200_000, b'{"\xff": 1}']
    headers += [json.dumps(entries(**change)).encode() for change in changed]
    headers += [json.dumps(entries() | {NORM: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 2]}}).encode() for shape in ([10**400], [[1]])]
    for header in headers:
        try:
            path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(13312))
            assert path.name not in NODES["LoadMLLM"].GET_SCHEMA().inputs[0].options
            message = refused("LoadMLLM", model=path.name)
        finally:
            path.unlink()
        assert message.startswith(path.name) and "is no safetensors file" in message, (header[:300], message)


def case_core_a_header_that_would_fill_the_memory_is_not_read():
    path = models() / "text_encoders" / "large.safetensors"
    header = b'{"a":[' + b"[]," * (6 << 20) + b"[]]}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    begin = time.perf_counter()
    try:
        message = refused("LoadMLLM", model=path.name)
    finally:
        path.unlink()
    assert "is no safetensors file" in message and time.perf_counter() - begin < 2


def case_core_a_file_that_goes_away_does_not_end_the_list():
    path = models() / "text_encoders" / "brief.safetensors"
    header = json.dumps(entries()).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(13312))
    file = module("nodes.text_encoders").read_text_encoder(path)
    path.unlink()
    assert file.told.startswith("Qwen3-VL 4B, bf16")


def case_core_fp8_is_not_taken_for_auto():
    name = "qwen3_vl_8b"
    message = error_of("LoadMLLM", model=FILES[name], dtype="fp8")
    assert message.startswith(FILES[name]) and "cannot be kept in fp8" in message and "these are fp32. Choose auto" in message, message
    tensors = load_file(models() / "text_encoders" / FILES[name])
    stored = {key: value.to(torch.float8_e4m3fn) if value.ndim == 2 and "layers." in key else value for key, value in tensors.items()}
    save_file(stored, models() / "text_encoders" / "eight.safetensors")
    encoders = module("nodes.text_encoders").text_encoders()
    as_fp8 = {"eight.safetensors": replace(encoders["eight.safetensors"], precision="fp8")}
    with shrunk(models() / "LLM" / folder_of(name)), patch.object(module("nodes.load"), "text_encoders", lambda: encoders | as_fp8):
        assert run("LoadMLLM", model="eight.safetensors", dtype="fp8")[0].value.name == "eight.safetensors"
    (models() / "text_encoders" / "eight.safetensors").unlink()


def case_core_clips_without_what_comfyui_loads_them_by():
    good = clip("qwen3_vl_8b")

    def like(**changes):
        parts = {"cond_stage_model": good.cond_stage_model, "patcher": good.patcher, "tokenizer": good.tokenizer}
        return SimpleNamespace(**parts | changes)

    odd = [
        like(patcher=SimpleNamespace()), like(patcher=None), like(patcher=SimpleNamespace(load_device="cpu")), like(cond_stage_model=None),
        like(cond_stage_model=5, patcher=5, tokenizer=5),
    ]  # fmt: skip
    for value in odd:
        message = refusal(value)
        assert message.startswith("The CLIP that is connected is of the kind") and "Load Multimodal LLM" in message, message
    message = refusal(like(patcher=SimpleNamespace(load_device=torch.device("cpu"))))
    assert "it does not load what is in the CLIP" in message and "models/LLM" in message, message
    for made in ({}, 5, (1,), (1, ([5],)), (1, (["a\0b"],)), (1, [])):
        told = SimpleNamespace(load_device=torch.device("cpu"), cached_patcher_init=made)
        assert module("nodes.core_mllm")._file_of(like(patcher=told)) is None


def case_core_a_clip_of_two_multimodal_files_is_refused_by_their_names():
    files = [FILES["qwen2_5_vl"], FILES["qwen3_vl_8b"]]
    good = clip("qwen3_vl_8b")
    made = (None, ([str(models() / "text_encoders" / file) for file in files],))
    patcher = SimpleNamespace(load_device=torch.device("cpu"), cached_patcher_init=made)
    message = refusal(SimpleNamespace(cond_stage_model=good.cond_stage_model, patcher=patcher, tokenizer=good.tokenizer))
    assert all(file in message for file in files) and "Load one of them alone" in message, message


def case_core_a_lora_of_nan_on_the_vision_tower_is_told():
    patched = clip("qwen3_vl_8b").clone()
    key = next(key for key in patched.cond_stage_model.state_dict() if "visual.blocks.0.mlp" in key and key.endswith("weight"))
    nan = torch.full_like(patched.cond_stage_model.state_dict()[key], torch.nan)
    assert patched.patcher.add_patches({key: ("diff", (nan,))}) == [key]
    message = refusal(patched)
    assert "not finite" in message and "take the LoRA off" in message, message


def case_core_a_head_of_nan_gives_no_answer():
    for name in ("qwen2_5_vl", "qwen3_vl_8b"):
        tensors = load_file(models() / "text_encoders" / FILES[name])
        key = next(key for key in tensors if "lm_head" in key)
        file = f"{name}_head.safetensors"
        save_file(tensors | {key: torch.full_like(tensors[key], torch.nan)}, models() / "text_encoders" / file)
        message = refusal(clip_of(name, file))
        assert file in message and "head" in message and "Download the model again" in message, message
        (models() / "text_encoders" / file).unlink()


def case_core_a_video_in_memory_keeps_its_times():
    """Models are told when their frames are shown: a clip of one frame a second is another than one of 24."""
    frames = images(5)
    found = {}
    for rate in (1, 24):
        video = InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, frame_rate=Fraction(rate)))
        assert module("nodes.host").clip_of(video).fps == rate
        found[rate] = extract(clip("qwen3_vl_8b"), video)[0][0].video
    assert torch.equal(found[24], extract(clip("qwen3_vl_8b"), frames)[0][0].video)
    assert not torch.equal(found[1], found[24])
    for rate in (0, -5, float("nan"), float("inf"), None, "x"):
        assert module("nodes.host")._rate(rate) is None
