"""How much of a device a pass over the pictures may take: batches of key frames, and what happens when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from ..devices import is_out_of_memory, out_of_memory
from ..mllm import MLLM, Layout
from ..report import Report
from ..settings import MODES, AttentionSettings
from .rollout import BLOCK_BYTES

log = logging.getLogger(__name__)

ENOUGH_TOKENS = 8192
"""Visual tokens per batch that keep a GPU busy; larger batches gain no speed and only take memory from other models."""

ENOUGH_TOKENS_ON_CPU = 1024
"""Visual tokens per batch on a CPU; larger batches gain no speed. With a 3B model in float32 they take 0.8 GB."""


FEW_TEXT_TOKENS = 512
"""Tokens of questions that need no room of their own in a batch: those of several queries."""


def image_layout(mllm: MLLM, frame_size: tuple[int, int], batch: int, settings: AttentionSettings) -> Layout:
    """Each of `batch` key frames of (height, width) pixels as an image by itself, as fine as the settings say."""
    layout = mllm.family.coarse_image_layout if settings.is_fast else mllm.family.image_layout
    return layout(mllm.vision, frame_size, batch, settings.tokens_per_frame)


def memory_needed(mllm: MLLM, frames: int, frame_size: tuple[int, int], settings: AttentionSettings) -> int:
    """Bytes that the attention of a clip of so many frames, (height, width) each, needs on a device beside the weights.

    A pass over the longest prompt, and a block of attention rows with what comes of it. More makes larger batches, which are faster.
    """
    layers = mllm.layers
    start = layers // 2 if settings.start_layer is None else min(settings.start_layer, layers - 1)
    shown = min(frames, settings.shown_key_frames)
    video = mllm.family.video_layout(mllm.vision, frame_size, [0.0] * shown, settings.tokens_per_frame)
    image = image_layout(mllm, frame_size, 1, settings)
    per_token = mllm.bytes_per_token(start, keep=settings.setting != MODES[0])
    return (max(video.tokens, image.tokens) + FEW_TEXT_TOKENS) * per_token + 4 * BLOCK_BYTES["cuda"]


class Batches:
    """The batches of key frames that go through a model one after the other, and their retries.

    A batch is as large as half of the free memory allows, on a CPU as large as helps. It may always take as many tokens as the video did: it
    needs no more memory either. If memory runs out all the same, it is halved.
    """

    def __init__(self, mllm: MLLM, start_layer: int, report: Report, *, keep: bool):
        """`keep`: whether keys and values are kept of a pass. `report`: its counts are taken back after a try in vain."""
        self._mllm, self._start_layer, self._report = mllm, start_layer, report
        self._bytes_per_token = mllm.bytes_per_token(start_layer, keep=keep)
        self._low_memory = False
        self._at_once = 1

    def of(self, frames: int, video: Layout, image: Layout, text_tokens: int) -> Iterator[slice]:
        """Slices of the key frames; `text_tokens` of questions stand behind each.

        A batch that did not fit, which `attempt` notes, comes again with half of its frames.
        """
        free = self._free()
        budget = ENOUGH_TOKENS_ON_CPU if free is None else min(ENOUGH_TOKENS, free // 2 // self._bytes_per_token)
        text = max(0, text_tokens - FEW_TEXT_TOKENS)
        self._at_once = max(1, max(video.tokens + text, budget) // (image.tokens + text))
        first = 0
        while first < frames:
            batch = slice(first, min(first + self._at_once, frames))
            self._divided = False
            yield batch
            first = batch.start if self._divided else batch.stop

    def _free(self) -> int | None:
        """Bytes of the device that may still be taken; None where the host's memory is all there is, and no budget."""
        limits = [limit for limit in (self._mllm.engine.free_memory(), self._mllm.budget_left) if limit is not None]
        return min(limits, default=None)

    @property
    def block_bytes(self) -> int | None:
        """Of one block of attention rows in the rollout; None for the usual size."""
        return BLOCK_BYTES["cuda"] // 16 if self._low_memory else None

    def q_budget_bytes(self, tokens: int) -> int | None:
        """Of the GPU, for the attention queries of so many tokens: what all the rest leaves, with a tenth to spare. What does not fit waits
        in host memory, from where the rollout fetches it a layer at a time."""
        free = self._free()
        if free is None:
            return None
        rest = self._bytes_per_token - self._mllm.q_bytes_per_token(self._start_layer)
        return 0 if self._low_memory else max(0, free * 9 // 10 - tokens * rest - BLOCK_BYTES["cuda"])

    def attempt(self, step: Callable[[], object], prompts: int, *, divisible: bool = True) -> object | None:
        """The result of `step`. If memory runs out: with several prompts that can be divided, None, and the batch comes again in halves; else
        `step` is run once more with smaller blocks and less kept on the GPU. An out-of-memory error if that does not fit either."""
        with self._report.attempt():
            return step()
        if divisible and prompts > 1:
            self._at_once, self._divided = -(-prompts // 2), True
            log.warning("Memory ran out with %d key frames at once; trying again with %d.", prompts, self._at_once)
            return None
        log.warning("Memory ran out during attention extraction; trying again with smaller blocks and the queries in host memory.")
        self._low_memory = True
        try:
            return step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(
                error, "the attention of the clip", "Lower the tokens per frame or the number of key frames, or choose a smaller model."
            ) from None
