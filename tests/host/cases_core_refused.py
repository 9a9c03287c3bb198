"""Text encoders that cannot be used, as CLIPs and as files: each is refused by name, with the reason and what works. Run by inside.py."""

import json
import logging
import struct
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import comfy.model_management as mm
import comfy.ops
import torch
from core_kit import clip, clip_of, extract, models
from kit import NODES, error_of, images, module, refused
from safetensors.torch import load_file, save_file
from small_core import FILES, folder_of, shrunk

FEW = {"frames": images(2), "query": "the bright square", "max_key_frames": 2}


def refusal(mllm, **inputs) -> str:
    return error_of("ExtractRolloutAttention", mllm=mllm, **(FEW | inputs))


def holding(transformer):
    """A CLIP around one of ComfyUI's own models, as its loaders nest them."""
    holder = torch.nn.Module()
    holder.transformer = transformer
    patcher = SimpleNamespace(load_device=torch.device("cpu"))
    return SimpleNamespace(cond_stage_model=holder, patcher=patcher, tokenizer=SimpleNamespace(clip="words", words=None))


def made(cls):
    """In its real size, without memory."""
    return cls({}, torch.float32, "meta", comfy.ops.manual_cast)


def case_core_other_text_encoders_are_refused_by_name():
    from comfy.text_encoders import gemma4, llama, minimax, qwen35, t5

    t5_numbers = json.loads(Path(t5.__file__).with_name("t5_config_base.json").read_text())
    expected = {
        "a Gemma: its layers look back through sliding windows": lambda: made(llama.Gemma2_2B),
        "a Gemma 3: most of its layers look back through sliding windows": lambda: made(llama.Gemma3_4B_Vision),
        "a Gemma 4: its layers look back": lambda: made(gemma4.Gemma4_12B),
        "a Qwen3.5: most of its layers have linear attention": lambda: made(qwen35.Qwen35),
        "OmniGen2's Qwen2.5-VL 3B: ComfyUI loads it without its vision tower": lambda: made(llama.Qwen25_3B),
        "a Qwen3: it sees no pictures": lambda: made(llama.Qwen3_4B),
        "a Mistral: it sees no pictures": lambda: made(llama.Mistral3Small24B),
        "a Llama: it sees no pictures": lambda: made(llama.Llama2),
        "a T5: it is no chat model": lambda: t5.T5(t5_numbers, torch.float32, "meta", comfy.ops.manual_cast),
        "MiniMax H3's Qwen3-VL 32B: only the first 50 of its 64 layers": lambda: made(minimax.MiniMaxQwen3VL),
        "of the kind Module: it is not known": lambda: torch.nn.Linear(1, 1),
    }
    for words, make in expected.items():
        message = refusal(holding(make()))
        assert message.startswith(f"The CLIP that is connected is {words}"), message
        assert "Qwen2.5-VL 7B" in message and "Qwen3-VL 4B" in message and "Load Multimodal LLM" in message


def case_core_clip_models_are_refused_by_name():
    """The smallest CLIP there is, through ComfyUI's own wrappers."""
    from comfy import sd1_clip

    numbers = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "hidden_act": "quick_gelu"}
    model = sd1_clip.SD1ClipModel(model_options={"clip_l_model_config": numbers | {"max_position_embeddings": 77, "vocab_size": 99}})
    assert "a CLIP text model: it is no chat model" in refusal(holding(model))


def case_core_multimodal_file_that_was_loaded_as_text_is_told():
    import nodes

    for name in ("qwen3_vl_4b", "qwen3_vl_8b"):
        with shrunk(models() / "LLM" / folder_of(name)):
            loaded = nodes.CLIPLoader().load_clip(FILES[name], "flux2")[0]
        message = refusal(loaded)
        assert FILES[name] in message and "leaves out its vision tower" in message and "qwen_image" in message, message


def case_core_what_is_no_clip_is_refused():
    for value in (5, "a text", object(), SimpleNamespace(tokenizer=None)):
        message = refusal(value)
        assert "'mllm'" in message and "Load Multimodal LLM or Load CLIP" in message


def case_core_control_tokens_in_a_query_are_refused():
    for token in ("<|vision_start|>", "<|video_pad|>", "<|im_end|>"):
        assert token in refusal(clip("qwen3_vl_8b"), query=f"the dog {token}")


def case_core_a_cpu_beside_a_gpu_is_told():
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger(module("nodes.core_mllm").__name__)
    logger.addHandler(handler)
    try:
        module("nodes.core_mllm").managed(clip("qwen3_vl_8b"))
        assert not told
        with patch.object(mm, "get_torch_device", lambda: torch.device("cuda", 0)):
            module("nodes.core_mllm").managed(clip("qwen3_vl_8b"))
    finally:
        logger.removeHandler(handler)
    (line,) = told
    assert FILES["qwen3_vl_8b"] in line and "on the CPU, although there is a cuda:0" in line and "--lowvram" in line


def case_core_float16_is_never_computed_in():
    """Also where ComfyUI would choose it, and where the file is stored so."""
    tensors = {key: value.half() for key, value in load_file(models() / "text_encoders" / FILES["qwen3_vl_8b"]).items()}
    save_file(tensors, models() / "text_encoders" / "half.safetensors")
    loaded = clip_of("qwen3_vl_8b", "half.safetensors")
    assert module("nodes.core_mllm").managed(loaded).value.engine.dtype == torch.float32
    assert extract(loaded, **FEW)[0][0].video.isfinite().all()
    with patch.object(mm, "should_use_bf16", lambda *_, **__: True):
        assert module("nodes.core_mllm").managed(loaded).value.engine.dtype == torch.bfloat16


# -- files -----------------------------------------------------------------------------------------------------------------------------


def write_header(name, tensors, *, cut=0):
    """A safetensors file of `tensors` (name -> dtype, shape, bytes of a number) whose numbers are a hole. `cut`: bytes that are missing."""
    entries, offset = {}, 0
    for key, (dtype, shape, width) in tensors.items():
        size = width
        for side in shape:
            size *= side
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    path = models() / "text_encoders" / name
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset - cut)
    return path


def published(family, width, layers=36, dtype=("F8_E4M3", 1)):
    """Names and shapes of a published file: enough of them to know it by, and its size."""
    if family == "Qwen2.5-VL":
        tower, text = {"visual.merger.ln_q.weight": ("BF16", (1280,), 2)}, "model."
        more = {"lm_head.weight": ("BF16", (152064, width), 2), "model.layers.0.self_attn.k_proj.bias": ("BF16", (512,), 2)}
    else:
        tower, text, more = {"model.visual.deepstack_merger_list.0.norm.weight": ("BF16", (4096,), 2)}, "model.language_model.", {}
        tower |= {"model.visual.merger.linear_fc2.weight": ("BF16", (width, 4096), 2)}
    numbers = {f"{text}layers.{layer}.mlp.{part}_proj.weight": (dtype[0], (4 * width, width), dtype[1]) for layer in range(layers) for part in "ab"}
    return {f"{text}layers.0.input_layernorm.weight": ("BF16", (width,), 2), **tower, **more, **numbers}


def case_core_files_are_known_by_their_headers_alone():
    offered = {
        "one.safetensors": (published("Qwen2.5-VL", 3584), "Qwen2.5-VL 7B, fp8, 4.8 GB"),
        "two.safetensors": (published("Qwen3-VL", 2560, dtype=("BF16", 2)), "Qwen3-VL 4B, bf16, 3.8 GB"),
        "three.safetensors": (published("Qwen3-VL", 4096, dtype=("I8", 1)), "Qwen3-VL 8B, int8, 4.9 GB"),
        "four.safetensors": (published("Qwen3-VL", 4096, dtype=("U8", 1)), "Qwen3-VL 8B, 4 bit, 4.9 GB"),
    }
    try:
        for name, (tensors, _) in offered.items():
            write_header(name, tensors)
        schema = NODES["LoadMLLM"].GET_SCHEMA()
        for name, (_, words) in offered.items():
            assert name in schema.inputs[0].options and f"{name}: {words}." in schema.inputs[0].tooltip, schema.inputs[0].tooltip
            assert NODES["LoadMLLM"].validate_inputs(model=name) is True
    finally:
        for name in offered:
            (models() / "text_encoders" / name).unlink(missing_ok=True)


def case_core_files_that_cannot_be_used_are_refused_by_name():
    folder = models() / "text_encoders"
    write_header("half_there.safetensors", published("Qwen3-VL", 2560), cut=10**9)
    write_header("text_only.safetensors", {"model.layers.0.input_layernorm.weight": ("BF16", (2560,), 2)})
    write_header("clip_l.safetensors", {"text_model.encoder.layers.0.mlp.fc1.weight": ("F16", (3072, 768), 2)})
    write_header("omnigen.safetensors", published("Qwen2.5-VL", 2048))
    write_header("two_b.safetensors", published("Qwen3-VL", 2048))
    write_header("h3.safetensors", published("Qwen3-VL", 5120))
    (folder / "gguf.safetensors").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    (folder / "page.safetensors").write_bytes(b"<!DOCTYPE html>" * 40)
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "list.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]" + bytes(8))
    (folder / "odd.safetensors").write_bytes(struct.pack("<Q", 9) + b'{"a": 5} ' + bytes(8))
    words = {"dtype": ["BF16"], "shape": [2560], "data_offsets": [0, "x"]}
    names = ("model.language_model.layers.0.input_layernorm.weight", "model.visual.deepstack_merger_list.0.norm.weight")
    header = json.dumps({names[0]: words, names[1]: {**words, "data_offsets": [0, 5120]}}).encode()
    (folder / "words.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    torch.save({}, folder / "old.bin")
    expected = {
        "half_there.safetensors": "is not complete: it has 0.91 of 1.91 GB",
        "text_only.safetensors": "no vision tower",
        "clip_l.safetensors": "no vision tower",
        "omnigen.safetensors": "is Qwen2.5-VL 3B, which ComfyUI loads without its vision tower",
        "two_b.safetensors": "is Qwen3-VL 2B, which ComfyUI does not load",
        "h3.safetensors": "only the first 50 of 64 layers",
        "gguf.safetensors": "is no safetensors file",
        "page.safetensors": "is no safetensors file",
        "empty.safetensors": "is no safetensors file",
        "list.safetensors": "is no safetensors file",
        "odd.safetensors": "is no safetensors file",
        "words.safetensors": "is no safetensors file",
        "old.bin": "is no safetensors file. Load it with Load CLIP",
    }
    try:
        options = NODES["LoadMLLM"].GET_SCHEMA().inputs[0].options
        assert "half_there.safetensors" in options and not {"text_only.safetensors", "gguf.safetensors", "clip_l.safetensors"} & set(options)
        for name, words in expected.items():
            message = refused("LoadMLLM", model=name)
            assert message.startswith(name) and words in message, message
            assert error_of("LoadMLLM", model=name) == message
    finally:
        for name in expected:
            (folder / name).unlink()


def case_core_a_file_that_comfyui_cannot_load_is_told():
    """Weights of another shape than ComfyUI's class has, and a file that lacks some."""
    name = "qwen3_vl_8b"
    tensors = load_file(models() / "text_encoders" / FILES[name])
    key = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight"))
    folder = models() / "text_encoders"
    save_file(tensors | {key: torch.zeros(3, 3)}, folder / "other_shape.safetensors")
    save_file({other: value for other, value in tensors.items() if other != key}, folder / "lacking.safetensors")
    with shrunk(models() / "LLM" / folder_of(name)):
        message = error_of("LoadMLLM", model="other_shape.safetensors")
        assert "ComfyUI could not load other_shape.safetensors" in message and "Update ComfyUI" in message, message
        message = error_of("LoadMLLM", model="lacking.safetensors")
        assert "lacking.safetensors lacks 1 of" in message and "layers.1.mlp.up_proj.weight" in message, message
    assert "lacks 1 of" in refusal(clip_of(name, "lacking.safetensors"))


def case_core_default_of_the_loader_can_be_loaded():
    import folder_paths

    empty = [str(models() / "nothing_here")]
    kept = folder_paths.folder_names_and_paths["LLM"]
    write_header("aaa.safetensors", published("Qwen3-VL", 2560), cut=5)
    folder_paths.folder_names_and_paths["LLM"] = (empty, set())
    try:
        combo = NODES["LoadMLLM"].FINALIZE_SCHEMA().inputs[0]
        assert combo.options[0] == "aaa.safetensors" != combo.default and combo.default.endswith(".safetensors")
        assert NODES["LoadMLLM"].validate_inputs(model=combo.default) is True
    finally:
        folder_paths.folder_names_and_paths["LLM"] = kept
        (models() / "text_encoders" / "aaa.safetensors").unlink()
