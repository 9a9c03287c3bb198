"""Object and background attention of a clip: two questions, asked of the whole clip and of every key frame alone (DecAF paper, section 3).

Any number of queries share what is expensive: each batch of pictures goes through the model once, with all questions behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..clips import Clip, clip_info
from ..data import Attention
from ..errors import DecafError
from ..mllm import MLLM, Encoded, Layout
from ..mllm.engine import explained
from ..mllm.packed import CapturedQK, KeptKV, PackedAttention, generate, logits, pack, run
from ..report import Preview, Progress, Report, checked_per_block, silent
from ..settings import DETAILS, MODES, MOST_TOKENS_PER_FRAME, AttentionSettings
from .batches import QUESTION_TOKENS_PER_PASS, QUESTIONS_PER_ROLLOUT, Batches, image_layout, memory_needed
from .frames import asked_frames, shown_frames
from .presence import presence_score, yes_and_no
from .questions import Templates, clean_not_this, clean_query, names_of
from .rollout import last_row_rollout

LONGEST_ANSWER = 16
"""Tokens generated for an object name in the setting *class name*."""

MOST_KEPT_BYTES = 8 << 30
"""Of host memory, for what the setting *class name* keeps of the pictures until the object has a name: 158 kB per visual token of a 7B model, or
5 GB for the usual 16 key frames. Pictures beyond that go through the model a second time."""

FPS_OF_IMAGES = 24
"""Frames per second of a clip that does not know its own, for models that are told the times of their frames."""

MOST_FPS = 10**6
"""Frames per second, and seconds per frame, beyond which a file's rate is damaged and its times are no times."""


def extract_attention(
    mllm: MLLM, clip: Clip, query: str, settings: AttentionSettings | None = None, **options
) -> tuple[Attention, Attention]:
    """`extract_attentions` for one query: its (object, background)."""
    return extract_attentions(mllm, clip, [query], settings, **options)[0]


@torch.inference_mode()
def extract_attentions(
    mllm: MLLM,
    clip: Clip,
    queries: Sequence[str],
    settings: AttentionSettings | None = None,
    *,
    templates: Templates | None = None,
    progress: Progress | Report = silent,
    **changes,
) -> list[tuple[Attention, Attention]]:
    """Attention rollout of the object and the background question over the clip's key frames, for each query.

    Args:
        queries: what to look for, in any words; before it may stand a name, as in "ball: the ball he throws". Each pass over the pictures is
            shared by all of them.
        settings: see `AttentionSettings`; `changes`: fields of it that are given by name.
        templates: question wording; None takes our own.
        progress: callback or `Report`. Counts of the latter: forward_passes, frames_encoded_video, frames_encoded_image,
            visual_tokens_encoded, visual_tokens_prefilled, text_tokens_prefilled, tokens_generated, key_frames; its stage: attention.

    Returns (object, background) of each query, in their order. With `not_this`, all object attentions have the same `Attention.not_this`, which
    comes from one more question in the same passes. Raises DecafError for a query, setting or clip that cannot be asked about.
    """
    settings = replace(settings or AttentionSettings(), **changes)
    queries = [clean_query(query) for query in queries]
    templates = templates or Templates()
    if not queries:
        raise DecafError("There is no query. Give one or more.")
    if settings.not_this is not None:
        settings = replace(settings, not_this=clean_not_this(settings.not_this, queries))
    if settings.setting not in MODES:
        raise DecafError(f'There is no setting "{settings.setting}"; choose one of {", ".join(MODES)}.')
    if settings.detail not in DETAILS:
        raise DecafError(f'There is no detail "{settings.detail}"; choose one of {", ".join(DETAILS)}.')
    templates.check([*queries, *_not_this(settings)], settings.setting)
    if settings.setting != MODES[0] and not mllm.engine.has_head:
        raise DecafError(
            f'{mllm.name} cannot answer in words, because the head that turns its states into words is not in its file; the setting '
            f'"{settings.setting}" asks it to. Choose the setting "{MODES[0]}", or another model.'
        )
    if not 1 <= settings.tokens_per_frame <= MOST_TOKENS_PER_FRAME:
        raise DecafError(
            f"{settings.tokens_per_frame} visual tokens per frame were asked for; ask for at least 1 and at most {MOST_TOKENS_PER_FRAME:,}."
        )
    start = mllm.layers // 2 if settings.start_layer is None else settings.start_layer
    if not 0 <= start < mllm.layers:
        raise DecafError(
            f"The start layer is {start}, but {mllm.name} has layers 0 to {mllm.layers - 1}. Choose one of them; the middle is usual."
        )
    keys, part = shown_frames(len(clip), settings), asked_frames(len(clip), settings)
    info = clip_info(clip, keys, part)
    needed = memory_needed(mllm, len(clip), clip.frame_size, settings, queries=queries, templates=templates)
    report = Report.of(progress)
    report.count("key_frames", len(keys))
    report.count("tokens_generated", 0)
    fps = float(min(max(clip.fps or FPS_OF_IMAGES, 1 / MOST_FPS), MOST_FPS))
    seconds = [index / fps for index in keys]
    frames, keep = [clip[index] for index in keys], settings.setting != MODES[0]
    extraction = _Extraction(mllm, keys, frames, seconds, settings, start, report, keep=keep)
    with mllm.alone(report.check_cancelled), report.stage("attention"), explained(mllm.name, report):
        mllm.make_room(needed)
        asked, looks, answers = (_by_class_name if keep else _by_expression)(extraction, queries, templates)
    sought = [*queries, *_not_this(settings)]

    def record(index: int, kind: str, query: str) -> Attention:
        video, *images = [look.maps[index] for look in looks]
        return Attention(kind, video[0].cpu(), torch.cat([image[:, 0] for image in images]).cpu(), info, str(query), asked[index])

    objects = [record(index, "object", query) for index, query in enumerate(sought)]
    not_this = objects[len(queries)] if settings.not_this is not None else None
    presence = looks[0].presence or [None] * len(queries)
    return [
        (
            replace(objects[index], answers=tuple(answers[index]), presence=presence[index], not_this=not_this, name=name),
            replace(record(len(sought) + index, "background", query), name=name),
        )
        for index, (query, name) in enumerate(zip(queries, names_of(queries), strict=True))
    ]


def _not_this(settings: AttentionSettings) -> list[str]:
    return [] if settings.not_this is None else [settings.not_this]


@dataclass
class _Look:
    """What the model gave to one layout of pictures. `maps`: per question (batch, slots, rows, cols), first the object questions of all
    queries, then that of what is not meant, if there is one, then the background questions. `presence`: of each query, of the video only.
    `answers`: per question, per prompt. `kept`: keys, values and captured queries of the pictures, in host memory, for questions that come
    later; None where there is no room for them."""

    maps: list[Tensor]
    presence: list[float]
    answers: list[list[str]]
    kept: tuple[KeptKV, CapturedQK] | None = None


def _by_expression(extraction: _Extraction, queries: list[str], templates: Templates) -> tuple[list[str], list[_Look], list[list[str]]]:
    """Questions, what each layout of pictures gave, and the (empty) answers of each query."""
    asked = [*map(templates.ask_object, [*queries, *_not_this(extraction.settings)]), *map(templates.ask_background, queries)]
    present = [*map(templates.ask_presence, queries)]
    looks = [look for *_, look in extraction.look_at_all(asked, lambda layout, frames: extraction.look(layout, frames, asked, present))]
    return asked, looks, [[] for _ in queries]


def _by_class_name(extraction: _Extraction, queries: list[str], templates: Templates) -> tuple[list[str], list[_Look], list[list[str]]]:
    """All object questions come before the first background question. In between, what was computed of the pictures waits in host memory."""
    asked = [*map(templates.ask_object, [*queries, *_not_this(extraction.settings)])]
    present = [*map(templates.ask_presence, queries)]
    looked = list(
        extraction.look_at_all(asked, lambda layout, frames: extraction.look(layout, frames, asked, present, answered=len(queries)))
    )
    looks = [look for *_, look in looked]
    answers = [[said for look in looks for said in look.answers[index]] for index in range(len(queries))]
    names = [extraction.choose_name(templates.ask_choice(query, said), query, said) for query, said in zip(queries, answers, strict=True)]
    backgrounds = [*map(templates.ask_class_background, names)]
    extraction.done = 0
    for layout, frames, look in looked:
        look.maps += extraction.ask_again(layout, frames, look.kept, backgrounds)
        look.kept = None
    return asked + backgrounds, looks, answers


class _Extraction:
    """The passes over one clip's key frames, with what all of them share. `done`: prompts of pictures that are finished. `keys`: clip indices of
    the key frames."""

    def __init__(
        self,
        mllm: MLLM,
        keys: Sequence[int],
        frames: Sequence[Tensor],
        seconds: Sequence[float],
        settings: AttentionSettings,
        start_layer: int,
        report: Report,
        *,
        keep: bool,
    ):
        self.mllm, self.frames, self.seconds, self.settings, self.start_layer = mllm, frames, seconds, settings, start_layer
        self.batches = Batches(mllm, start_layer, report, keep=keep)
        self.report, self.done, self.keys = report, 0, keys
        self._kept_bytes = 0

    def look_at_all(self, asked: list[str], step: Callable[[Layout, Sequence[Tensor]], _Look]):
        """Does `step`, which asks these questions, for the video, then for the key frames in batches. Yields layout, frames and
        result of each."""
        mllm, size = self.mllm, tuple(self.frames[0].shape[:2])
        video = mllm.family.video_layout(mllm.vision, size, self.seconds, self.settings.tokens_per_frame)
        look = self._attempt(lambda: step(video, self.frames), 1)
        self.report.preview(lambda: self._seen(look.maps[0][0], 0, len(self.frames)))
        yield video, self.frames, look
        text = min(QUESTION_TOKENS_PER_PASS, sum(len(self.mllm.question_ids(video, question)) for question in asked))
        for batch in self.batches.of(len(self.frames), video, image_layout(mllm, size, 1, self.settings), text):
            frames = self.frames[batch]
            layout = image_layout(mllm, size, len(frames), self.settings)
            result = self._attempt(lambda layout=layout, frames=frames: step(layout, frames), len(frames))
            if result is not None:
                self.report.preview(lambda maps=result.maps[0][:, 0], first=batch.start: self._seen(maps, first, len(maps)))
                yield layout, frames, result

    def _seen(self, maps: Tensor, first: int, count: int) -> Preview:
        """Of `count` key frames from `first` on, with their maps (slots, rows, cols), the one with the strongest attention."""
        slot = int(maps.flatten(1).amax(1).argmax())
        place = first + min(slot * -(-count // len(maps)), count - 1)  # a slot of a video may hold two frames
        return Preview(self.keys[place], self.frames[place], heat=maps[slot].float().cpu())

    def _attempt(self, step: Callable[[], object], prompts: int, *, divisible: bool = True):
        self._progress(self.done)
        result = self.batches.attempt(step, prompts, divisible=divisible)
        if result is not None:
            self.done += prompts
            self._progress(self.done, ended=True)
        return result

    def _progress(self, done: int, *, ended: bool = False) -> None:
        """After so many prompts, of which the video is the first."""
        if done == 0 or (done == 1 and ended):
            self.report.progress(done, 1, "Asking about the video")
        else:
            self.report.progress(done - 1, len(self.frames), "Asking about the key frames")

    def look(self, layout: Layout, frames: Sequence[Tensor], asked: list[str], present: list[str], *, answered: int = 0) -> _Look:
        """Encode the pictures and ask everything of them. Presence is asked of the video alone: an object that moves, or comes late, is not in
        every frame. The first `answered` questions are answered; then, what is needed to ask more is kept if there is room."""
        yes, no = yes_and_no(self.mllm)
        present = present if layout.kind == "video" and yes and no and self.mllm.engine.has_head else []
        with checked_per_block(self.mllm.model, self.report.check_cancelled):
            encoded = self.mllm.family.encode(self.mllm, layout, self.mllm.family.pixels(self.mllm, layout, frames))
        self.report.count(f"frames_encoded_{layout.kind}", layout.frames)
        self.report.count("visual_tokens_encoded", layout.tokens * layout.batch)
        self.report.count("visual_tokens_prefilled", layout.tokens * layout.batch)
        passes = self._passes(layout, [*asked, *present], len(asked), encoded=encoded, answered=answered)
        presence = []
        places = [*range(len(yes))], [*range(len(yes), len(yes + no))]
        for hidden in passes.last[len(asked) :]:
            presence.append(presence_score(logits(self.mllm, hidden[:1], yes + no)[0], *places))
        return _Look(passes.maps, presence, passes.answers, self._put_aside(passes.kept, passes.shared) if answered else None)

    def _put_aside(self, kept: KeptKV, shared: CapturedQK) -> tuple[KeptKV, CapturedQK] | None:
        """The same in host memory, None if it has no room."""
        size = sum(tensor.nbytes for part in (kept.k, kept.v, shared.q) for tensor in part.values())
        if self._kept_bytes + size > MOST_KEPT_BYTES:
            return None
        kept, q = kept.cpu(), CapturedQK(shared.scale, shared.q).cpu()
        self._kept_bytes += size
        return kept, replace(q, k={layer: kept.k[layer] for layer in shared.k})  # the same keys: held once

    def ask_again(
        self, layout: Layout, frames: Sequence[Tensor], kept: tuple[KeptKV, CapturedQK] | None, asked: list[str]
    ) -> list[Tensor]:
        """Maps of further questions about pictures that were looked at before. They are looked at again if nothing of them was kept."""

        def step() -> list[Tensor]:
            if kept is None:
                return self.look(layout, frames, asked, []).maps
            return self._passes(layout, asked, len(asked), kept=kept).maps

        return self._attempt(step, layout.batch, divisible=False)

    def choose_name(self, question: str, query: str, answers: list[str]) -> str:
        """The object's name, from the answers to the object question. Asked without pictures."""
        packed = pack(self.mllm, None, [question])
        answered = run(self.mllm, packed, None, lambda segments: self._attention(segments, capture=False, keep=True))
        self.report.count("forward_passes")
        self.report.count("text_tokens_prefilled", len(packed.question_ids[0]))
        ((tokens,),) = generate(self.mllm, packed, answered, [0], LONGEST_ANSWER, self.report.check_cancelled)
        self.report.count("tokens_generated", len(tokens))
        # A model that says nothing usable leaves the first thing that was said of the clip, else the query itself.
        return _plain(self.mllm, tokens) or next((answer for answer in answers if answer), query.rstrip(".?"))

    def _attention(self, segments: Tensor, *, past: KeptKV | None = None, capture: bool = True, keep: bool = False, budget: int | None = None):
        return PackedAttention(
            segments,
            past=past,
            capture_from=self.start_layer if capture else None,
            keep=keep,
            q_budget_bytes=budget,
            check_cancelled=self.report.check_cancelled,
        )

    def _passes(
        self,
        layout: Layout,
        questions: list[str],
        mapped: int,
        *,
        encoded: Encoded | None = None,
        kept: tuple[KeptKV, CapturedQK] | None = None,
        answered: int = 0,
    ) -> _Passes:
        """Ask questions of pictures, in one pass unless there are very many; maps are made of the first `mapped` ones, and the first `answered`
        ones are answered."""
        found = _Passes([], [], [], *(kept or (None, None)))
        for first, stop in _groups([len(self.mllm.question_ids(layout, question)) for question in questions]):
            group = questions[first:stop]
            packed = pack(self.mllm, layout, group)
            opens = encoded is not None and first == 0
            more = stop < len(questions)
            budget = self.batches.q_budget_bytes(layout.batch * len(packed.tokens(shared=opens)[0]))

            def attention(segments: Tensor, opens=opens, keep=answered > 0 or (opens and more), budget=budget) -> PackedAttention:
                return self._attention(segments, past=None if opens else found.kept, keep=keep, budget=budget)

            passed = run(self.mllm, packed, encoded if opens else None, attention, batch=layout.batch)
            self.report.count("forward_passes")
            text = sum(map(len, packed.question_ids)) + (len(packed.shared_ids) - layout.tokens if opens else 0)
            self.report.count("text_tokens_prefilled", text * layout.batch)
            if opens:
                found.shared = passed.attention.shared
                found.kept = passed.attention.kept.shared() if passed.attention.kept else None
            found.last += passed.last.unbind(1)
            with_map, with_answer = (max(0, min(number - first, len(group))) for number in (mapped, answered))
            found.maps += self._maps(packed.visual, layout, found.shared, passed.attention.questions[:with_map])
            if with_answer:
                said = generate(self.mllm, packed, passed, range(with_answer), LONGEST_ANSWER, self.report.check_cancelled)
                self.report.count("tokens_generated", sum(len(tokens) for each in said for tokens in each))
                found.answers += [[_plain(self.mllm, tokens) for tokens in each] for each in said]
        return found

    def _maps(self, visual: Tensor, layout: Layout, shared: CapturedQK, questions: list[CapturedQK]) -> list[Tensor]:
        """Per question its map (batch, slots, rows, cols)."""
        self._check_finite(shared)
        maps = []
        for first in range(0, len(questions), QUESTIONS_PER_ROLLOUT):
            group = questions[first : first + QUESTIONS_PER_ROLLOUT]
            rows = last_row_rollout(
                shared, group, visual,
                v_max=self.settings.v_max, block_bytes=self.batches.block_bytes, check_cancelled=self.report.check_cancelled,
            )  # fmt: skip
            seen = visual.to(rows[0].device)
            maps += [layout.to_grid(row[:, : len(visual)][:, seen]) for row in rows]
        return maps

    def _check_finite(self, shared: CapturedQK) -> None:
        """float16 overflows in some models; then all that follows is NaN, and would be found out minutes later."""
        if not shared.q[self.mllm.layers - 1].isfinite().all():
            raise DecafError(
                f"{self.mllm.name} gives numbers that are not finite in {str(self.mllm.engine.dtype).removeprefix('torch.')}. Choose bfloat16 or "
                "float32 as its dtype; if it is one of these, its weights are damaged, or those of a LoRA on it: download the file again, or "
                "take the LoRA off."
            )


@dataclass
class _Passes:
    """What questions about the same pictures gave. `maps` and `answers` of those that were mapped and answered; `last`: of each question (batch,
    width), its last token's hidden state. `kept`, `shared`: keys and values, and captured queries and keys, of the pictures."""

    maps: list[Tensor]
    last: list[Tensor]
    answers: list[list[str]]
    kept: KeptKV | None
    shared: CapturedQK | None


def _groups(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges (first, stop) of questions of so many tokens that fit one pass together, at least one each."""
    first = total = 0
    for index, length in enumerate(lengths):
        if index > first and total + length > QUESTION_TOKENS_PER_PASS:
            yield first, index
            first, total = index, 0
        total += length
    yield first, len(lengths)


def _plain(mllm: MLLM, tokens: list[int]) -> str:
    """An answer as the name of a thing: one line, lower case, no closing full stop."""
    text = " ".join(mllm.tokenizer.decode(tokens, skip_special_tokens=True).split())
    return text.strip(" .,;:!?\"'").lower()
