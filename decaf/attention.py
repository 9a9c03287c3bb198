"""Object and background attention of a clip: two questions, asked of the whole clip and of every key frame alone, as in the DecAF paper.

Any number of queries share what is expensive: the pictures are encoded and prefilled once, and each question is a short text behind them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .data import Attention
from .devices import attempt, free_memory, is_out_of_memory
from .errors import DecafError, out_of_memory
from .mllm.base import MLLM, Visual
from .mllm.prefill import Prefix, lay_out
from .presence import presence_score, yes_and_no
from .progress import Progress, silent, ticking
from .questions import SETTINGS, Templates, clean_query
from .rollout import BLOCK_BYTES, last_row_rollout
from .video import Clip, clip_info

log = logging.getLogger(__name__)

ENOUGH_TOKENS = 8192
"""Visual tokens that keep a GPU busy: larger batches of frames are not made, they would only take memory from other models."""

ENOUGH_TOKENS_ON_CPU = 1024
"""Visual tokens from where on larger batches of frames are no faster on a CPU. With a 3B model in float32 they take 0.8 GB."""

AT_ONCE = 16
"""Questions whose attention rows are held at a time. What they share of the rollout is made once for each such group."""

LONGEST_ANSWER = 16
"""Tokens generated for an object name in the setting *class name*."""


def key_frames(length: int, most: int = 16) -> tuple[int, ...]:
    """Clip indices of min(length, most) frames, evenly spread from the first to the last one and rounded down."""
    if length < 1:
        raise DecafError("The clip has no frames. Load a clip with at least one.")
    if most < 1:
        raise DecafError(f"{most} key frames were asked for; ask for at least one.")
    count = min(length, most)
    return tuple(np.linspace(0, length - 1, count).astype(int).tolist())


def extract_attention(mllm: MLLM, clip: Clip, query: str, **options) -> tuple[Attention, Attention]:
    """`extract_attentions` for one query: its (object, background)."""
    return extract_attentions(mllm, clip, [query], **options)[0]


@torch.inference_mode()
def extract_attentions(
    mllm: MLLM,
    clip: Clip,
    queries: Sequence[str],
    *,
    setting: str = "expression",
    max_key_frames: int = 16,
    tokens_per_frame: int = 400,
    templates: Templates | None = None,
    start_layer: int | None = None,
    progress: Progress = silent,
    counts: dict[str, int] | None = None,
) -> list[tuple[Attention, Attention]]:
    """Attention rollout of the object and the background question over the clip's key frames, for each query.

    Args:
        queries: what to look for, in any words. Each pass over the pictures is shared by all of them.
        setting: "expression": the background question leaves out what the query refers to, and nothing is generated (default).
            "class name": the object question is answered, one name is chosen from the answers, the background question leaves that out.
        max_key_frames: frames shown to the model, spread evenly over the clip.
        tokens_per_frame: largest number of visual tokens of a frame in the video; images of single frames have four times as many. Families
            with tiles of a fixed size ignore it.
        templates: question wording; None takes our own.
        start_layer: first decoder layer that is rolled out, counted from 0; None takes the upper half.
        counts: is added to: frames_encoded_video, frames_encoded_image, visual_tokens_encoded, visual_tokens_prefilled,
            text_tokens_prefilled, tokens_generated, key_frames.

    Returns (object, background) of each query, in their order. Raises DecafError for a query, setting or clip that cannot be asked about.
    """
    queries = [clean_query(query) for query in queries]
    if not queries:
        raise DecafError("There is no query. Give one or more.")
    if setting not in SETTINGS:
        raise DecafError(f'There is no setting "{setting}"; choose one of {", ".join(SETTINGS)}.')
    if tokens_per_frame < 1:
        raise DecafError(f"{tokens_per_frame} visual tokens per frame were asked for; ask for at least 16.")
    start = mllm.layers // 2 if start_layer is None else start_layer
    if not 0 <= start < mllm.layers:
        raise DecafError(
            f"The start layer is {start}, but {mllm.name} has layers 0 to {mllm.layers - 1}. Choose one of them; the middle is usual."
        )
    keys = key_frames(len(clip), max_key_frames)
    frames = [clip[index] for index in keys]
    info = clip_info(clip, keys)
    run = _Run(mllm, frames, queries, tokens_per_frame, start, templates or Templates(), progress, counts if counts is not None else {})
    run.count("key_frames", len(keys))
    asked, passes, answers = run.by_expression() if setting == "expression" else run.by_class_name()

    def record(place: int, kind: str) -> Attention:
        video, *images = [one.maps[place] for one in passes]
        query = place % len(queries)
        attention = Attention(kind, video[0].cpu(), torch.cat([image[:, 0] for image in images]).cpu(), info, queries[query], asked[place])
        if kind == "background":
            return attention
        return replace(attention, answers=tuple(answers[query]), presence=passes[0].presence[query] if passes[0].presence else None)

    return [(record(place, "object"), record(len(queries) + place, "background")) for place in range(len(queries))]


@dataclass
class _Pass:
    """What one pass over the pictures gave. `maps`: per question (prompts, slots, rows, cols), first the object questions of all queries,
    then the background questions. `presence`: of each query, of the video only."""

    maps: list[Tensor]
    presence: list[float]


@dataclass
class _Run:
    mllm: MLLM
    frames: Sequence[Tensor]
    queries: Sequence[str]
    tokens_per_frame: int
    start: int
    templates: Templates
    progress: Progress
    counts: dict[str, int]
    block_bytes: int | None = None
    crowded: bool = False
    at_once: int = 0
    done: int = 0

    def count(self, name: str, number: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    def tick(self) -> None:
        """Gives the caller a chance to cancel without any progress made."""
        self.progress(self.done, len(self.frames) + 1, "Attention")

    def look_at_all(self, step: Callable[[Visual], object]) -> Iterator[tuple[slice | None, object]]:
        """Does `step` for the video, then for the key frames in batches. Yields the frames of the batch (None: the video) and the result.

        A batch is as large as half of the free memory allows, on a CPU as large as helps. It may always take as many tokens as the video
        did: it needs no more memory either. If memory runs out all the same, it is halved.
        """
        family, most = self.mllm.family, self.tokens_per_frame
        video = family.video(self.mllm, self.frames, most)
        yield None, self.sparing(step, video)
        per_image = family.images(self.mllm, self.frames[:1], most).tokens
        free = free_memory(self.mllm.device)
        fitting = ENOUGH_TOKENS_ON_CPU if free is None else min(ENOUGH_TOKENS, free // 2 // self.mllm.bytes_per_token(self.start))
        self.at_once = max(1, max(video.tokens, fitting) // per_image)
        first = 0
        while first < len(self.frames):
            batch = slice(first, min(first + self.at_once, len(self.frames)))
            result = self.sparing(step, family.images(self.mllm, self.frames[batch], most))
            if result is not None:
                yield batch, result
                first = batch.stop

    # -- the two settings --------------------------------------------------------------------------------------------------------------------

    def by_expression(self) -> tuple[list[str], list[_Pass], list[list[str]]]:
        """Questions, what each pass gave, and the (empty) answers of each query."""
        asked = [*map(self.templates.ask_object, self.queries), *map(self.templates.ask_background, self.queries)]

        def look(visual: Visual) -> _Pass:
            prompts, mask, shared = lay_out(self.mllm, visual, [*asked, *self.presence_questions(visual)])
            prefix = self.open(visual, prompts, mask, shared)
            presence = [self.presence(prefix, visual, ids, mask) for ids in prompts[len(asked) :]]
            maps, _ = self.maps_of(prefix, visual, prompts[: len(asked)], mask)
            return _Pass(maps, presence)

        return asked, [found for _, found in self.look_at_all(look)], [[] for _ in self.queries]

    def by_class_name(self) -> tuple[list[str], list[_Pass], list[list[str]]]:
        """All object questions come before the first background question, so each prefix waits in host memory in between."""
        asked = [*map(self.templates.ask_object, self.queries)]
        waiting: list[tuple[slice | None, Prefix]] = []
        found: list[_Pass] = []
        answers: list[list[str]] = [[] for _ in self.queries]

        def objects(visual: Visual):
            prompts, mask, _ = lay_out(self.mllm, visual, [*asked, *self.presence_questions(visual)])
            shared = int(mask.nonzero()[-1]) + 1  # the background questions are not known yet: they share the pictures
            mask = mask[:shared]
            prefix = self.open(visual, prompts, mask, shared)
            presence = [self.presence(prefix, visual, ids, mask) for ids in prompts[len(asked) :]]
            maps, told = self.maps_of(prefix, visual, prompts[: len(asked)], mask, LONGEST_ANSWER)
            prefix.set_aside()
            return prefix, _Pass(maps, presence), told

        for batch, (prefix, one, told) in self.look_at_all(objects):
            waiting.append((batch, prefix))
            found.append(one)
            for query, said in enumerate(told):
                answers[query] += said
        names = [self.choose_name(query, said) for query, said in zip(self.queries, answers, strict=True)]
        backgrounds = [*map(self.templates.ask_class_background, names)]
        self.done = 0
        family, most = self.mllm.family, self.tokens_per_frame
        for one in found:
            batch, prefix = waiting.pop(0)

            def behind(seen: Visual, prefix=prefix):
                prompts, mask, _ = lay_out(self.mllm, seen, backgrounds)
                mask = mask[: prefix.length]
                prefix.take_back()
                return self.maps_of(prefix, seen, prompts, mask)[0]

            seen = family.video(self.mllm, self.frames, most) if batch is None else family.images(self.mllm, self.frames[batch], most)
            one.maps += self.sparing(behind, seen, divisible=False)
        return asked + backgrounds, found, answers

    def presence_questions(self, visual: Visual) -> list[str]:
        """Asked of the video alone: an object that moves, or comes late, is not in every frame."""
        return [*map(self.templates.ask_presence, self.queries)] if visual.kind == "video" and all(yes_and_no(self.mllm)) else []

    def choose_name(self, query: str, answers: list[str]) -> str:
        ids = self.mllm.prompt_ids(None, self.templates.ask_choice(query, answers))
        places = self.mllm.family.positions(self.mllm, torch.zeros(len(ids), dtype=torch.bool), None)
        prefix = Prefix(self.mllm, ids[None, :-1], None, places[..., :-1], self.start, self.tick)
        _, (said,) = prefix.ask(ids[-1:], places[..., -1:], LONGEST_ANSWER)
        self.count("text_tokens_prefilled", len(ids))
        self.count("tokens_generated", len(said))
        name = _plain(self.mllm, said)
        # A model that says nothing usable leaves the first thing that was said of the clip, else the query itself.
        return name or next((answer for answer in answers if answer), query.rstrip(".?"))

    # -- one pass ------------------------------------------------------------------------------------------------------------------------------

    def open(self, visual: Visual, prompts: list[Tensor], mask: Tensor, shared: int) -> Prefix:
        with ticking(self.mllm.model, self.tick):
            features = self.mllm.family.encode(self.mllm, visual)
        places = self.positions(visual, prompts[0], mask)[..., :shared]
        ids = prompts[0][:shared].expand(visual.prompts, -1)
        prefix = Prefix(self.mllm, ids, features, places, self.start, self.tick, room=self.room(ids.numel()))
        self.count(f"frames_encoded_{visual.kind}", visual.frames)
        self.count("visual_tokens_encoded", visual.tokens * visual.prompts)
        self.count("visual_tokens_prefilled", visual.tokens * visual.prompts)
        self.count("text_tokens_prefilled", (shared - visual.tokens) * visual.prompts)
        return prefix

    def room(self, tokens: int) -> int | None:
        """Bytes of the GPU for the queries of a prefix of so many tokens: what all the rest leaves, with a tenth to spare. Without them on
        the GPU the rollout fetches every layer's from host memory."""
        free = free_memory(self.mllm.device)
        if free is None:
            return None
        rest = self.mllm.bytes_per_token(self.start) - self.mllm.query_bytes_per_token(self.start)
        return 0 if self.crowded else max(0, free * 9 // 10 - tokens * rest - BLOCK_BYTES["cuda"])

    def ask(self, prefix: Prefix, visual: Visual, ids: Tensor, mask: Tensor, max_new_tokens: int = 0):
        """Rows of the question and the answers, a string per prompt."""
        shared = prefix.length
        rows, said = prefix.ask(ids[shared:], self.positions(visual, ids, mask)[..., shared:], max_new_tokens)
        self.count("text_tokens_prefilled", (len(ids) - shared) * visual.prompts)
        self.count("tokens_generated", sum(map(len, said)))
        return rows, [_plain(self.mllm, one) for one in said]

    def presence(self, prefix: Prefix, visual: Visual, ids: Tensor, mask: Tensor) -> float:
        shared = prefix.length
        logits = prefix.next_logits(ids[shared:], self.positions(visual, ids, mask)[..., shared:])
        self.count("text_tokens_prefilled", (len(ids) - shared) * visual.prompts)
        return presence_score(logits[0], *yes_and_no(self.mllm))

    def positions(self, visual: Visual, ids: Tensor, mask: Tensor) -> Tensor:
        whole = torch.cat([mask, torch.zeros(len(ids) - len(mask), dtype=torch.bool)])
        return self.mllm.family.positions(self.mllm, whole, visual)

    def maps_of(self, prefix: Prefix, visual: Visual, prompts: list[Tensor], mask: Tensor, max_new_tokens: int = 0):
        """Per question its map (prompts, slots, rows, cols), and per question the answers, a string per prompt."""
        maps, told = [], []
        for first in range(0, len(prompts), AT_ONCE):
            asked = [self.ask(prefix, visual, ids, mask, max_new_tokens) for ids in prompts[first : first + AT_ONCE]]
            found = last_row_rollout(prefix.rows, [rows for rows, _ in asked], mask, block_bytes=self.block_bytes, tick=self.tick)
            seen = mask.to(found[0].device)
            maps += [visual.to_grid(row[:, : len(mask)][:, seen]) for row in found]
            told += [said for _, said in asked]
        return maps, told

    def sparing(self, step: Callable[[Visual], object], visual: Visual, divisible: bool = True):
        """Run a step. If memory runs out: with several prompts that can be divided, halve the batch and return None; else run it once more
        with smaller blocks and less kept on the GPU, and then say what to lower."""
        self.tick()
        result = None  # which no step gives
        with attempt(self.counts):
            result = step(visual)
        if result is None:
            if divisible and visual.prompts > 1:
                self.at_once = -(-visual.prompts // 2)
                log.warning("Memory ran out with %d key frames at once; trying again with %d.", visual.prompts, self.at_once)
                return None
            log.warning("Memory ran out during attention extraction; trying again with smaller blocks and the queries in host memory.")
            self.crowded = True
            self.block_bytes = BLOCK_BYTES["cuda"] // 16
            try:
                result = step(visual)
            except Exception as again:
                if not is_out_of_memory(again):
                    raise
                raise out_of_memory(
                    again, "the attention of the clip", "Lower the tokens per frame or the number of key frames, or choose a smaller model."
                ) from None
        self.done += visual.prompts
        self.tick()
        return result


def _plain(mllm: MLLM, tokens: list[int]) -> str:
    """An answer as the name of a thing: one line, lower case, no closing full stop."""
    text = " ".join(mllm.processor.tokenizer.decode(tokens, skip_special_tokens=True).split())
    return text.strip(" .,;:!?\"'").lower()
