"""The nodes on other machines than this one: other GPUs, full disks, a ComfyUI that loads only half. Each raises when something is wrong."""

import errno
import sys
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import comfy.model_management as mm
import torch
from kit import error_of, extract, fused, images, mllm, run, sam2, segment


def pack(name):
    return sys.modules[f"pack_under_test.{name}"]


def on_machine(stack, device, capability=None, name="", bf16=True, macos=(15,)):
    """ComfyUI believes that it runs on this device."""
    state = {"cuda": mm.CPUState.GPU, "mps": mm.CPUState.MPS, "cpu": mm.CPUState.CPU}[device]
    card = SimpleNamespace(major=(capability or (0, 0))[0], minor=(capability or (0, 0))[1], name=name)
    stack.enter_context(patch.object(mm, "cpu_state", state))
    stack.enter_context(patch.object(mm, "get_torch_device", lambda: torch.device(device)))
    stack.enter_context(patch.object(mm, "mac_version", lambda: macos))
    stack.enter_context(patch.object(mm, "maximum_vram_for_weights", lambda *_: 8 << 30))
    stack.enter_context(patch.object(torch.cuda, "get_device_properties", lambda *_: card))
    stack.enter_context(patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: bf16))


def case_the_dtype_auto_is_bf16_or_fp32_and_never_fp16():
    host = pack("nodes.host")
    machines = [
        (("cuda", (8, 6), "NVIDIA GeForce RTX 3090"), torch.bfloat16, torch.bfloat16),
        (("cuda", (7, 5), "NVIDIA GeForce RTX 2060"), torch.bfloat16, torch.float32),  # it emulates bf16
        (("cuda", (7, 5), "NVIDIA GeForce GTX 1660"), torch.bfloat16, torch.float32),
        (("cuda", (7, 0), "Tesla V100"), torch.bfloat16, torch.float32),
        (("cuda", (6, 1), "NVIDIA GeForce GTX 1080", False), torch.float32, torch.float32),  # an old CUDA that cannot emulate it
        (("mps",), torch.bfloat16, torch.bfloat16),
        (("mps", None, "", True, (13, 5)), torch.float32, torch.float32),
        (("cpu",), None, torch.float32),  # the library decides by the weights
    ]
    for machine, language_model, mixed in machines:
        with ExitStack() as stack:
            on_machine(stack, *machine)
            assert host.model_dtype("auto") == language_model, machine
            assert host.mixed_dtype("auto") == mixed, machine
            assert host.model_dtype("fp16") == torch.float16, "who asks for it, gets it"


def case_the_log_of_the_host_names_the_model():
    assert mllm().patcher.model.__class__.__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert sam2().patcher.model.__class__.__name__ == type(sam2().value.model).__name__ != "_Holder"


def case_an_overlay_that_cannot_be_drawn_does_not_cost_the_masks():
    """It is drawn where it is read, and what is wrong is said there."""

    def failing(error):
        def write(path, frames, *_, **__):
            next(iter(frames))
            raise error

        return write

    mask, tracks, overlay, *_ = segment(3).args
    assert mask.shape == (3, 72, 96)
    for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("codec libx264 not found"), mm.InterruptProcessingException()):
        with patch.object(pack("nodes.objects"), "write_video", failing(error)):
            try:
                overlay.get_components()
            except BaseException as raised:
                assert raised is error
                continue
        raise AssertionError("nobody said so")
    assert overlay.get_components().images.shape == (3, 72, 96, 3), "the next who reads it may have more luck"


def case_an_overlay_wider_than_h264_holds_does_not_cost_the_masks():
    wide = images(2, 16, 16400)
    object, background, _ = extract(wide, tokens_per_frame=16)
    one = run("FrameFusion", attention=run("ObjectBackgroundFusion", object=object, background=background)[0])[0]
    given = run("AttentionToSAM2Prompts", fused=one, threshold=1.0)[0]
    mask, tracks, overlay, *_ = run("SAM2VideoPropagate", sam2=sam2(), frames=wide, prompts=given).args
    assert mask.shape == (2, 16, 16400)
    assert run("DecAFShowObjects", frames=wide, tracks=tracks).ui is not None, "what the node shows is smaller"
    try:
        overlay.get_stream_source()
    except ValueError as error:
        assert "16384" in str(error)
        return
    raise AssertionError("nobody said so")


def case_pictures_that_cannot_be_written_are_a_sentence():
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with patch.object(pack("nodes.host").ui, "PreviewImage", full):
        message = error_of("DecAFAttentionPreview", frames=images(6), fused=fused(6))
        assert "No space left" in message and "temp" in message
        assert "No space left" in error_of("DecAFShowObjects", frames=images(1), tracks=segment(1)[1])  # a picture instead of a video


def case_memory_is_returned_or_left_on_every_system():
    host = pack("nodes.host")
    for platform in ("linux", "win32", "darwin"):
        with patch.object(sys, "platform", platform):
            host._malloc_trim.cache_clear()
            host.return_memory()
    host._malloc_trim.cache_clear()
