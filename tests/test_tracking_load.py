"""SAM 2 models from checkpoints: every official configuration, reduced ones, and files that are something else."""

import functools
import json
import sys
from pathlib import Path

import pytest
import tiny_sam2
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from decaf.errors import DecafError
from decaf.sam2 import load_sam2
from decaf.sam2.architecture import read_architecture
from decaf.sam2.build import WithoutMemory, build_model
from decaf.sam2.package import sam2_package

OFFICIAL = [f"{folder}_hiera_{size}.yaml" for folder in ("sam2/sam2", "sam2.1/sam2.1") for size in ("t", "s", "b+", "l")]


def official_model(name):
    """The package's own model of one of its configurations, with the post-processing that its video predictor is built with."""
    from hydra.utils import instantiate

    sam2_package()
    config = OmegaConf.load(Path(sys.modules["sam2"].__path__[0]) / "configs" / name).model
    config.binarize_mask_from_pts_for_mem_enc = True
    config.sam_mask_decoder_extra_args = {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    }
    return instantiate(config)


def plain(value):
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, functools.partial):
        return plain(dict(value.keywords))
    if hasattr(value, "items"):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) or type(value).__name__ == "ListConfig":
        return [plain(item) for item in value]
    return type(value).__name__


def description(model):
    """All that makes the model behave as it does but its weights: every module's class and its settings, and every weight's shape."""
    modules = {
        name: (
            type(module).__name__,
            {key: plain(value) for key, value in vars(module).items() if not key.startswith("_") and key != "cache"},
        )
        for name, module in model.named_modules()
    }
    return modules, {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_configuration_is_read_off_the_weights(monkeypatch, name):
    for init in ("kaiming_uniform_", "uniform_", "xavier_uniform_"):  # random numbers for 224 million weights, which nobody looks at
        monkeypatch.setattr(torch.nn.init, init, lambda tensor, *args, **more: tensor)
    official = official_model(name)
    weights = official.state_dict()
    ours = build_model(weights, read_architecture(weights, {}))
    with WithoutMemory():
        empty = build_model(weights, read_architecture(weights, {}))
    assert {name: value.shape for name, value in empty.state_dict().items()} == {name: value.shape for name, value in weights.items()}
    assert all(value.is_meta for value in empty.state_dict().values())
    for mine, theirs in zip(description(ours), description(official), strict=True):
        assert mine.keys() == theirs.keys()
        for key in theirs:
            assert mine[key] == theirs[key], key


@pytest.mark.parametrize("version", ["2", "2.1"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_reduced_model_equals_the_package(tmp_path, suffix, version):
    path = tiny_sam2.make_sam2(tmp_path / f"tiny{suffix}", 5, 64, version)
    ours = load_sam2(path)
    theirs = tiny_sam2.build(sam2_package().SAM2Base, 64, version)
    theirs.load_state_dict(tiny_sam2.random_weights(5, 64, version))
    assert description(ours.model.train()) == description(theirs)
    assert ours.image_size == 64 and ours.name.startswith(f"SAM {version} ")
    assert not any(p.requires_grad for p in ours.model.parameters())


def test_flat_and_half_precision_files(tmp_path):
    weights = tiny_sam2.random_weights(0, 64)
    settings = {"image_size": 64}
    torch.save(weights, tmp_path / "flat.pt")
    save_file({k: v.half() for k, v in weights.items()}, tmp_path / "half.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, tmp_path / "brain.safetensors")
    assert torch.equal(load_sam2(tmp_path / "flat.pt", settings=settings).model.no_mem_embed, weights["no_mem_embed"])
    for name, dtype in (("half", torch.float16), ("brain", torch.bfloat16)):
        ours = load_sam2(tmp_path / f"{name}.safetensors", settings=settings).model
        assert ours.no_mem_embed.dtype == torch.float32
        assert torch.equal(ours.no_mem_embed, weights["no_mem_embed"].to(dtype).float())


def test_decoder_of_another_size(tmp_path):
    """The package fixes the decoder's hidden sizes; a reduced model need not have them."""
    sam2 = sam2_package()
    model = tiny_sam2.build(sam2.SAM2Base, 64)
    model.sam_mask_decoder = sam2.MaskDecoder(
        transformer=sam2.TwoWayTransformer(depth=3, embedding_dim=64, num_heads=4, mlp_dim=96, attention_downsample_rate=1),
        transformer_dim=64,
        iou_head_depth=2,
        iou_head_hidden_dim=40,
        use_high_res_features=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        iou_prediction_use_sigmoid=True,
        use_multimask_token_for_obj_ptr=True,
        **model.sam_mask_decoder_extra_args,
    )
    save_file(model.state_dict(), tmp_path / "m.safetensors", metadata={"decaf.sam2": json.dumps({"image_size": 64, "decoder_heads": 4})})
    assert description(load_sam2(tmp_path / "m.safetensors").model.train()) == description(model)


def test_rules_for_what_nothing_tells(tmp_path):
    weights = tiny_sam2.random_weights(0, 64)
    settings = read_architecture(weights, {}).settings
    assert (settings.image_size, settings.num_heads, settings.decoder_heads) == (256, 1, 8)
    assert (settings.window_spec, settings.global_att_blocks) == ((8, 4, 8, 4), (4, 5))
    given = {"image_size": 96, "window_spec": [8, 8, 4, 4], "global_att_blocks": [], "num_heads": 2}
    settings = read_architecture(weights, given).settings
    assert (settings.image_size, settings.window_spec, settings.global_att_blocks, settings.num_heads) == (96, (8, 8, 4, 4), (), 2)


def test_settings_given_win_over_the_file(tmp_path):
    path = tiny_sam2.make_sam2(tmp_path / "m.safetensors", image_size=64)
    assert load_sam2(path, settings={"image_size": 128}).image_size == 128


@pytest.mark.parametrize(
    "given, words",
    [
        ({"imagesize": 64}, "Unknown SAM 2 setting 'imagesize'.*image_size"),
        ({"image_size": "64"}, "image_size.*'64'"),
        ({"window_spec": [8, 4.5]}, "window_spec"),
        ({"decoder_heads": 5}, "do not fit together"),
        ({"image_size": 100}, "image_size.*32"),
    ],
)
def test_settings_that_cannot_be(tmp_path, given, words):
    path = tiny_sam2.make_sam2(tmp_path / "m.safetensors", image_size=64)
    with pytest.raises(DecafError, match=words):
        load_sam2(path, settings=given)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path(self.target),))


def test_a_pickle_with_a_payload_does_not_run(tmp_path):
    payload = Payload()
    payload.target = str(tmp_path / "ran")
    torch.save({"model": {"weight": torch.zeros(1)}, "more": payload}, tmp_path / "evil.pt")
    with pytest.raises(DecafError, match="more than weights"):
        load_sam2(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def damaged(folder):
    """name -> (write the file, what the error says)"""
    tiny = tiny_sam2.random_weights(0, 64)
    whole = tiny_sam2.make_sam2(folder / "whole.safetensors").read_bytes()
    whole_pt = tiny_sam2.make_sam2(folder / "whole.pt").read_bytes()
    without = {k: v for k, v in tiny.items() if k != "no_obj_ptr"}
    lacking = {k: v for k, v in tiny.items() if k != "maskmem_tpos_enc"}
    wrong = {**tiny, "mask_downsample.weight": torch.zeros(1, 1, 2, 2)}
    sam1 = {"image_encoder.pos_embed": torch.zeros(1), "mask_decoder.iou_token.weight": torch.zeros(1)}
    renamed = {"vision_encoder.backbone.pos_embed": torch.zeros(1)}
    return {
        "cut.safetensors": (whole[: len(whole) // 2], "damaged"),
        "text.safetensors": (b"version https://git-lfs", "damaged"),
        "cut.pt": (whole_pt[: len(whole_pt) // 2], "damaged"),
        "text.pt": (b"version https://git-lfs", "damaged"),
        "empty.pt": (b"", "damaged"),
        "list.pt": ([1, 2], "list instead of weights"),
        "number.pt": ({"model": 1}, "int instead of weights"),
        "numbers.pt": ({"model": {"a": 1}}, "no weights"),
        "sam1.pt": (sam1, "SAM 1"),
        "renamed.pt": (renamed, "transformers"),
        "edgetam.pt": ({"spatial_perceiver.latents": torch.zeros(1), "memory_attention.layers.0.norm1.bias": torch.zeros(1)}, "EdgeTAM"),
        "other.pt": ({"layer.weight": torch.zeros(1)}, "'layer.weight'"),
        "lacking.pt": (lacking, "lacks.*maskmem_tpos_enc"),
        "without.pt": (without, "lacks.*no_obj_ptr|unknown"),
        "more.pt": ({**tiny, "ema.weight": torch.zeros(1)}, "unknown.*ema.weight"),
        "wrong.pt": (wrong, "shape.*mask_downsample.weight"),
        "settings.pt": ({"model": tiny, "decaf.sam2": "{"}, "not JSON"),
        "list_settings.pt": ({"model": tiny, "decaf.sam2": "[]"}, "not a JSON object"),
    }


def test_damaged_and_foreign_files(tmp_path):
    for name, (content, words) in damaged(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(DecafError, match=words) as caught:
            load_sam2(path)
        assert name in str(caught.value), name


def test_missing_file(tmp_path):
    with pytest.raises(DecafError, match="no SAM 2 checkpoint at .*nothing.pt"):
        load_sam2(tmp_path / "nothing.pt")
    with pytest.raises(DecafError, match="no SAM 2 checkpoint"):
        load_sam2(tmp_path)


def test_half_precision_is_autocast(tmp_path):
    ours = load_sam2(tiny_sam2.make_sam2(tmp_path / "m.pt", image_size=64), dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16 and next(ours.model.parameters()).dtype == torch.float32
