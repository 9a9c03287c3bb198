"""How the cases run nodes and make their inputs, inside ComfyUI's Python."""

import importlib
from dataclasses import replace
from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import InputImpl

NODES: dict = {}
SETTINGS: dict = {}
_MADE: dict = {}

IDS = {
    "LoadMLLM", "ExtractRolloutAttention", "ObjectBackgroundFusion", "FrameFusion", "AttentionToSAM2Prompts", "SAM2VideoPropagate",
    "DecAFLoadSAM2", "DecAFAttentionPreview", "DecAFTracksToMask", "DecAFSampleClip", "DecAFShowObjects",
    "DecAFCorrectObjects",
    "DecAFPickQuery", "DecAFPickTracks", "DecAFFrameOfVideo", "DecAFRefineMask", "DecAFApplyMask", "DecAFSaveCutOut",
}  # fmt: skip


# -- how a node is run -----------------------------------------------------------------------------------------------------------------


def module(name):
    """A module of the pack, such as "nodes.load"."""
    return importlib.import_module(f"pack_under_test.{name}")


def run(node, **inputs):
    """Executes a node the way ComfyUI does: on a locked clone of its class, with the defaults of inputs that are not given. `hidden`: what
    ComfyUI gives to hidden inputs, by their kind."""
    cls, hidden = NODES[node], inputs.pop("hidden", None)
    given = {item.id: item.default for item in cls.GET_SCHEMA().inputs if getattr(item, "default", None) is not None} | inputs
    with torch.inference_mode():
        return cls.PREPARE_CLASS_CLONE(hidden and {"hidden_inputs": hidden}).EXECUTE_NORMALIZED(**given)


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
    """(object, background, answers) of the first query."""
    return tuple(output[0] for output in extract_all(frames, family, **inputs)[:3])


def extract_all(frames, family="qwen2_5_vl", **inputs):
    """Lists of them and of the class names, one for each query."""
    inputs = {"query": "the bright square", "tokens_per_frame": 32, "max_key_frames": 4} | inputs
    return run("ExtractRolloutAttention", mllm=mllm(family), frames=frames, **inputs).args


def attention(length):
    """Object and background attention of images(length), extracted once."""
    if ("attention", length) not in _MADE:
        _MADE["attention", length] = extract(images(length))[:2]
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
