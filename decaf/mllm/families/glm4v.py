"""GLM-4.1V and GLM-4.6V-Flash: pictures on the grid of Qwen2-VL, each slot of a video between marks of its own with its time behind it, and a
thought before every answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..base import Family, Layout, VisionShape, whole_number
from ..folder import processor_classes
from .qwen3_vl import Qwen3VL
from .qwen_vl import LARGEST_CELL, QwenVL


class GLM4V(QwenVL):
    """The vision tower takes pixels as that of Qwen2-VL does; the prompt and the positions are the family's own."""

    name = "GLM-4.1V"
    title = "GLM-4.1V and GLM-4.6V-Flash"
    rank = 9
    model_types = ("glm4v", "glm46v")
    text_types = ("glm4v_text",)
    vision_types = ("glm4v_vision", "glm4v")  # transformers 4 wrote the latter
    repositories = ("zai-org/GLM-4.1V-9B-Thinking", "zai-org/GLM-4.6V-Flash")
    start = "[gMASK]<sop>"
    system = ""
    system_turn = "<|system|>\n{}"
    opening = "<|user|>\n"
    closing = "<|assistant|>\n"
    # The models answer in the form <think>...</think><answer>...</answer>. Their chat template has no switch for it.
    answer_opening = "<think></think><answer>"
    # Frames of a video stand at the token of images; <|video|> is only the place where they go.
    visual_tokens = {"video": "<|image|>", "image": "<|image|>"}

    def of_folder(self, entries: Mapping[str, object], folder: Path) -> Family:
        """Both generations are published with the same `model_type`; the processor tells which one it is."""
        later = entries["model_type"] == "glm46v" or any(one.startswith(("Glm46V", "Glmga")) for one in processor_classes(folder))
        return LATER if later else self

    def vision_shape(self, config: object) -> VisionShape:
        vision = config.vision_config
        merge = whole_number(vision, "spatial_merge_size", 1, 8)
        return VisionShape(
            whole_number(vision, "patch_size", 1, LARGEST_CELL // merge), merge, whole_number(vision, "temporal_patch_size", 1, 8)
        )

    def video_layout(self, shape: VisionShape, frame_size: tuple[int, int], seconds: Sequence[float], max_tokens: int) -> Layout:
        rows, cols = self._grid(shape, frame_size, max_tokens)
        times = [self._time(time) for time in seconds[:: shape.frames_per_slot]]
        parts: list[str | int] = ["<|begin_of_video|><|begin_of_image|>"]
        for time in times:
            parts += [rows * cols, f"<|end_of_image|>{time}<|begin_of_image|>"]
        parts[-1] = f"<|end_of_image|>{times[-1]}<|end_of_video|>"
        return Layout("video", (len(times), rows, cols), tuple(parts), 1, len(seconds))

    @staticmethod
    def _time(seconds: float) -> str:
        """When the first frame of a slot is shown, as the published processor writes it."""
        return str(int(seconds))

    @staticmethod
    def _layout(kind: str, grid: tuple[int, int, int], batch: int, frames: int) -> Layout:
        _, rows, cols = grid
        return Layout(kind, grid, ("<|begin_of_image|>", rows * cols, "<|end_of_image|>"), batch, frames)

    position_ids = Qwen3VL.position_ids
    """Every slot counts as a picture of its own, as in Qwen3-VL."""


class GLM46V(GLM4V):
    """Has a switch for thinking in its chat template, and times in tenths of a second."""

    name = "GLM-4.6V"
    closing = "/nothink<|assistant|>\n<think></think>\n"
    answer_opening = ""

    @staticmethod
    def _time(seconds: float) -> str:
        return f"{seconds:.1f} seconds"


FAMILY = GLM4V()
LATER = GLM46V()
