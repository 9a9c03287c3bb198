"""Tiny models of the families that ComfyUI has classes of its own for: a folder for transformers, and the same weights as one file for ComfyUI.

ComfyUI tells the files by their names and a few shapes, so these have the published ones where it looks: heads of 128, four key and value heads, or
a decoder of a certain width. Their other sizes ComfyUI has in its code. `shrunk` gives it others, in ComfyUI's Python, so that its own loader makes
a model of a small file: the classes, their forward passes, detection and loading stay ComfyUI's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

SHAPES = {
    "qwen2_5_vl": {"layers": 4, "heads": 8, "kv_heads": 4, "hidden": 1024, "text": {"intermediate_size": 128}},
    "qwen3_vl_4b": {"layers": 3, "heads": 4, "kv_heads": 2, "hidden": 2560, "text": {"intermediate_size": 64, "head_dim": 128}},
    "qwen3_vl_8b": {"layers": 4, "heads": 4, "kv_heads": 2, "hidden": 256, "text": {"head_dim": 128}},
}
"""Arguments of `tiny_models.make_mllm` by the model's name."""

FILES = {name: f"small_{name}.safetensors" for name in SHAPES}
"""In models/text_encoders, by the model's name."""

TIED = ("qwen3_vl_4b",)
"""Those whose output matrix is their table of embeddings."""

TOKENIZER = "tokenizer"
"""Attribute of ComfyUI's tokenizers that holds the plain one."""


def folder_of(name: str) -> str:
    """In models/LLM."""
    return f"core_{name}"


def make_all(models: Path) -> None:
    """All of them in the folder `models` of a ComfyUI. Runs in the tests' Python."""
    import tiny_models
    from safetensors.torch import load_file, save_file

    (models / "text_encoders").mkdir(parents=True, exist_ok=True)
    for name, shape in SHAPES.items():
        family = name.removesuffix("_4b").removesuffix("_8b")
        if family not in tiny_models.FAMILIES:  # not in this version of transformers
            continue
        folder = tiny_models.make_mllm(models / "LLM" / folder_of(name), family, **shape)
        if name in TIED:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tensors = load_file(folder / "model.safetensors")
        if name in TIED:
            del tensors["lm_head.weight"]
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        # ComfyUI computes some of Qwen3-VL's position embeddings in the format that they are stored in.
        save_file({name: tensor.float() for name, tensor in tensors.items()}, models / "text_encoders" / FILES[name])


def make_pack(custom_nodes: Path, models: Path) -> None:
    """A pack for ComfyUI's server that shrinks its classes when it starts."""
    pack = custom_nodes / "small_core_for_tests"
    pack.mkdir(parents=True, exist_ok=True)
    folders = [str(models / "LLM" / folder_of(name)) for name in SHAPES if (models / "LLM" / folder_of(name)).exists()]
    lines = ("import sys", f"sys.path.append({str(Path(__file__).parent)!r})", "from small_core import shrink", f"shrink(*{folders!r})")
    (pack / "__init__.py").write_text("\n".join((*lines, "NODE_CLASS_MAPPINGS = {}", "")), encoding="utf-8")


@contextmanager
def shrunk(*folders: Path) -> Iterator[None]:
    """Within it ComfyUI's classes have the sizes, and its tokenizers the words, of the tiny models in the folders (one of each class)."""
    with ExitStack() as stack:
        for folder in folders:
            for change in changes(folder):
                stack.enter_context(change)
        yield


def shrink(*folders: Path) -> None:
    """The same for good."""
    for folder in folders:
        for change in changes(folder):
            change.start()


def changes(folder: Path) -> list:
    """What is to be patched for the model in a folder."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    of = {"qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl}[config["model_type"]]
    return of(config, Path(folder))


def _text(config: dict) -> dict:
    """Arguments of a dataclass of ComfyUI."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rope_theta")
    return {name: config[name] for name in names}


def _other_defaults(cls: type, **values):
    return lambda **given: cls(**{**values, **given})


def _plain_tokenizer(folder: Path, cls: type):
    """`cls` with the words of the tiny model."""
    whole = cls.__init__

    def init(self, *args, **kwargs):
        from transformers import Qwen2Tokenizer

        whole(self, *args, **kwargs)
        setattr(self, TOKENIZER, Qwen2Tokenizer.from_pretrained(folder, trust_remote_code=False))

    return patch.object(cls, "__init__", init)


def _qwen2_5_vl(config: dict, folder: Path) -> list:
    from comfy.text_encoders import llama, qwen_image, qwen_vl

    tower = config["vision_config"]
    whole = qwen_vl.Qwen2VLVisionTransformer

    def small(hidden_size, **given):
        sizes = {"hidden_size": tower["hidden_size"], "intermediate_size": tower["intermediate_size"]}
        made = whole(**sizes, num_heads=tower["num_heads"], num_layers=tower["depth"], **given)
        made.fullatt_block_indexes = tower["fullatt_block_indexes"]
        return made

    return [
        patch.object(llama, "Qwen25_7BVLI_Config", _other_defaults(llama.Qwen25_7BVLI_Config, **_text(config))),
        patch.object(qwen_vl, "Qwen2VLVisionTransformer", small),
        _plain_tokenizer(folder, qwen_image.Qwen25_7BVLITokenizer),
    ]


def _qwen3_vl(config: dict, folder: Path) -> list:
    from comfy.text_encoders import llama, qwen3vl

    tower, text = config["vision_config"], config["text_config"]
    name = "qwen3vl_4b" if config["tie_word_embeddings"] else "qwen3vl_8b"
    own = {key: tower[key] for key in ("hidden_size", "intermediate_size", "depth", "deepstack_visual_indexes")}
    common = {key: tower[key] for key in ("num_heads", "num_position_embeddings")}
    text_only = name.replace("qwen3vl_", "Qwen3_").replace("b", "B") + "Config"  # what the type flux2 makes of the file
    return [
        patch.object(llama, text_only, _other_defaults(getattr(llama, text_only), **_text(text))),
        patch.dict(qwen3vl.QWEN3VL_CONFIGS, {name: _other_defaults(qwen3vl.QWEN3VL_CONFIGS[name], **_text(text))}),
        patch.dict(qwen3vl.QWEN3VL_VISION, {name: own}),
        patch.dict(qwen3vl.QWEN3VL_VISION_COMMON, common),
        _plain_tokenizer(folder, qwen3vl.Qwen3VLSDTokenizer),
    ]
