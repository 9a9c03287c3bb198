"""ComfyUI's own language models with quantised, partly loaded, patched and damaged weights. Run by inside.py."""

import json
import shutil
from dataclasses import replace
from unittest.mock import patch

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import torch
from cases_partial import card
from core_kit import clip, clip_of, expect_equal, extract, models, theirs
from kit import images, module, run
from safetensors.torch import load_file, save_file
from second_device import DEVICE, Remote
from small_core import FILES, folder_of, shrunk

FEW = {"frames": images(2), "query": "the bright square", "max_key_frames": 2}


def refusal(mllm) -> str:
    try:
        extract(mllm, **FEW)
    except ValueError as error:
        assert type(error).__name__ == "DecafError", repr(error)
        return str(error)
    raise AssertionError("it ran")


def through_transformers(name, tensors, label):
    """A copy of a tiny model with other weights (by their names in its file), loaded through transformers in float32."""
    folder = models() / "LLM" / label
    shutil.copytree(models() / "LLM" / folder_of(name), folder)
    save_file({key: tensor.float().contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return run("LoadMLLM", model=label, dtype="fp32")[0]


def quantised(tensors):
    """(name, fp8 weight, scale) of the layers that published files have in fp8: those of the decoder and of the blocks of the vision tower."""
    for name, weight in tensors.items():
        if ("layers." in name or ".blocks." in name) and name.endswith(".weight") and weight.ndim == 2:
            scale = weight.abs().max() / 448
            yield name, (weight / scale).to(torch.float8_e4m3fn), scale.float()


def write_fp8(name, *, old):
    """An fp8 file as published, and the numbers it stands for. `old`: with `scale_weight`, as those for Qwen-Image; else with `comfy_quant`."""
    tensors = load_file(models() / "text_encoders" / FILES[name])
    stored, exact = dict(tensors), dict(tensors)
    for key, weight, scale in quantised(tensors):
        stored[key], exact[key] = weight, weight.float() * scale
        if old:
            stored[key.replace(".weight", ".scale_weight")] = scale
            stored[key.replace(".weight", ".scale_input")] = torch.tensor(1.0)
        else:
            stored[f"{key}_scale"] = scale
            words = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
            stored[key.replace(".weight", ".comfy_quant")] = torch.tensor(list(words), dtype=torch.uint8)
    if old:
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    file = f"{name}_fp8.safetensors"
    save_file(stored, models() / "text_encoders" / file)
    return file, exact


def case_core_maps_of_fp8_weights_are_those_of_the_dequantised():
    for name in FILES:
        file, exact = write_fp8(name, old=name == "qwen2_5_vl")
        told = module("nodes.text_encoders").text_encoders()[file]
        loaded = clip_of(name, file)
        projection = next(part for part in loaded.cond_stage_model.modules() if hasattr(part, "q_proj")).q_proj
        assert type(projection.weight.data).__name__ == "QuantizedTensor" and told.precision == "fp8" and told.usable
        expected = extract(through_transformers(name, exact, f"dequantised_{name}"), **FEW)
        expect_equal(extract(loaded, **FEW), expected, most=1e-3)


def expect_the_same_on_a_card(share, state=mm.VRAMState.NORMAL_VRAM):
    """On a device that is as strict as a GPU about what lies where, with room for `share` of the weights. Yields how much of them lay there."""
    for name, file in FILES.items():
        path = models() / "text_encoders" / file
        expected = extract(theirs(name), **FEW)
        small = patch.object(module("nodes.core_mllm"), "MASK_BYTES", 0)
        with card(int(path.stat().st_size * share), state), shrunk(models() / "LLM" / folder_of(name)), small:
            devices = {"load_device": DEVICE, "offload_device": torch.device("cpu")}
            loaded = comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.QWEN_IMAGE, model_options=devices)
            found = extract(loaded, **FEW)
            weights = list(loaded.cond_stage_model.parameters())
            there = sum(one.nbytes for one in weights if isinstance(one, Remote)) / sum(one.nbytes for one in weights)
        expect_equal(found, expected)
        yield there


def case_core_maps_are_the_same_with_all_weights_on_the_device():
    assert [*expect_the_same_on_a_card(4)] == [1, 1, 1]


def case_core_maps_are_the_same_with_some_weights_on_the_device():
    assert all(0.2 < there < 0.6 for there in expect_the_same_on_a_card(0.6))


def case_core_maps_are_the_same_with_lowvram():
    assert all(0.1 < there < 0.3 for there in expect_the_same_on_a_card(0.3, mm.VRAMState.LOW_VRAM))


def case_core_lora_on_the_clip_counts_like_one_that_is_merged():
    for name in FILES:
        tensors = load_file(models() / "text_encoders" / FILES[name])
        prefix = "model.language_model." if any(key.startswith("model.language_model.") for key in tensors) else "model."
        lora, merged = {}, dict(tensors)
        for part in ("self_attn.q_proj", "mlp.down_proj"):
            key = f"{prefix}layers.1.{part}.weight"
            up, down = torch.randn(tensors[key].shape[0], 4) * 0.05, torch.randn(4, tensors[key].shape[1]) * 0.05
            merged[key] = tensors[key] + up @ down
            inner = next(k for k in clip(name).cond_stage_model.state_dict() if k.endswith(f"layers.1.{part}.weight")).removesuffix(".weight")
            lora |= {f"text_encoders.{inner}.lora_up.weight": up, f"text_encoders.{inner}.lora_down.weight": down}
        _, patched = comfy.sd.load_lora_for_models(None, clip(name), lora, 0, 1.0)
        before = extract(clip(name), **FEW)
        found = extract(patched, **FEW)
        expect_equal(found, extract(through_transformers(name, merged, f"merged_{name}"), **FEW))
        assert float((found[0][0].video - before[0][0].video).abs().max()) > 1e-3 * float(before[0][0].video.max()), "the LoRA changed nothing"
        expect_equal(extract(clip(name), **FEW), before, most=1e-6)


def case_core_classes_with_the_layers_of_another_loader_give_the_same():
    """Loaders of other packs give ComfyUI's classes layers of their own, and do not tell the file."""
    class Ops(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            """Keeps its weight in two parts, as quantised layers keep theirs in many."""

            def forward(self, x):
                weight = self.weight.to(x)
                low, high = weight[: len(weight) // 2], weight[len(weight) // 2 :]
                out = torch.cat([torch.nn.functional.linear(x, low), torch.nn.functional.linear(x, high)], -1)
                return out if self.bias is None else out + self.bias.to(x)

    for name, file in FILES.items():
        tensors = load_file(models() / "text_encoders" / file)
        with shrunk(models() / "LLM" / folder_of(name)):
            loaded = comfy.sd.load_text_encoder_state_dicts(
                [tensors], clip_type=comfy.sd.CLIPType.QWEN_IMAGE, model_options={"custom_operations": Ops}
            )
        found, expected = extract(loaded, **FEW), extract(theirs(name), **FEW)
        if name == "qwen2_5_vl":  # its head is only in the file
            assert found[0][0].presence is None and "not known" in found[2][0]
            try:
                extract(loaded, **FEW, setting="class name")
            except ValueError as error:
                assert "cannot answer in words" in str(error) and "expression" in str(error)
            else:
                raise AssertionError("it answered without a head")
            expected = [[replace(one, presence=None) for one in expected[0]], *expected[1:]]
        expect_equal(found, expected)


def case_core_weights_that_are_no_numbers_are_told_before_the_clip_is_looked_at():
    for name in FILES:
        tensors = load_file(models() / "text_encoders" / FILES[name])
        key = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight"))
        tensors[key] = torch.full_like(tensors[key], torch.nan)
        file = f"{name}_nan.safetensors"
        save_file(tensors, models() / "text_encoders" / file)
        loaded = clip_of(name, file)
        with patch.object(module("nodes.core_engine").CoreEngine, "see", lambda *_: 1 / 0):
            message = refusal(loaded)
        assert "not finite" in message and file in message


def case_core_head_rows_are_those_of_the_file():
    for dtype, scale in ((torch.float32, None), (torch.bfloat16, None), (torch.float8_e4m3fn, 0.25)):
        head = torch.randn(20000, 16).to(dtype)
        stored = {"lm_head.weight": head} | ({"lm_head.scale_weight": torch.tensor(scale)} if scale else {})
        path = models() / f"head_{str(dtype)[6:]}.safetensors"
        save_file(stored, path)
        read = module("nodes.file_head").FileHead(path, "lm_head.weight", "lm_head.scale_weight" if scale else None)
        hidden = torch.randn(2, 3, 16)
        expected = hidden @ (head.float() * (scale or 1)).T
        assert torch.allclose(read(hidden), expected, atol=1e-4)
        assert torch.allclose(read(hidden, [19999, 3]), expected[..., [19999, 3]], atol=1e-4)
        path.unlink()
        fresh = module("nodes.file_head").FileHead(path, "lm_head.weight")
        try:
            fresh(hidden)
        except ValueError as error:
            assert str(path) in str(error) and "Load the model again" in str(error)
        else:
            raise AssertionError("a file that is gone was read")
