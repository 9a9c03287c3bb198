"""How much of a device a pass over the pictures may take: batches of key frames, and what happens when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from ..devices import is_out_of_memory, out_of_memory
from ..mllm import MLLM, Layout
from ..mllm.footprint import generating_bytes, kept_bytes, passing_bytes, query_bytes, seeing_bytes, seen_bytes
from ..report import Report
from ..settings import MODES, AttentionSettings
from .frames import PIECE, looked_at_frames, shown_frames
from .questions import Templates
from .rollout import BLOCK_BYTES, rollout_bytes

log = logging.getLogger(__name__)

ENOUGH_TOKENS = 8192
"""Visual tokens per batch that keep a GPU busy; larger batches gain no speed and only take memory from other models."""

ENOUGH_TOKENS_ON_CPU = 1024
"""Visual tokens per batch on a CPU; larger batches gain no speed. With a 3B model in float32 they take 0.8 GB."""

QUESTIONS_PER_ROLLOUT = 16
"""Questions rolled out together; attention over the shared pictures is computed once per group."""

FEW_TEXT_TOKENS = 512
"""Tokens of questions that change nothing about how many key frames go at once: those of several queries."""

QUESTION_TOKENS_PER_PASS = 6144
"""Tokens of all questions behind the pictures in one pass: room for about 60 queries. Further ones come in a pass of their own, on the keys and
values of the pictures."""

CLOSING_TOKENS = 5
"""Of the chat's words behind a question, as the tokenizers of published models have them."""

TEXT_TOKENS_OF_A_QUESTION = 64
"""Tokens of a question and a share of the chat's own words, where the tokenizer is not asked."""


def image_layout(mllm: MLLM, frame_size: tuple[int, int], batch: int, settings: AttentionSettings) -> Layout:
    """Each of `batch` key frames of (height, width) pixels as an image by itself, as fine as the settings say."""
    layout = mllm.family.coarse_image_layout if settings.is_fast else mllm.family.image_layout
    return layout(mllm.vision, frame_size, batch, settings.tokens_per_frame)


def window_layout(mllm: MLLM, frame_size: tuple[int, int], batch: int, settings: AttentionSettings) -> Layout:
    """Each of `batch` key frames of (height, width) pixels, cut and enlarged to that size (see `decaf.attention.zoom`), as an image by itself."""
    return mllm.family.coarse_image_layout(mllm.vision, frame_size, batch, settings.tokens_per_frame)


def memory_needed(
    mllm: MLLM,
    frames: int,
    frame_size: tuple[int, int],
    settings: AttentionSettings,
    *,
    queries: Sequence[str] = ("",),
    templates: Templates | None = None,
    device: torch.device | None = None,
) -> int:
    """Bytes that the attention of a clip of so many frames, (height, width) each, needs on a device beside the weights.

    That is the largest of its passes: on a CPU as they are made there, on a GPU the longest prompt. More makes larger batches, which are faster.

    Args:
        queries, templates: as in `extract_attentions`; their tokens are counted where the model has its tokenizer.
        device: where the model will be by then; None for where it is.
    """
    device = device or mllm.device
    start = mllm.layers // 2 if settings.start_layer is None else min(settings.start_layer, mllm.layers - 1)
    shown, keep = len(shown_frames(frames, settings)), settings.setting != MODES[0]
    video = mllm.family.video_layout(mllm.vision, frame_size, [0.0] * shown, settings.tokens_per_frame)
    templates = templates or Templates()
    asked = [templates.ask_object] if keep else [templates.ask_object, templates.ask_background]
    more = [] if settings.not_this is None else [templates.ask_object(settings.not_this)]
    of_images = _text_tokens(mllm, [*more, *(ask(query) for query in queries for ask in asked)])
    of_video = _text_tokens(mllm, [*more, *(ask(query) for query in queries for ask in [*asked, templates.ask_presence])])
    image = image_layout(mllm, frame_size, 1, settings)
    at_once = min(shown, _at_once(video, image, of_images, ENOUGH_TOKENS_ON_CPU if device.type == "cpu" else 0))
    passes = [(video, of_video), (image_layout(mllm, frame_size, at_once, settings), of_images)]
    if settings.zooms:  # or whole ones, after all
        window = window_layout(mllm, frame_size, 1, settings)
        windows = min(shown, _at_once(video, window, of_images, ENOUGH_TOKENS_ON_CPU if device.type == "cpu" else 0))
        passes.append((window_layout(mllm, frame_size, windows, settings), of_images))
    if looked := len(looked_at_frames(frames, settings)):
        piece = mllm.family.video_layout(mllm.vision, frame_size, [0.0] * min(looked, PIECE), settings.tokens_per_frame)
        passes.append((piece, _text_tokens(mllm, [templates.ask_presence(query) for query in queries])))
    needed = max(pass_bytes(mllm, layout, text, start, len(queries) + len(more), keep=keep, device=device) for layout, text in passes)
    if keep and device.type == "cpu":  # what waits in host memory for the background question is in the same memory
        tokens = video.tokens + of_video + (shown - at_once) * (image.tokens + of_images)
        needed += kept_bytes(mllm, tokens, start, keep=True) + query_bytes(mllm, tokens, start)
    return needed


def pass_bytes(mllm: MLLM, layout: Layout, text: int, start: int, queries: int, *, keep: bool, device: torch.device) -> int:
    """Bytes of one pass over the pictures of `layout` with `text` tokens around each prompt's, and of the rollout behind it."""
    length = layout.tokens + text
    tokens = layout.batch * length
    seen = seen_bytes(mllm, layout)
    held = seen + query_bytes(mllm, tokens, start) + kept_bytes(mllm, tokens, start, keep=keep)
    rolling = rollout_bytes(mllm.engine.shape, layout.batch, length, min(2 * queries, QUESTIONS_PER_ROLLOUT), device)
    return max(seeing_bytes(mllm, layout, device) + seen, held + _at_work(mllm, tokens, keep=keep), held + rolling)


def _at_work(mllm: MLLM, tokens: int, *, keep: bool) -> int:
    """Bytes that come and go in the decoder, in the pass or, where keys and values are kept of it, in the answers that are generated."""
    return max(passing_bytes(mllm, tokens), generating_bytes(mllm, tokens) if keep else 0)


def _text_tokens(mllm: MLLM, questions: Sequence[str]) -> int:
    """Of the questions of one pass, and of the chat's words before the pictures."""
    if mllm.tokenizer is None:
        return TEXT_TOKENS_OF_A_QUESTION * len(questions)
    chat = len(mllm.question_ids(None, ""))  # the opening once, and the closing behind every question
    tokens = sum(len(mllm.question_ids(None, question)) - chat + CLOSING_TOKENS for question in questions)
    return min(chat + tokens, QUESTION_TOKENS_PER_PASS)


def _at_once(video: Layout, image: Layout, text: int, enough: int) -> int:
    """Key frames in one batch: as many as `enough` tokens hold, and always as many as take no more tokens than the video."""
    text = max(0, text - FEW_TEXT_TOKENS)
    return max(1, max(video.tokens + text, enough) // (image.tokens + text))


class Batches:
    """The batches of key frames that go through a model one after the other, and their retries.

    A batch is as large as half of the free memory allows, on a CPU as large as helps. It may always take as many tokens as the video did: it
    needs no more memory either. If memory runs out all the same, it is halved.
    """

    def __init__(self, mllm: MLLM, start_layer: int, report: Report, *, keep: bool):
        """`keep`: whether keys and values are kept of a pass. `report`: its counts are taken back after a try in vain."""
        self._mllm, self._start_layer, self._report = mllm, start_layer, report
        self._keep = keep
        self._low_memory = False
        self._at_once = 1

    def of(self, frames: int, video: Layout, image: Layout, text_tokens: int) -> Iterator[slice]:
        """Slices of the key frames; `text_tokens` of questions stand behind each.

        A batch that did not fit, which `attempt` notes, comes again with half of its frames.
        """
        free = self._free()
        enough = ENOUGH_TOKENS_ON_CPU
        if free is not None:
            one = self._bytes(image, text_tokens)
            enough = min(ENOUGH_TOKENS, free // 2 // one * image.tokens)
        self._at_once = _at_once(video, image, text_tokens, enough)
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

    def _bytes(self, layout: Layout, text: int) -> int:
        """Of a prompt, the blocks of its rollout apart: they are no larger for more prompts."""
        tokens = layout.tokens + text
        held = seen_bytes(self._mllm, layout) + query_bytes(self._mllm, tokens, self._start_layer)
        held += kept_bytes(self._mllm, tokens, self._start_layer, keep=self._keep)
        return max(seeing_bytes(self._mllm, layout, self._mllm.device), held + _at_work(self._mllm, tokens, keep=self._keep))

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
        rest = _at_work(self._mllm, tokens, keep=self._keep) + kept_bytes(self._mllm, tokens, self._start_layer, keep=self._keep)
        return 0 if self._low_memory else max(0, free * 9 // 10 - rest - BLOCK_BYTES["cuda"])

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
