"""The passes over the pictures of one clip: what goes through the model together, and what is read from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import DecafError
from ..mllm import MLLM, Encoded, Layout
from ..mllm.packed import CapturedQK, KeptKV, PackedAttention, generate, logits, pack, run
from ..report import Preview, Report, checked_per_block
from ..settings import AttentionSettings
from .batches import QUESTION_TOKENS_PER_PASS, QUESTIONS_PER_ROLLOUT, Batches, image_layout, window_layout
from .presence import presence_score, yes_and_no
from .rollout import last_row_rollout
from .zoom import Windows, find_windows, share_of_whole

LONGEST_ANSWER = 16
"""Tokens generated for an object name in the setting *class name*."""

MOST_KEPT_BYTES = 8 << 30
"""Of host memory, for what the setting *class name* keeps of the pictures until the object has a name: 158 kB per visual token of a 7B model, or
5 GB for the usual 16 key frames. Pictures beyond that go through the model a second time."""


@dataclass
class Look:
    """What the model gave to one layout of pictures. `maps`: per question (batch, slots, rows, cols), first the object questions of all
    queries, then that of what is not meant, if there is one, then the background questions. `presence`: of each query, of the video only.
    `answers`: per question, per prompt. `kept`: keys, values and captured queries of the pictures, in host memory, for questions that come
    later; None where there is no room for them."""

    maps: list[Tensor]
    presence: list[float]
    answers: list[list[str]]
    kept: tuple[KeptKV, CapturedQK] | None = None


class Extraction:
    """The passes over one clip's key frames, with what all of them share. `done`: prompts of pictures that are finished. `rounds`: how often the
    key frames are looked at. `keys`: clip indices of the key frames."""

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
        self.report, self.done, self.rounds, self.keys = report, 0, 1, keys
        self._kept_bytes = 0
        self.frame_size = tuple(frames[0].shape[:2])
        self.video = mllm.family.video_layout(mllm.vision, self.frame_size, seconds, settings.tokens_per_frame)

    def look_at_video(self, asked: list[str], step: Callable[[Layout, Sequence[Tensor]], Look]) -> tuple[Layout, Sequence[Tensor], Look]:
        """Does `step`, which asks these questions, for the video. Returns its layout, its frames and what `step` gave, with a map
        (1, slots, rows, cols) per question. An out-of-memory error if there is no room for it."""
        look = self._attempt(lambda: step(self.video, self.frames), 1)
        self.report.preview(lambda: self._seen(look.maps[0][0], 0, len(self.frames)))
        return self.video, self.frames, look

    def look_at_frames(
        self, asked: list[str], step: Callable[[Layout, Sequence[Tensor]], Look], windows: Windows | None = None
    ) -> Iterator[tuple[Layout, Sequence[Tensor], Look]]:
        """The same for the key frames in batches of b, cut to `windows` where some are given: maps (b, 1, rows, cols) per question, of whole
        frames all the same."""
        mllm, size = self.mllm, self.frame_size
        layout_of = image_layout if windows is None else window_layout
        text = min(QUESTION_TOKENS_PER_PASS, sum(len(self.mllm.question_ids(self.video, question)) for question in asked))
        for batch in self.batches.of(len(self.frames), self.video, layout_of(mllm, size, 1, self.settings), text):
            frames = self.frames[batch] if windows is None else windows.cut(self.frames[batch], batch)
            layout = layout_of(mllm, size, len(frames), self.settings)
            result = self._attempt(lambda layout=layout, frames=frames: step(layout, frames), len(frames))
            if result is not None:
                if windows is not None:
                    self.report.count("frames_zoomed", len(frames))
                    result.maps = [windows.put_back(one[:, 0], batch)[:, None] for one in result.maps]
                self.report.preview(lambda maps=result.maps[0][:, 0], first=batch.start: self._seen(maps, first, len(maps)))
                yield layout, frames, result

    def windows(self, maps: list[Tensor], queries: int) -> list[Windows] | None:
        """Where the key frames are cut for each query, from the video's maps of all questions; None for whole frames."""
        self.report.count("frames_zoomed", 0)
        window, whole = (layout_of(self.mllm, self.frame_size, 1, self.settings) for layout_of in (window_layout, image_layout))
        more = len(maps) - 2 * queries
        found = []
        for number in range(queries):
            object, *others = (maps[place][0] for place in (number, queries + more + number, *range(queries, queries + more)))
            found.append(find_windows(object, others, len(self.frames), window))
        return share_of_whole(found, window, whole)

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
            self.report.progress(done - 1, self.rounds * len(self.frames), "Asking about the key frames")

    def look(self, layout: Layout, frames: Sequence[Tensor], asked: list[str], present: list[str], *, answered: int = 0) -> Look:
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
        return Look(passes.maps, presence, passes.answers, self._put_aside(passes.kept, passes.shared) if answered else None)

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
