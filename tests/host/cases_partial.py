"""Models that ComfyUI loads in part: the same maps and masks, wherever their weights are. Each raises when something is wrong.

The device is that of second_device.py: computed by the CPU, and as strict as a GPU about what lies where.
"""

import logging
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import comfy.model_management as mm
import comfy.ops
import torch
from kit import SETTINGS, error_of, images, prompts, run
from second_device import DEVICE, Remote, copied, second_device

MB = 1 << 20


def pack(name):
    return sys.modules[f"pack_under_test.{name}"]


def families():
    return sorted(folder.name for folder in (Path(SETTINGS["base"]) / "models" / "LLM").glob("tiny_*"))


@contextmanager
def card(memory, state=mm.VRAMState.NORMAL_VRAM):
    """ComfyUI believes that it has a GPU of `memory` bytes, none of which its own work takes."""

    def used():
        return sum(loaded.model.loaded_size() for loaded in mm.current_loaded_models if loaded.device == DEVICE)

    def free(device=None, torch_free_too=False):
        return (memory - used(), 0) if torch_free_too else memory - used()

    mm.unload_all_models()
    with ExitStack() as stack, second_device():
        stack.enter_context(patch.object(mm, "get_torch_device", lambda: DEVICE))
        stack.enter_context(patch.object(mm, "get_free_memory", free))
        stack.enter_context(patch.object(mm, "vram_state", state))
        stack.enter_context(patch.object(mm, "minimum_inference_memory", lambda: 0))
        stack.enter_context(patch.object(mm, "extra_reserved_memory", lambda: 0))
        stack.enter_context(patch.object(mm, "soft_empty_cache", lambda *_: None))
        stack.enter_context(patch.object(pack("nodes.attention"), "memory_needed", lambda *_, **__: 0))
        stack.enter_context(patch.object(pack("nodes.segmentation"), "memory_needed", lambda *_, **__: 0))
        try:
            yield
        finally:
            mm.unload_all_models()


@contextmanager
def log_lines(module="nodes.managed"):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger(f"pack_under_test.{module}")
    kept = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(kept)


def load_mllm(family="tiny_qwen2_5_vl", dtype="fp32"):
    return run("LoadMLLM", model=family, dtype=dtype)[0]


def load_sam2(precision="fp32"):
    return run("DecAFLoadSAM2", model="tiny_sam2.safetensors", precision=precision)[0]


def maps(made, **inputs):
    inputs = {"query": "the bright square", "tokens_per_frame": 16, "max_key_frames": 3} | inputs
    object, background, *_ = run("ExtractRolloutAttention", mllm=made, frames=images(3), **inputs).args
    found = [one for attention in (*object, *background) for one in (attention.video, attention.frame)]
    assert all(one.device.type == "cpu" and torch.isfinite(one).all() for one in found)
    return found


def masks(made, given):
    with log_lines("decaf.sam2.trial") as warnings:
        mask, tracks, *_ = run("SAM2VideoPropagate", sam2=made, frames=images(3), prompts=given, score_threshold=0.0).args
    assert mask.any() and not warnings, warnings
    return [mask, *(torch.tensor([track.score for track in tracks.tracks]),)]


def same(found, expected):
    return len(found) == len(expected) and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def plain_maps(family, **inputs):
    """Of the model as transformers made it, all of it on the CPU."""
    with patch.object(pack("nodes.managed"), "make_streamable", lambda *_: None):
        made = load_mllm(family)
    result = maps(made, **inputs)
    assert not any(hasattr(module, "comfy_cast_weights") for module in made.value.model.modules())
    return result


def weights(made):
    """Bytes on the device, and of all."""
    every = {id(one): one for one in made.value.model.parameters()}.values()
    return sum(one.nbytes for one in every if isinstance(one, Remote)), sum(one.nbytes for one in every)


# -- the same results ------------------------------------------------------------------------------------------------------------------


def maps_on_a_card(share, state=mm.VRAMState.NORMAL_VRAM):
    """With memory for `share` of the weights: yields family, bytes of weights that lay on the device, and of all."""
    for family in families():
        expected = plain_maps(family)
        whole = weights(load_mllm(family))[1]
        with card(int(whole * share), state), patch.object(pack("nodes.casting"), "LARGE", 1 << 14):  # these experts are small ones
            made = load_mllm(family)
            assert same(maps(made), expected), (family, share, state)
            yield family, *weights(made)


def case_the_maps_are_the_same_with_all_weights_on_the_device():
    for family, there, whole in maps_on_a_card(4):
        assert there == whole, family


def case_the_maps_are_the_same_with_some_weights_on_the_device():
    for family, there, whole in maps_on_a_card(0.6):
        assert 0.2 * whole < there < whole, family


def case_the_maps_are_the_same_with_lowvram():
    for family, there, whole in maps_on_a_card(0.3, mm.VRAMState.LOW_VRAM):
        assert 0.05 * whole < there < 0.6 * whole, family


def case_the_maps_are_the_same_with_novram():
    for family, there, whole in maps_on_a_card(4, mm.VRAMState.NO_VRAM):
        assert there < 0.2 * whole and copied["bytes"] > 0.5 * whole, (family, there, whole, copied)


def case_a_class_name_and_several_queries_are_the_same_from_streamed_weights():
    asked = {"query": "the bright square\nthe dark part", "setting": "class name"}
    expected = plain_maps("tiny_qwen2_5_vl", **asked)
    with card(64 * MB, mm.VRAMState.NO_VRAM):
        assert same(maps(load_mllm(), **asked), expected)


def case_the_masks_are_the_same_wherever_the_weights_are():
    given = prompts(3)
    with patch.object(pack("nodes.managed"), "make_streamable", lambda *_: None):
        expected = masks(load_sam2(), given)
    for memory, state in ((64 * MB, mm.VRAMState.NORMAL_VRAM), (64 * MB, mm.VRAMState.NO_VRAM)):
        with card(memory, state):
            made = load_sam2()
            assert same(masks(made, given), expected), state
            there, whole = weights(made)
            assert there == whole if state == mm.VRAMState.NORMAL_VRAM else 0 < there < whole


def case_half_precision_of_sam2_is_the_same_with_casting_layers():
    """Under autocast a casting layer must not round what the plain layer does not."""
    given = prompts(3)
    with patch.object(pack("nodes.managed"), "make_streamable", lambda *_: None):
        expected = masks(load_sam2("bf16"), given)
    assert same(masks(load_sam2("bf16"), given), expected)


def case_every_module_with_weights_casts_them_or_is_always_there():
    casting = pack("nodes.casting")
    for made in (*map(load_mllm, families()), load_sam2()):
        model = made.patcher.model
        modules = [module for module in model.modules() if any(one is not None for one in module._parameters.values())]
        cast = [module for module in modules if casting.is_casting(module)]
        loose = sum(one.nbytes for module in modules if module not in cast for one in module._parameters.values() if one is not None)
        assert casting.resident_bytes(model) - loose == sum(one.nbytes for one in model.buffers())
        assert len(cast) > 10 and all(isinstance(module, comfy.ops.CastWeightBiasOp) for module in cast), made.value.name
        if made.value.name.startswith("tiny_"):  # SAM 2's small parts are read in many places, and stay whole
            assert not any(type(module) is torch.nn.Linear for module in model.modules()), made.value.name


def case_a_head_that_shares_its_table_is_moved_and_counted_once():
    casting = pack("nodes.casting")
    torch.manual_seed(0)
    table = torch.nn.Embedding(50, 8)
    head = torch.nn.Linear(8, 50, bias=False)
    head.weight = table.weight
    model = torch.nn.ModuleDict({"table": table, "head": head})
    hidden = torch.randn(3, 8)
    expected = head(hidden)
    casting.make_streamable(model, list(model.modules()))
    assert mm.module_size(model) == table.weight.nbytes and torch.equal(model["head"](hidden), expected)
    with torch.inference_mode(), second_device():
        assert torch.equal(model["head"](hidden.to(DEVICE)).cpu(), expected)
        model.to(DEVICE)
        assert isinstance(table.weight, Remote) and torch.equal(model["head"](hidden.to(DEVICE)).cpu(), expected)


def case_fused_experts_are_streamed():
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

    casting = pack("nodes.casting")
    config = Qwen3VLMoeTextConfig(hidden_size=16, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = Qwen3VLMoeTextSparseMoeBlock(config).eval().requires_grad_(False)
    for one in block.parameters():
        one.normal_(std=0.2)
    hidden = torch.randn(1, 7, 16)

    def run_block(device):
        out = block(hidden.to(device))
        return (out[0] if isinstance(out, tuple) else out).cpu()

    expected = run_block("cpu")
    with patch.object(casting, "LARGE", 1 << 10):
        casting.make_streamable(block, list(block.modules()))
    experts = block.experts
    assert not experts._parameters and {name for name, _ in experts.named_children()} >= {"streamed_gate_up_proj", "streamed_down_proj"}
    with torch.inference_mode(), second_device():
        casting.settle(block, DEVICE)
        assert casting.bytes_on(block, DEVICE)[0] < casting.bytes_on(block, DEVICE)[1], "the experts wait on the CPU"
        copied.clear()
        assert torch.equal(run_block(DEVICE), expected)
        assert copied["bytes"] >= experts.streamed_gate_up_proj.weight.nbytes + experts.streamed_down_proj.weight.nbytes
        assert "gate_up_proj" not in experts.__dict__, "let go of after the pass"
        casting.settle(block, torch.device("cpu"))
    casting.store_as_float8(block.modules())
    assert experts.streamed_down_proj.weight.dtype == torch.float8_e4m3fn
    found = run_block("cpu")
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    for one in (experts.streamed_gate_up_proj, experts.streamed_down_proj):
        one.weight, one.scale = torch.nn.Parameter(one.weight.float() * one.scale, requires_grad=False), 1.0
    assert torch.equal(run_block("cpu"), found), "float8 is what its numbers say"


# -- float8 ----------------------------------------------------------------------------------------------------------------------------


def dequantised(family):
    """The model with the numbers that float8 holds, as plain float32 weights."""
    casting = pack("nodes.casting")
    with patch.object(pack("nodes.managed"), "make_streamable", lambda *_: None):
        made = load_mllm(family)
    layers = [one for one in made.value.engine.text_tower.modules() if type(one) is torch.nn.Linear]
    for layer in layers:
        scale, stored = casting._as_float8(layer.weight)
        off = (stored.float() * scale - layer.weight).abs() / layer.weight.abs().max()
        assert off.max() < 2**-4, "float8 keeps three binary digits of the largest"
        layer.weight.copy_(stored.float() * scale)
    return made, len(layers)


def case_float8_maps_are_those_of_the_dequantised_weights():
    for family in families():
        plain, layers = dequantised(family)
        expected = maps(plain)
        made = load_mllm(family, "fp8")
        stored = [one for one in made.value.model.parameters() if one.dtype == torch.float8_e4m3fn]
        assert len(stored) == layers > 10 and made.value.engine.dtype == torch.float32
        assert {one.dtype for one in made.value.model.parameters()} == {torch.float8_e4m3fn, torch.float32}
        found = maps(made)
        assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-3 and same(found, expected)
        assert not same(found, plain_maps(family)), "float8 changes something"
        with card(64 * MB, mm.VRAMState.NO_VRAM):
            assert same(maps(load_mllm(family, "fp8")), expected), "and streamed from there too"


def case_float8_where_the_device_does_not_know_it_is_refused():
    with patch.object(mm, "supports_cast", lambda *_: False):
        message = error_of("LoadMLLM", model="tiny_qwen2_5_vl", dtype="fp8")
    assert "fp8" in message and "auto" in message


# -- loading, unloading, telling -------------------------------------------------------------------------------------------------------


def case_memory_that_another_model_needs_is_given_up_and_taken_back():
    expected = plain_maps("tiny_qwen2_5_vl")
    with card(64 * MB):
        made = load_mllm()
        assert same(maps(made), expected)
        whole = weights(made)[1]
        assert weights(made)[0] == whole
        given = whole // 2
        assert made.patcher.partially_unload(made.patcher.offload_device, given) >= given
        assert weights(made)[0] <= whole - given and made.patcher.loaded_size() <= whole - given
        with patch.object(mm, "get_free_memory", lambda *_, **k: (0, 0) if k.get("torch_free_too") else 0):
            assert same(maps(made), expected), "nothing more fits: what was given up is streamed"
            assert weights(made)[0] < whole
        assert same(maps(made), expected) and weights(made)[0] == whole, "there is room again"


def case_models_moved_away_come_back():
    expected = plain_maps("tiny_qwen2_5_vl")
    with card(64 * MB):
        made = load_mllm()
        for _ in range(3):
            assert same(maps(made), expected)
            assert made.patcher in [loaded.model for loaded in mm.current_loaded_models]
            assert weights(made)[0] == weights(made)[1]
            mm.unload_all_models()
            assert made.patcher not in [loaded.model for loaded in mm.current_loaded_models]
            assert weights(made)[0] == 0 == made.patcher.loaded_size()
            assert not any(isinstance(one, Remote) for one in made.value.model.buffers())


class DynamicMemory:
    """What comfy_aimdo's native code does for a model, without its GPU: `room` says whether a layer's weights are kept once they were copied."""

    room = True

    def __init__(self, size, device):
        self.memory, self.used, self.kept = torch.empty(int(size), dtype=torch.uint8, device=DEVICE), 0, set()

    def alloc(self, size):
        self.used += -self.used % 512 + size
        return self, self.used - size, size

    def fault(self, offset, size):
        if self.room:
            self.kept.add((offset, size))
        return b"the same" if (offset, size) in self.kept else None

    def loaded_size(self):
        return sum(size for _, size in self.kept)

    def free_memory(self, size):
        freed = self.loaded_size()
        self.kept.clear()
        return freed

    def prioritize(self):
        pass

    def unpin(self, offset, size):
        pass


@contextmanager
def dynamic_memory(room):
    import comfy.memory_management
    import comfy.model_patcher
    import comfy.pinned_memory
    import comfy_aimdo

    with ExitStack() as stack, patch.object(DynamicMemory, "room", room):
        stack.enter_context(patch.object(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic))
        stack.enter_context(patch.object(comfy.memory_management, "aimdo_enabled", True))
        stack.enter_context(patch.object(comfy_aimdo.model_vbar, "ModelVBAR", DynamicMemory))
        stack.enter_context(patch.object(comfy_aimdo.model_vbar, "vbars_analyze", lambda *_: 0))
        stack.enter_context(patch.object(comfy_aimdo.host_buffer, "HostBuffer", lambda *_: SimpleNamespace(size=0)))
        stack.enter_context(patch.object(comfy_aimdo.torch, "aimdo_to_tensor", lambda one, _: one[0].memory[one[1] : one[1] + one[2]]))
        stack.enter_context(patch.object(comfy.pinned_memory, "get_pin", lambda *_, **__: None))
        stack.enter_context(patch.object(comfy.pinned_memory, "pin_memory", lambda *_, **__: False))
        yield


def maps_in_dynamic_memory(room):
    for family in families():
        for dtype in ("fp32", "fp8") if family == families()[0] else ("fp32",):
            expected = plain_maps(family) if dtype == "fp32" else maps(load_mllm(family, dtype))
            with card(64 * MB), dynamic_memory(room), log_lines() as lines:
                made = load_mllm(family, dtype)
                assert made.patcher.is_dynamic()
                assert same(maps(made), expected), (family, room)
                staged = sum(hasattr(module, "_v") for module in made.value.model.modules())
                assert staged > 3 and "dynamic memory" in lines[0] and len(lines) == 1, (staged, lines)
                mm.unload_all_models()
                assert weights(made)[0] == 0 and not made.patcher.loaded_size(), "given back"
                assert same(maps(made), expected), "and there again"


def case_the_maps_are_the_same_in_dynamic_memory():
    maps_in_dynamic_memory(room=True)


def case_the_maps_are_the_same_in_dynamic_memory_without_room():
    maps_in_dynamic_memory(room=False)


def case_the_masks_are_the_same_in_dynamic_memory():
    given = prompts(3)
    expected = masks(load_sam2(), given)
    for room in (True, False):
        with card(64 * MB), dynamic_memory(room):
            assert same(masks(load_sam2(), given), expected)


def case_the_log_says_once_what_is_where():
    with log_lines() as lines:
        with card(64 * MB):
            made = load_mllm()
            maps(made)
            maps(made)
            assert lines == [f"tiny_qwen2_5_vl: all of {sum_of(made)} on {DEVICE}"], lines
        lines.clear()
        with card(64 * MB, mm.VRAMState.NO_VRAM):
            made = load_mllm()
            maps(made)
            there, whole = pack("nodes.casting").bytes_on(made.value.model, DEVICE)
            size = pack("nodes.managed")._size
            assert lines == [
                f"tiny_qwen2_5_vl: {size(there)} of {size(whole)} on {DEVICE}, {size(whole - there)} streamed from host memory"
            ]


def sum_of(made):
    return pack("nodes.managed")._size(pack("nodes.casting").bytes_on(made.value.model, DEVICE)[1])


def case_a_gpu_that_is_not_used_is_mentioned():
    with log_lines() as lines, patch.object(torch.cuda, "is_available", lambda: True):
        maps(load_mllm())
    assert len(lines) == 1 and "computes on the CPU" in lines[0] and "(cuda)" in lines[0], lines


def case_quantised_models_are_not_moved():
    with patch.object(pack("nodes.load"), "load_mllm", quantised(pack("nodes.load").load_mllm)), log_lines() as lines:
        made = load_mllm()
        assert made.patcher is None and not any(hasattr(module, "comfy_cast_weights") for module in made.value.model.modules())
        before = [one.data_ptr() for one in made.value.model.parameters()]
        maps(made)
        mm.unload_all_models()
        maps(made)
        assert before == [one.data_ptr() for one in made.value.model.parameters()]
        assert len(lines) == 1 and "outside ComfyUI's memory management" in lines[0], lines
        assert "quantised already" in error_of("LoadMLLM", model="tiny_qwen2_5_vl", dtype="fp8")


def quantised(load):
    """Marks the model as transformers marks those of bitsandbytes, which also refuse to be moved."""

    def loaded(*args, **kwargs):
        made = load(*args, **kwargs)
        made.model.is_quantized = True
        made.model.to = None
        return made

    return loaded
