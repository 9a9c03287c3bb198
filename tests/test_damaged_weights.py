"""Weights that are not numbers, and files of another model beside them: told when the model is loaded, or after the first pictures."""

import json
import re
import shutil

import pytest
import torch
from random_clips import clip_of
from safetensors.torch import load_file, save_file
from slow import EACH_FAMILY

from decaf.attention.extract import extract_attention
from decaf.errors import DecafError
from decaf.mllm import load_mllm
from decaf.report import Report

every_family = pytest.mark.parametrize("family", EACH_FAMILY)


@pytest.fixture
def copy(tmp_path, mllm_folder):
    """copy(family, spoil): a folder whose weights went through `spoil`, a function of their dictionary."""

    def copied(family, spoil=lambda weights: None):
        folder = shutil.copytree(mllm_folder(family), tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        spoil(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copied


def named(weights, *patterns):
    return next(name for name in sorted(weights) if all(re.search(pattern, name) for pattern in patterns))


@every_family
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["one number of a norm", "a whole matrix", "a whole matrix of the vision tower"])
def test_spoilt_weights_are_told_when_they_are_loaded(copy, family, kind, number):
    def spoil(weights):
        if kind == "one number of a norm":
            weights[named(weights, r"input_layernorm.weight", r"layers\.2\.")][5] = number
        elif kind == "a whole matrix":
            weights[named(weights, r"down_proj", r"layers\.3\.")][:] = number
        else:
            tower = [name for name in weights if re.search(r"vis", name) and weights[name].ndim > 1]
            weights[sorted(tower)[-1]][:] = number

    with pytest.raises(DecafError, match="damaged: its weight .* not finite .*Download it again"):
        load_mllm(copy(family, spoil))


@every_family
@pytest.mark.parametrize("where", ["text", "vision"])
def test_a_single_spoilt_number_is_told_after_the_first_pictures(copy, family, where):
    def spoil(weights):
        pattern = r"layers\.0\..*v_proj.weight" if where == "text" else r"(visual|vision).*(fc2|down_proj).weight"
        weights[named(weights, pattern)][0, 0] = float("nan")

    mllm, report = load_mllm(copy(family, spoil)), Report()
    with pytest.raises(DecafError, match="its weights are damaged, or those of a LoRA on it: download the file again"):
        extract_attention(mllm, clip_of(4), "the dog", tokens_per_frame=40, progress=report)
    assert report.counts["forward_passes"] == 1 and "frames_encoded_image" not in report.counts


def test_looking_at_them_reads_little(mllm_folder, monkeypatch):
    """A row of each matrix: to look at all would take longer than to load them."""
    looked, plain = [], torch.Tensor.isfinite
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: looked.append(tensor.numel()) or plain(tensor))
    model = load_mllm(mllm_folder("qwen2_5_vl")).model
    assert len(looked) == len(list(model.parameters()))
    assert sum(looked) < 0.05 * sum(weight.numel() for weight in model.parameters())


@every_family
@pytest.mark.parametrize("file", ["preprocessor_config.json", "video_preprocessor_config.json"])
def test_picture_files_of_another_model(copy, family, file):
    folder = copy(family)
    path = folder / file
    if not path.exists():  # some are published without one for videos
        shutil.copy(folder / "preprocessor_config.json", path)
    given = json.loads(path.read_text())
    for name in [name for name in ("patch_size", "merge_size", "temporal_patch_size") if name in given] or ["size"]:
        other = {"height": 336, "width": 336} if name == "size" else given[name] + 2
        path.write_text(json.dumps(given | {name: other}))
        with pytest.raises(DecafError, match=rf"{file} is that of another model: it gives .* {336 if name == 'size' else other}, and config.json"):
            load_mllm(folder)
    path.write_text(json.dumps({name: value for name, value in given.items() if not name.endswith("size")}))
    load_mllm(folder)  # a file that says nothing of it is as good as none


def test_a_configuration_that_only_transformers_5_reads(copy, monkeypatch):
    """Version 4 would take its own default for the rotary embedding, which no model of the family has."""
    folder = copy("qwen2_5_vl")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling")}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(DecafError, match="saved for transformers 5, and 4.57.6 is installed.*pip install --upgrade transformers"):
        load_mllm(folder)
