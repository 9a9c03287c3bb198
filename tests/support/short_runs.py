"""A short run of the command with tiny models: the clip, what was written, and a meter of its own."""

import json

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

FRAMES, SIZE, KEYS = 9, (96, 128), 4


def picture(index: int) -> torch.Tensor:
    """A red square that moves over a blue slope."""
    frame = torch.zeros(*SIZE, 3, dtype=torch.uint8)
    frame[..., 2] = torch.linspace(40, 200, SIZE[1]).to(torch.uint8)
    frame[30:60, 8 + 8 * index : 38 + 8 * index] = torch.tensor([220, 30, 30], dtype=torch.uint8)
    return frame


def read(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def masks(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def check_whole(out):
    """Every file that bears its final name is whole, and nothing says that the run was finished unless it was."""
    from decaf.clips import open_clip
    from decaf.command.attention_file import load_attention

    for path in out.rglob("[!.]*"):
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".mp4":
            assert len(open_clip(path)) == FRAMES
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                made_from = json.loads(file.metadata()["made_from"])
            assert load_attention(path, made_from) is not None
        elif path.suffix == ".json":
            assert len(masks(out / "masks")) == read(out)["clip"]["frames"]


class Meter:
    """Counts by itself what the models are given."""

    def __init__(self, monkeypatch):
        from decaf.command import segment as command  # heavy, and conftest.py imports this file

        self.frames = self.prefilled = self.sam2 = 0
        load_mllm, load_segmenter = command.load_mllm, command.load_segmenter

        def mllm(*args, **kwargs):
            loaded = load_mllm(*args, **kwargs)
            loaded.engine.text_tower.layers[0].register_forward_hook(self.layer, with_kwargs=True)
            return loaded

        def sam2(*args, **kwargs):
            loaded = load_segmenter(*args, **kwargs)
            with loaded.segmenter():  # which tries its steps on a picture of its own, once per model
                pass
            loaded.model.image_encoder.trunk.patch_embed.register_forward_hook(self.image)
            return loaded

        monkeypatch.setattr(command, "load_mllm", mllm)
        monkeypatch.setattr(command, "load_segmenter", sam2)

    def layer(self, module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        self.prefilled += hidden.shape[:2].numel()

    def image(self, module, args, output):
        self.sam2 += len(args[0])
