"""A base directory for ComfyUI with tiny models, a clip and a picture."""

from __future__ import annotations

from pathlib import Path

import recorded_sam3
import small_core
import tiny_models
import tiny_sam2
from make_workflows import red_square
from PIL import Image

from decaf.clips import write_video


def make_base(base: Path) -> Path:
    """Fills the folder `base`: models with tiny ones, ComfyUI's own among them, input with a clip and a picture. Returns it."""
    for family in tiny_models.FAMILIES:
        tiny_models.make_mllm(base / "models" / "LLM" / f"tiny_{family}", family)
    small_core.make_all(base / "models")
    small_core.make_pack(base / "custom_nodes", base / "models")
    recorded_sam3.make_pack(base / "custom_nodes")
    (base / "models" / "sam2").mkdir()
    tiny_sam2.make_sam2(base / "models" / "sam2" / "tiny_sam2.safetensors")
    (base / "input").mkdir()
    clip = red_square(12, 72, 96)
    write_video(base / "input" / "clip.mp4", clip, 12, (72, 96))
    Image.fromarray(clip[0].numpy()).save(base / "input" / "example.png")
    return base
