"""Models that ComfyUI loads in part: the same maps and masks, wherever the weights are. Each raises when something is wrong."""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import comfy.model_management as mm
import torch
from kit import SETTINGS, extract, images, prompts, run
from second_device import DEVICE, copied, second_device

FAMILIES = SETTINGS.get("families", ["qwen2_5_vl", "qwen2_vl", "internvl"])


@contextmanager
def small_card(free, state=mm.VRAMState.NORMAL_VRAM):
    """ComfyUI believes that it has a GPU of `free` bytes, none of which its own work takes."""
    with ExitStack() as stack, second_device():
        used = lambda: sum(loaded.model.loaded_size() for loaded in mm.current_loaded_models if loaded.device == DEVICE)  # noqa: E731
        left = lambda device=None, torch_free_too=False: (free - used(), 0) if torch_free_too else free - used()  # noqa: E731
        stack.enter_context(patch.object(mm, "get_torch_device", lambda: DEVICE))
        stack.enter_context(patch.object(mm, "get_free_memory", left))
        stack.enter_context(patch.object(mm, "vram_state", state))
        stack.enter_context(patch.object(mm, "minimum_inference_memory", lambda: 0))
        stack.enter_context(patch.object(mm, "extra_reserved_memory", lambda: 0))
        stack.enter_context(patch.object(mm, "soft_empty_cache", lambda *_: None))
        try:
            yield
        finally:
            mm.unload_all_models()


def maps(made, frames=3):
    object, background, _ = run(
        "ExtractRolloutAttention", mllm=made, frames=images(frames), query="the bright square", tokens_per_frame=16, max_key_frames=3
    ).args
    return [one for attention in (*object, *background) for one in (attention.video, attention.frame)]


def same(found, expected):
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def case_novram():
    for family in FAMILIES:
        expected = maps(run("LoadMLLM", model=f"tiny_{family}", dtype="fp32")[0])
        mm.unload_all_models()
        with small_card(1 << 30, mm.VRAMState.NO_VRAM):
            made = run("LoadMLLM", model=f"tiny_{family}", dtype="fp32")[0]
            got = maps(made)
            print(family, made._told, copied, same(got, expected))
