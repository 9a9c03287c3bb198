"""What every model family offers, and the loaded model that the rest of the library works with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..devices import allocated_bytes
from ..errors import DecafError
from .engine import Engine
from .streaming import Streaming

LONGEST_QUESTION_TOKENS = 4096
"""Tokens of one question, the chat's own words included. What a pass takes in memory grows with them, as it does with visual tokens."""


@dataclass(frozen=True)
class Layout:
    """How pictures stand in one or several prompts of the same shape; known without touching a pixel.

    `kind`: "video" (all frames in one prompt) or "image" (one prompt a frame). `grid`: (slots, rows, cols) of one prompt's visual tokens.
    `parts`: what stands in the prompt in the place of the pictures: text, and runs of visual tokens as their number. The first and the last
    text end at a control token of the model, so that the question's words cannot merge with them. `rest`: text between that and the
    question. `batch`: how many prompts. `frames`: how many pictures the vision tower encodes. `order`: (slots * rows * cols,) index in the
    prompt of each token, row by row of the grid; None where they stand like that already.
    """

    kind: str
    grid: tuple[int, int, int]
    parts: tuple[str | int, ...]
    batch: int
    frames: int
    rest: str = ""
    order: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Visual tokens of one prompt."""
        return math.prod(self.grid)

    def to_grid(self, row: Tensor) -> Tensor:
        """Values at the visual tokens in prompt order, (B, tokens), as maps (B, slots, rows, cols)."""
        if self.order is not None:
            row = row[:, self.order.to(row.device)]
        return row.view(-1, *self.grid)


@dataclass(frozen=True)
class Encoded:
    """What the vision tower made of the pictures. `tokens`: (batch, tokens, width), in prompt order. `deepstack`: tensors of that shape, level
    l of which is added to the visual tokens' hidden states behind decoder layer l."""

    tokens: Tensor
    deepstack: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class VisionShape:
    """Numbers of a vision tower that pictures are cut by. `patch`: side of a patch in pixels. `merge`: patches per side that one visual token
    is merged from. `frames_per_slot`: video frames that share a visual token. `slot_step`: position ids from one slot to the next.
    `tile`: side in pixels of tiles of a fixed size, None where pictures keep their own."""

    patch: int
    merge: int
    frames_per_slot: int = 1
    slot_step: float = 1
    tile: int | None = None

    @property
    def cell(self) -> int:
        """Side of the square of pixels that one visual token covers."""
        return self.patch * self.merge


class TowerLayer(NamedTuple):
    """What a layer of a vision tower holds of every patch at its most crowded moments, in widths of the tower. `attending`: in float32;
    `attending_in_half`: in half precision, where rotary embeddings are computed on float32 copies. `feeding`: beside the feed-forward layer's
    own, which are `inner` of its widths."""

    attending: float
    attending_in_half: float
    feeding: float
    inner: float


class Family(ABC):
    """One model family: how it is asked, how its visual tokens lie, and where they are. One file in `families` each."""

    name: str
    """Short, as in messages."""
    title: str
    """As in lists of what is supported."""
    model_types: tuple[str, ...]
    """`model_type` in config.json of the models it serves."""
    text_types: tuple[str, ...]
    vision_types: tuple[str, ...]
    """`model_type` of the towers' own configurations, where they name one. Others would build code that nobody has looked at."""
    repositories: tuple[str, ...]
    """Published models that are offered for download."""
    rank: int = 9
    """Place in lists: families whose models most people have come first."""

    start: str = ""
    """What every prompt begins with."""
    system: str = ""
    """What the models were told before the chat; a folder may say otherwise (see `decaf.mllm.folder.system_prompt`)."""
    system_turn: str = "<|im_start|>system\n{}<|im_end|>\n"
    """How that stands in the prompt, at {}."""
    opening: str
    """The user's turn up to the pictures, or to the question where there are none."""
    before_text: str = ""
    """What stands between that and a question without pictures."""
    closing: str
    """The prompt after the question, up to the answer."""
    answer_opening: str = ""
    """What is put behind the published prompt in models that think before they answer: an empty thought. Without it their next token is
    not the answer's first one: it would say nothing about yes or no, and would not look for the object."""
    visual_tokens: Mapping[str, str]
    """The visual token's text by the kind of prompt."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """By which colours 0..1 are normalised, where the model's folder does not say."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    """What its models can be computed in. Not float16 where activations pass its largest number, as in all that is built on Qwen's."""

    tower_layer: TowerLayer = TowerLayer(attending=10, attending_in_half=18, feeding=3, inner=2)
    """What a layer of its vision tower holds; these are the numbers of one with rotary embeddings and a plain feed-forward layer."""

    def of_folder(self, entries: Mapping[str, object], folder: Path) -> Family:
        """The family itself, or that variant of it which the models of a folder are, where their `model_type` does not tell. `entries`: of
        config.json. Only names are read."""
        return self

    @abstractmethod
    def vision_shape(self, config: object) -> VisionShape:
        """The numbers of a vision tower, from a configuration with the names of the published ones. DecafError for numbers that cannot be."""

    @abstractmethod
    def video_layout(self, shape: VisionShape, frame_size: tuple[int, int], seconds: Sequence[float], max_tokens: int) -> Layout:
        """Frames of `frame_size` (height, width), shown at `seconds`, as one video with at most `max_tokens` visual tokens a frame where the
        family lets one choose."""

    @abstractmethod
    def image_layout(self, shape: VisionShape, frame_size: tuple[int, int], batch: int, max_tokens: int) -> Layout:
        """Each of `batch` frames as an image in a prompt of its own, finer than in the video of the same `max_tokens`."""

    def coarse_image_layout(self, shape: VisionShape, frame_size: tuple[int, int], batch: int, max_tokens: int) -> Layout:
        """As `image_layout`, but as coarse as the frames in the video of the same `max_tokens`. This asks `image_layout` for a quarter of the
        tokens, which suits families whose images are twice as fine as their videos; those of another rule override it."""
        return self.image_layout(shape, frame_size, batch, max(1, max_tokens // 4))

    @abstractmethod
    def pixels(self, mllm: MLLM, layout: Layout, frames: Sequence[Tensor]) -> dict[str, Tensor]:
        """Arguments of the vision tower, CPU tensors, for (H, W, 3) uint8 frames that stand as in `layout`."""

    @abstractmethod
    def encode(self, mllm: MLLM, layout: Layout, pixels: Mapping[str, Tensor]) -> Encoded:
        """Runs the vision tower. `pixels`: as `pixels` gives them. Returns tokens (batch, tokens, width) on the engine's device, in the order of
        the prompt, and deepstack levels of the same shape."""

    def dtype_problem(self, dtype: torch.dtype) -> str | None:
        """Why its models cannot be computed in a format, and what to do; None where they can."""
        if dtype in self.dtypes:
            return None
        fine = " or ".join(str(one).removeprefix("torch.") for one in self.dtypes)
        return f"its activations pass that format's largest number. Choose {fine} as its dtype."

    def prepare(self, model: nn.Module) -> None:  # noqa: B027, most families need nothing
        """Called once when a model is loaded: what makes it faster and changes no result but for rounding. By default nothing."""

    @abstractmethod
    def position_ids(self, shape: VisionShape, visual: Tensor, layout: Layout | None) -> Tensor:
        """(axes, L) of a whole prompt, from the mask (L,) of its visual tokens."""


@dataclass
class MLLM:
    """A loaded multimodal LLM. Whoever owns it may move `model` between devices between calls, and sets the engine's `device` then.

    `mean`, `std`: by which its pictures are normalised. `system`: what it is told before the chat; empty for nothing. `memory_budget`: bytes of
    the device that it and its passes may take; then `streaming` brings the weights there layer by layer, and nobody else may move the model.
    """

    engine: Engine
    tokenizer: object
    family: Family
    name: str
    vision: VisionShape
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    system: str = ""
    memory_budget: int | None = None
    streaming: Streaming | None = None
    _lock: RLock = field(default_factory=RLock, repr=False, compare=False)

    @contextmanager
    def alone(self, check_cancelled: Callable[[], None]) -> Iterator[None]:
        """Within it no other thread runs the model: hooks on its layers, and what is streamed to them, belong to one pass at a time."""
        while not self._lock.acquire(timeout=0.1):
            check_cancelled()
        try:
            yield
        finally:
            self._lock.release()

    @property
    def model(self) -> nn.Module:
        return self.engine.model

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def streamable(self) -> list[nn.Module]:
        """Modules whose weights are read by their own forward pass alone, so that they may be brought to the device for just that. The others
        have to be there: libraries look positions up in their tables of embeddings themselves."""
        table = self.model.get_input_embeddings()
        return [module for module in self.model.modules() if module is table or not isinstance(module, nn.Embedding)]

    @property
    def layers(self) -> int:
        """Decoder layers of the text tower."""
        return self.engine.shape.layers

    @property
    def budget_left(self) -> int | None:
        """Bytes of the memory budget that are not taken yet; None where there is no budget."""
        return None if self.memory_budget is None else max(0, self.memory_budget - self._allocated)

    @property
    def _allocated(self) -> int:
        taken = allocated_bytes(self.device)
        return self.streaming.device_bytes if taken is None else taken

    def make_room(self, needed: int) -> None:
        """Where weights are streamed: keeps as many layers on the device as leave `needed` bytes of the budget for a pass. DecafError: the budget
        does not hold that and the two layers that are computed with and copied."""
        if self.streaming is None:
            return
        others = self._allocated - self.streaming.device_bytes
        room = self.memory_budget - others - needed
        if room < self.streaming.least_bytes:
            least = self.streaming.least_bytes + others + needed
            raise DecafError(
                f"The memory budget of {in_gb(self.memory_budget)} is too small for {self.name}: {in_gb(least)} are needed, {in_gb(needed)} of them "
                "for the attention of this clip. Raise the budget, lower the tokens per frame or the number of key frames, or choose a smaller "
                "model."
            )
        self.streaming.keep(room)

    def picture_ids(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Token ids (P,) of a prompt up to the end of its pictures, and which of them are visual tokens, (P,) bool."""
        visual = self.visual_token_id(layout.kind)
        ids: list[int] = []
        mask: list[bool] = []
        text = self._opening
        for part in layout.parts:
            if isinstance(part, str):
                text += part
                continue
            words = self._ids(text)
            ids += [*words, *[visual] * part]
            mask += [False] * len(words) + [True] * part
            text = ""
        words = self._ids(text)
        return torch.tensor(ids + words), torch.tensor(mask + [False] * len(words))

    def question_ids(self, layout: Layout | None, question: str) -> Tensor:
        """Token ids (n,) of what comes after the pictures: the question and the chat's words up to the answer; without pictures, of the
        whole prompt. DecafError: control tokens in the question, or too many tokens."""
        for token in self._control_tokens():
            if token in question:
                raise DecafError(f"The query contains {token}, a control token of {self.name}. Remove it.")
        before = self._opening + self.family.before_text if layout is None else layout.rest
        ids = self._ids(before + question + self.family.closing + self.family.answer_opening)
        if len(ids) > LONGEST_QUESTION_TOKENS:
            raise DecafError(
                f"A question has {len(ids):,} tokens for {self.name}; at most {LONGEST_QUESTION_TOKENS:,} are asked. Shorten the query or the "
                f"wording of the question, which begins: {question[:60]!r}."
            )
        return torch.tensor(ids)

    def _control_tokens(self) -> set[str]:
        """Texts that the tokenizer makes one token of wherever they stand. Some of them are not listed as special, but stand in brackets;
        what does not, such as runs of spaces, is ordinary text."""
        added = getattr(self.tokenizer, "get_added_vocab", dict)()
        bracketed = {token for token in added if token[:1] + token[-1:] in ("<>", "[]")}
        return {token for token in self.tokenizer.all_special_tokens if token} | set(self.family.visual_tokens.values()) | bracketed

    @property
    def _opening(self) -> str:
        told = self.family.system_turn.replace("{}", self.system) if self.system else ""
        return self.family.start + told + self.family.opening

    def visual_token_id(self, kind: str) -> int:
        """Id of the token that stands for a cell of a picture. DecafError if the tokenizer has none."""
        token = self.family.visual_tokens[kind]
        ids = self._ids(token)
        if len(ids) != 1:
            raise DecafError(
                f"The tokenizer of {self.name} has no token {token}, which stands for pictures. Its files are not of one model; "
                "download it again."
            )
        return ids[0]

    def _ids(self, text: str) -> list[int]:
        try:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        except Exception as error:  # what a damaged tokenizer raises is for it to choose
            raise DecafError(f"The tokenizer of {self.name} cannot be used ({type(error).__name__}: {error}). Download the model again.") from error
        if ids and not 0 <= min(ids) <= max(ids) < self.engine.shape.vocabulary:
            raise DecafError(
                f"The tokenizer of {self.name} gives the token {max(ids)}, and the model knows {self.engine.shape.vocabulary:,}. Its files are not "
                "of one model; download it again."
            )
        return ids


def in_gb(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def whole_number(config: object, name: str, low: int, high: int) -> int:
    """The entry `name` of a configuration, a whole number in low..high. DecafError if it is none."""
    value = getattr(config, name, None)
    if isinstance(value, list | tuple) and value and all(one == value[0] for one in value):  # (side, side)
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise DecafError(f"The model's config.json gives {value!r:.60} for {name}; it must be from {low} to {high}. Download the model again.")
    return value
