"""On a CPU with units for bfloat16, weights that are stored in it are computed in it; and what that changes."""

import json
from pathlib import Path

import pytest
import torch
from dense_rollout import relative
from safetensors.torch import load_file, save_file

import decaf
from decaf import devices
from decaf.attention.fusion import frame_fusion, object_background_fusion
from decaf.clips import clip_from_images
from decaf.demo import MLLM_FOLDER
from decaf.demo.scenes import make_scene
from decaf.mllm.folder import stored_dtype

CPU = torch.device("cpu")


def stored(folder: Path, where: Path, dtype: torch.dtype) -> Path:
    """The model with its weights in another format."""
    where.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (where / file.name).write_bytes(file.read_bytes())
    weights = {name: one.to(dtype) for name, one in load_file(folder / "model.safetensors").items()}
    save_file(weights, where / "model.safetensors", {"format": "pt"})
    return where


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_a_model_is_computed_in(mllm_folder, tmp_path, monkeypatch, fast, dtype):
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: fast)
    folder = stored(mllm_folder("qwen2_5_vl"), tmp_path / "model", dtype)
    assert stored_dtype(folder) == dtype
    expected = torch.bfloat16 if fast and dtype == torch.bfloat16 else torch.float32
    assert decaf.load_mllm(folder).engine.dtype == expected
    assert decaf.load_mllm(folder, dtype=torch.float32).engine.dtype == torch.float32, "who asks for it, gets it"


def test_the_machine_is_asked():
    """PyTorch's own word, where it has one."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or not hasattr(torch.cpu, "_is_amx_tile_supported"):
        pytest.skip("the system, or this PyTorch, does not tell")
    assert devices.cpu_multiplies_bfloat16() == (" amx_tile " in flags.read_text())


def test_a_folder_that_does_not_tell(tmp_path):
    assert stored_dtype(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert stored_dtype(tmp_path) is None
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert stored_dtype(tmp_path) is None


@pytest.mark.slow
def test_maps_of_the_bundled_model_change_by_rounding_alone():
    """bfloat16 has 8 bits: a map's cells are off by a few hundredths of its largest one, and the strongest ones are where they were."""
    single, half = (decaf.load_mllm(MLLM_FOLDER, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for seed in (900000, 900001, 900002):
        scene = make_scene(seed, length=8)
        clip, query = clip_from_images(torch.from_numpy(scene.frames)), scene.queries[0].text
        pairs = [decaf.extract_attention(mllm, clip, query) for mllm in (single, half)]
        raw = [torch.cat([one.video.flatten(), one.frame.flatten()]) for pair in pairs for one in pair]
        assert relative(raw[2], raw[0]) < 0.05 and relative(raw[3], raw[1]) < 0.05
        fused = [frame_fusion(object_background_fusion(*pair)).map for pair in pairs]
        assert (fused[0] - fused[1]).abs().max() < 0.1
        assert abs(pairs[0][0].presence - pairs[1][0].presence) < 0.05
