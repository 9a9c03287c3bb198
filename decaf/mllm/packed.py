"""One forward pass for everything that is asked about a batch of pictures: [pictures | question 1 | question 2 | ...].

Every question sees the pictures and itself, and stands at the position ids that it would have alone, so each gets what a prompt of its own
would give. The attention function decides that; it also captures the queries and keys that the rollout needs, and keeps keys and values
where an answer is generated or more is asked later. Weights are read once, however many questions there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import DecafError
from .base import MLLM, Encoded, Layout

SHARED = 0
"""Segment of the tokens that every question sees. Questions are the segments 1, 2, ..."""


@dataclass
class CapturedQK:
    """Attention queries and keys of consecutive prompt positions, per decoder layer.

    `q[l]` is (B, H, n, D), `k[l]` is (B, KV, n, D) with H a multiple of KV, both after the rotary embedding and in the model's dtype.
    Those of shared tokens may lie in host memory: the rollout fetches them a layer at a time.
    """

    scale: float = 1.0
    q: dict[int, Tensor] = field(default_factory=dict)
    k: dict[int, Tensor] = field(default_factory=dict)

    def cpu(self) -> CapturedQK:
        """The same in host memory."""
        moved = [{layer: _on_its_own(tensor) for layer, tensor in part.items()} for part in (self.q, self.k)]
        return CapturedQK(self.scale, *moved)


@dataclass
class KeptKV:
    """Keys `k` and values `v` (B, KV, n, D) of earlier tokens, per layer, and the segment (n,) of each token. They may lie in host memory."""

    segments: Tensor
    k: dict[int, Tensor] = field(default_factory=dict)
    v: dict[int, Tensor] = field(default_factory=dict)

    def shared(self) -> KeptKV:
        """What belongs to the shared tokens alone."""
        n = int((self.segments == SHARED).sum())
        return KeptKV(self.segments[:n], *({layer: one[:, :, :n] for layer, one in part.items()} for part in (self.k, self.v)))

    def cpu(self) -> KeptKV:
        """The same in host memory."""
        return KeptKV(self.segments, *({layer: _on_its_own(one) for layer, one in part.items()} for part in (self.k, self.v)))


class PackedAttention:
    """The attention of one packed pass: an `Attend`. `shared` and `questions` are what it captured.

    Args:
        segments: (L,) of this pass's tokens. Shared tokens come first, and only where there is no `past`.
        past: keys and values of earlier tokens, which the new ones see as if they came before them in the same pass.
        use_up_past: whether a layer's are let go once the new ones are joined to them: nobody else needs them.
        capture_from: first layer whose queries and keys are captured; None captures nothing.
        keep: whether keys and values of all layers are kept, `past` included, in `kept`.
        q_budget_bytes: of the device, for the queries of shared tokens; further layers' go to host memory. None leaves all where they are.
        check_cancelled: called once per layer; may raise to stop the pass.
    """

    def __init__(
        self,
        segments: Tensor,
        *,
        past: KeptKV | None = None,
        use_up_past: bool = False,
        capture_from: int | None = None,
        keep: bool = False,
        q_budget_bytes: int | None = None,
        check_cancelled: Callable[[], None] = lambda: None,
    ):
        self.kept = KeptKV(segments if past is None else torch.cat([past.segments, segments])) if keep else None
        self.shared = CapturedQK()
        self._shared_length = int((segments == SHARED).sum())
        asked = [] if capture_from is None else segments[segments != SHARED].unique().tolist()
        self._spans = [_span(segments, number) for number in asked]
        self.questions = [CapturedQK() for _ in self._spans]
        self._past, self._use_up_past = past, use_up_past
        self._capture_from, self._budget, self._check_cancelled = capture_from, q_budget_bytes, check_cancelled
        behind = segments[self._shared_length :]
        before = segments[: self._shared_length] if past is None else past.segments
        seen = torch.cat([before, behind])
        self._mask = (seen == SHARED) | (seen == behind[:, None])
        self._mask[:, len(before) :] &= torch.ones(len(behind), len(behind), dtype=torch.bool).tril()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self._check_cancelled()
        if self._capture_from is not None and layer >= self._capture_from:
            self._capture(layer, q, k, scale)
        n = self._shared_length
        parts = []
        if n:
            parts.append(_attend(q[:, :, :n], k[:, :, :n], v[:, :, :n], scale, is_causal=True))
        if self._past is not None:
            k, v = (torch.cat([old[layer].to(new.device), new], 2) for old, new in ((self._past.k, k), (self._past.v, v)))
            if self._use_up_past:
                del self._past.k[layer], self._past.v[layer]
        if self.kept is not None:
            self.kept.k[layer], self.kept.v[layer] = k, v
        if q.shape[2] > n:
            self._mask = self._mask.to(q.device)
            parts.append(_attend(q[:, :, n:], k, v, scale, attn_mask=self._mask))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _capture(self, layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        n = self._shared_length
        aside = False
        if self._budget is not None:
            self._budget -= q[:, :, :n].nbytes
            aside = self._budget < 0
        if n:
            self.shared.scale = scale
            self.shared.q[layer], self.shared.k[layer] = q[:, :, :n].cpu() if aside else q[:, :, :n], k[:, :, :n]
        for span, captured in zip(self._spans, self.questions, strict=True):
            captured.scale = scale
            # A view would keep the whole tensor on the device.
            captured.q[layer] = q[:, :, span].clone() if aside else q[:, :, span]
            captured.k[layer] = k[:, :, span]


def _on_its_own(tensor: Tensor) -> Tensor:
    """In host memory, without the larger tensor that it may be a part of."""
    moved = tensor.cpu()
    return moved.clone() if moved.untyped_storage().nbytes() > moved.nbytes else moved


def _span(segments: Tensor, number: int) -> slice:
    places = (segments == number).nonzero()[:, 0]
    return slice(int(places[0]), int(places[-1]) + 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, **mask) -> Tensor:
    """(B, H, n, D). On a CPU the kernel shares keys and values between heads; on a GPU the kernels that take a mask do not."""
    if q.device.type == "cpu":
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1], **mask)
    return scaled_dot_product_attention(q, *(_repeated(one, q.shape[1]) for one in (k, v)), scale=scale, **mask)


def _repeated(heads: Tensor, count: int) -> Tensor:
    """(B, KV, n, D) -> (B, count, n, D): every query head's own."""
    batch, groups, length, width = heads.shape
    if groups == count:
        return heads
    return heads[:, :, None].expand(-1, -1, count // groups, -1, -1).reshape(batch, count, length, width)


@dataclass(frozen=True)
class Packed:
    """Questions about the same pictures, laid out for one pass.

    `shared_ids` (P,): up to the end of the pictures; empty where there are none. `visual`: (P,) bool. `question_ids`: each (n,).
    `positions`: of each question's whole prompt, (axes, P + n).
    """

    layout: Layout | None
    shared_ids: Tensor
    visual: Tensor
    question_ids: tuple[Tensor, ...]
    positions: tuple[Tensor, ...]

    def tokens(self, *, shared: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (L,), segments (L,) and position ids (axes, L) of the pass; without the shared part where that was run before."""
        p = len(self.shared_ids)
        ids, segments, positions = [], [], []
        if shared and p:
            ids, segments, positions = [self.shared_ids], [torch.zeros(p, dtype=torch.long)], [self.positions[0][:, :p]]
        for number, (question, whole) in enumerate(zip(self.question_ids, self.positions, strict=True), start=1):
            ids.append(question)
            segments.append(torch.full((len(question),), number))
            positions.append(whole[:, p:])
        return torch.cat(ids), torch.cat(segments), torch.cat(positions, 1)


def pack(mllm: MLLM, layout: Layout | None, questions: Sequence[str]) -> Packed:
    """Lay out `questions` behind the pictures of `layout`, or behind nothing. DecafError for a question that cannot be asked."""
    empty = torch.zeros(0, dtype=torch.long)
    shared, visual = mllm.picture_ids(layout) if layout is not None else (empty, empty.bool())
    asked = tuple(mllm.question_ids(layout, question) for question in questions)
    positions = tuple(
        mllm.family.position_ids(mllm.vision, torch.cat([visual, torch.zeros(len(ids), dtype=torch.bool)]), layout) for ids in asked
    )
    return Packed(layout, shared, visual, asked, positions)


@dataclass(frozen=True)
class Answered:
    """What a pass gave. `attention`: with what it captured. `last`: (B, questions, width), hidden states at the end of each question."""

    attention: PackedAttention
    last: Tensor


def run(mllm: MLLM, packed: Packed, encoded: Encoded | None, attention_of: Callable[[Tensor], PackedAttention], *, batch: int = 1) -> Answered:
    """The forward pass: the hidden states (batch, questions, width) in which each question ends. `attention_of`: makes the attention for the
    segments of this pass. Without `encoded`, the pictures were run before and the attention has their keys and values as its past. `batch`: of
    the prompts."""
    ids, segments, positions = packed.tokens(shared=encoded is not None)
    attention = attention_of(segments)
    embeds = mllm.engine.embed(ids.expand(batch, -1))
    pictures = {}
    if encoded is not None:
        visual = torch.zeros(len(ids), dtype=torch.bool)
        visual[: len(packed.visual)] = packed.visual
        embeds[:, visual.to(embeds.device)] = encoded.tokens.to(embeds)
        pictures = {"visual": visual, "deepstack": encoded.deepstack}
    ends = torch.tensor([int((segments == number).nonzero()[-1, 0]) for number in range(1, len(packed.question_ids) + 1)])
    return Answered(attention, mllm.engine.run(embeds, positions, attention, wanted=ends, **pictures))


def logits(mllm: MLLM, hidden: Tensor, ids: Sequence[int] | None = None) -> Tensor:
    """As `decaf.mllm.engine.Engine.logits`. DecafError: they are no numbers, from which some token would be chosen all the same."""
    found = mllm.engine.logits(hidden, ids)
    if not found.isfinite().all():
        raise DecafError(
            f"{mllm.name} gives answers that are not finite numbers: the head that turns its states into words is damaged. Download the model again."
        )
    return found


def generate(
    mllm: MLLM, packed: Packed, answered: Answered, numbers: Sequence[int], max_new_tokens: int, check_cancelled: Callable[[], None]
) -> list[list[list[int]]]:
    """Greedy answers to the questions at `numbers` (indices into `packed.question_ids`), all at once: per question, per prompt, token ids.

    The pass must have kept its keys and values. An answer ends at a token that ends answers, or after `max_new_tokens`.
    """
    ends = mllm.engine.end_tokens | {getattr(mllm.tokenizer, "eos_token_id", None)}
    kept = answered.attention.kept
    batch = len(answered.last)
    answers: list[list[list[int]]] = [[[] for _ in range(batch)] for _ in numbers]
    unfinished = {(question, prompt) for question in range(len(numbers)) for prompt in range(batch)}
    segments = torch.tensor([number + 1 for number in numbers])
    positions = torch.stack([packed.positions[number][:, -1] for number in numbers], 1)
    hidden = answered.last[:, list(numbers)]
    for step in range(max_new_tokens):
        chosen = logits(mllm, hidden).argmax(-1)
        for question, prompt in sorted(unfinished):
            token = int(chosen[prompt, question])
            if token in ends:
                unfinished.discard((question, prompt))
            else:
                answers[question][prompt].append(token)
        if not unfinished or step + 1 == max_new_tokens:
            break
        positions = positions + 1
        # More may be asked on what the pass has kept; what the steps keep is their own.
        attention = PackedAttention(segments, past=kept, use_up_past=step > 0, keep=True, check_cancelled=check_cancelled)
        hidden = mllm.engine.run(mllm.engine.embed(chosen), positions, attention)
        kept = attention.kept
    return answers
