"""SAM 3's tracker in ComfyUI: found where other nodes keep it, loaded, and streamed."""

import shutil
from pathlib import Path
from unittest.mock import patch

import comfy.model_management as mm
import tiny_sam3
import torch
from cases_partial import MB, card, masks, pack, same, weights
from kit import NODES, SETTINGS, error_of, prompts, run
from safetensors.torch import load_file, save_file

NAME = "sam3_tiny.safetensors"


def models(folder: str) -> Path:
    path = Path(SETTINGS["base"]) / "models" / folder
    path.mkdir(exist_ok=True)
    return path


def sam3_file() -> Path:
    path = models("checkpoints") / NAME
    return path if path.exists() else tiny_sam3.write(tiny_sam3.make_tracker(1), path, "Meta")


def options() -> list[str]:
    return next(item for item in NODES["DecAFLoadSAM2"].FINALIZE_SCHEMA().inputs if item.id == "model").options


def load(precision="fp32"):
    sam3_file()
    return run("DecAFLoadSAM2", model=NAME, precision=precision)[0]


def case_sam3_is_found_where_other_nodes_keep_it():
    weights = load_file(sam3_file())
    save_file(weights, models("sam3") / "model.safetensors")
    save_file({"vision_model.weight": torch.ones(2)}, models("checkpoints") / "sam3_of_something_else.safetensors")
    save_file({**weights, "detector.backbone.vision_backbone.propagation_convs.0.conv_1x1.bias": torch.ones(1)},
              models("checkpoints") / "sam3.1_multiplex.safetensors")  # fmt: skip
    shutil.copyfile(sam3_file(), models("checkpoints") / "a_painter.safetensors")
    (models("sams") / "sam_vit_b.pth").write_bytes(b"SAM 1")
    (models("sams") / "sam3_broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not a header")
    found = options()
    assert NAME in found and "model.safetensors" in found
    for name in ("sam3_of_something_else.safetensors", "sam3.1_multiplex.safetensors", "a_painter.safetensors", "sam_vit_b.pth"):
        assert name not in found, name
    assert "sam3_broken.safetensors" not in found


def case_sam3_masks_a_clip():
    made = load()
    assert made.value.title == "SAM 3" and made.patcher is not None
    assert masks(made, prompts(3))[0].shape[0] == 3


def case_sam3_1_in_the_own_folder_is_refused_by_name():
    path = models("sam2") / "sam3.1.safetensors"
    save_file({**load_file(sam3_file()), "detector.backbone.vision_backbone.propagation_convs.0.conv_1x1.bias": torch.ones(1)}, path)
    message = error_of("DecAFLoadSAM2", model=path.name)
    assert path.name in message and "SAM 3.1" in message and "Pick Tracks" in message


def case_sam3_gives_the_same_masks_wherever_its_weights_are():
    given = prompts(3)
    with patch.object(pack("nodes.managed"), "make_streamable", lambda *_: None):
        expected = masks(load(), given)
    for state in (mm.VRAMState.NORMAL_VRAM, mm.VRAMState.NO_VRAM):
        with card(64 * MB, state):
            made = load()
            assert same(masks(made, given), expected), state
            there, whole = weights(made)
            assert there == whole if state == mm.VRAMState.NORMAL_VRAM else 0 < there < whole


def case_the_help_page_and_the_list_agree():
    """A folder that is looked into is named."""
    page = (Path(SETTINGS["pack"]) / "web" / "docs" / "DecAFLoadSAM2.md").read_text()
    assert all(f"models/{folder}" in page for folder in pack("nodes.segmenter_files").OTHERS)
    assert "SAM 3.1" in page


def case_the_names_are_those_of_comfyui_s_own_model():
    """ComfyUI builds SAM 3 under Meta's names, but for three parts of the mask decoder, which it renames as it loads."""
    import comfy.ops
    from comfy.ldm.sam3.detector import SAM3Model

    core = SAM3Model(device="meta", dtype=torch.float32, operations=comfy.ops.manual_cast, image_model="SAM3")
    named = {}
    for name, value in core.state_dict().items():
        if "sam_mask_decoder.transformer." in name:
            for ours, published in ((".mlp.0.", ".mlp.lin1."), (".mlp.2.", ".mlp.lin2."), (".norm_final.", ".norm_final_attn.")):
                name = name.replace(ours, published)
        named[name] = value
    names, build, encoder = (pack(f"decaf.sam3.{file}") for file in ("names", "build", "encoder"))
    assert names.whose(named) == names.META
    weights = names.our_weights(named, names.META)
    with build.WithoutMemory():
        model = build.build_sam3(weights, encoder.transformers_classes())
    expected = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in weights.items() if name in expected} == expected
    assert weights.keys() == expected.keys(), weights.keys() ^ expected.keys()
