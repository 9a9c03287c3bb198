"""Folders of quantised weights. bitsandbytes needs a GPU; what it does to a model is stood in for by weights that refuse to be moved."""

import json

import pytest
import torch

from decaf.errors import DecafError
from decaf.mllm import load_mllm
from decaf.mllm.load import is_quantised


@pytest.fixture
def folder(mllm_folder, tmp_path):
    """A folder whose config.json says that its weights are quantised."""
    for file in mllm_folder("qwen2_5_vl").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """What transformers was asked for; it loads the weights unpacked, into a model that cannot be moved."""
    from transformers import AutoModelForImageTextToText

    load, seen = AutoModelForImageTextToText.from_pretrained, []

    def from_pretrained(folder, *, config, device_map=None, **options):
        seen.append(device_map)
        quantised = getattr(config, "quantization_config", None)
        for part in (config, config.get_text_config()):  # transformers 4 keeps it in both
            part.__dict__.pop("quantization_config", None)
        model, info = load(folder, config=config, **options)
        if quantised is not None:
            model.is_quantized = True
            model.to = lambda *_: pytest.fail("quantised weights were moved")
        return model, info

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    return seen


def test_quantised_weights_are_loaded_to_where_they_compute(folder, asked):
    mllm = load_mllm(folder, dtype=torch.bfloat16)
    assert asked == [{"": torch.device("cpu")}] and is_quantised(folder)
    assert mllm.device == torch.device("cpu") and mllm.engine.dtype == torch.bfloat16


def test_published_weights_are_loaded_as_before(mllm_folder, asked):
    load_mllm(mllm_folder("qwen2_5_vl"))
    assert asked == [None] and not is_quantised(mllm_folder("qwen2_5_vl"))


def test_without_the_package_the_package_is_named(folder):
    with pytest.raises(DecafError, match="bitsandbytes|accelerate"):
        load_mllm(folder)
