"""What every model family offers, and the loaded model that the rest of the library works with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import DecafError


@dataclass(frozen=True)
class Visual:
    """Key frames as a model sees them, in one or several prompts of the same shape.

    `kind`: "video" (all frames in one prompt) or "image" (one prompt a frame). `pixels`: arguments of the vision tower, CPU tensors.
    `grid`: (slots, rows, cols) of the visual tokens of one prompt. `text`: what stands in the prompt in the place of the pictures.
    `order`: (slots * rows * cols,) places of the tokens in the prompt, row by row of the grid; None where they stand like that already.
    `prompts`: how many prompts; `frames`: how many pictures the vision tower encodes.
    """

    kind: str
    pixels: dict[str, Tensor]
    grid: tuple[int, int, int]
    text: str
    prompts: int
    frames: int
    order: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Visual tokens of one prompt."""
        slots, rows, cols = self.grid
        return slots * rows * cols

    def to_grid(self, row: Tensor) -> Tensor:
        """Values at the visual tokens in prompt order, (B, tokens), as maps (B, slots, rows, cols)."""
        if self.order is not None:
            row = row[:, self.order.to(row.device)]
        return row.view(-1, *self.grid)


class Family(ABC):
    """One model family: how it is asked, how its visual tokens lie, and where they are. One file in `families` each."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` in config.json of the models it serves."""

    @abstractmethod
    def video(self, mllm: MLLM, frames: Sequence[Tensor], max_tokens: int) -> Visual:
        """All frames, each (H, W, 3) uint8, as one video with at most `max_tokens` visual tokens a frame where the family lets one choose."""

    @abstractmethod
    def images(self, mllm: MLLM, frames: Sequence[Tensor], max_tokens: int) -> Visual:
        """Each frame as an image in a prompt of its own, finer than in the video of the same `max_tokens`."""

    @abstractmethod
    def placeholder(self, mllm: MLLM, kind: str) -> str:
        """What the chat template writes for one picture or video, to be replaced by `Visual.text`."""

    @abstractmethod
    def token_id(self, mllm: MLLM, kind: str) -> int:
        """Id of the visual token."""

    @abstractmethod
    def encode(self, mllm: MLLM, visual: Visual) -> Tensor:
        """Run the vision tower: (prompts, tokens, width), in prompt order."""

    def prepare(self, model: nn.Module) -> None:  # noqa: B027, most families need nothing
        """Called once when a model is loaded: what makes it faster and changes no result but for rounding. By default nothing."""

    @abstractmethod
    def positions(self, mllm: MLLM, visual_mask: Tensor, visual: Visual | None) -> Tensor:
        """`position_ids` of a whole prompt for the text tower, batch dimension 1, from the mask (L,) of its visual tokens."""


@dataclass
class MLLM:
    """A loaded multimodal LLM. Whoever owns it may move `model` between devices between calls; `device` follows."""

    model: nn.Module
    processor: object
    family: Family
    name: str

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def text_tower(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def layers(self) -> int:
        """Decoder layers of the text tower."""
        return self.model.config.get_text_config().num_hidden_layers

    def bytes_per_token(self, start_layer: int) -> int:
        """Rough upper bound of what a visual token takes beside the weights: keys and values of all layers, the queries and keys that the
        rollout needs of layers >= `start_layer`, a layer's passing tensors, and the vision tower's."""
        text, vision = self.model.config.get_text_config(), self.model.config.vision_config
        key_width = text.num_key_value_heads * self._head_width
        cache = 2 * key_width * text.num_hidden_layers
        captured = key_width * (self.layers - start_layer)
        passing = 8 * text.hidden_size + 3 * text.intermediate_size
        side = getattr(vision, "spatial_merge_size", 2)  # of the patches that one visual token is merged from
        seen = side * side * 16 * (getattr(vision, "embed_dim", None) or vision.hidden_size)
        rest = (cache + captured + passing + seen) * next(self.model.parameters()).element_size()
        return rest + self.query_bytes_per_token(start_layer)

    def query_bytes_per_token(self, start_layer: int) -> int:
        """What the queries of a token take that the rollout needs of layers >= `start_layer`."""
        heads = self.model.config.get_text_config().num_attention_heads
        return heads * self._head_width * (self.layers - start_layer) * next(self.model.parameters()).element_size()

    @property
    def _head_width(self) -> int:
        text = self.model.config.get_text_config()
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def prompt_ids(self, visual: Visual | None, question: str) -> Tensor:
        """Token ids (L,) of the prompt that asks `question` about the pictures, by the model's own chat template."""
        tokenizer = self.processor.tokenizer
        for token in tokenizer.all_special_tokens:
            if token in question:
                raise DecafError(f"The query contains {token}, a control token of {self.name}. Remove it.")
        content = [{"type": "text", "text": question}]
        if visual is not None:
            content.insert(0, {"type": visual.kind})
        try:
            text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program: it can fail in any way
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DecafError(f"The chat template of {self.name} cannot be used ({reason}). Download the model again.") from error
        if visual is not None:
            mark = self.family.placeholder(self, visual.kind)
            before, found, after = text.partition(mark)
            if not found:
                raise DecafError(f"The chat template of {self.name} has no place for a {visual.kind} ({mark}). Download the model again.")
            text = before + visual.text + after
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def resize(frame: Tensor, height: int, width: int) -> Image.Image:
    """(H, W, 3) uint8 -> PIL image of the given size, bicubic with antialiasing."""
    return Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def fit_grid(height: int, width: int, cell: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """(rows, cols) of square cells of `cell` pixels for a picture of height x width pixels: nearest to its own size and shape, with at least
    `min_tokens` (so that small pictures are enlarged) and at most `max_tokens` cells. Every shape is served, however long and thin."""
    rows, cols = max(1, round(height / cell)), max(1, round(width / cell))
    if rows * cols < min_tokens:
        grow = (min_tokens * cell * cell / (height * width)) ** 0.5
        rows, cols = max(1, math.ceil(height * grow / cell)), max(1, math.ceil(width * grow / cell))
    if rows * cols > max_tokens:
        shrink = (height * width / (max_tokens * cell * cell)) ** 0.5
        rows, cols = max(1, math.floor(height / shrink / cell)), max(1, math.floor(width / shrink / cell))
    cols = min(cols, max_tokens)
    return min(rows, max_tokens // cols), cols
