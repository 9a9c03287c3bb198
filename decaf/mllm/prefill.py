"""Run a visual prefix once, then any number of questions on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import DecafError
from ..rollout import Rows, capture_attention
from .base import MLLM, Visual


class Prefix:
    """What a batch of prompts has in common: the pictures. Its visual tokens are encoded and prefilled once.

    The keys and values of the prefix stay in a cache that every question extends and that is cut back afterwards.
    """

    def __init__(
        self,
        mllm: MLLM,
        ids: Tensor,
        features: Tensor | None,
        positions: Tensor,
        start_layer: int,
        tick: Callable[[], None],
        *,
        room: int | None = None,
    ):
        """ids (B, P); features (B, V, width) for the visual tokens among them, None without pictures; positions: the first P `position_ids`
        of the prompts; room: bytes of the device for the prefix's queries, as `capture_attention` takes it."""
        self.mllm, self.start_layer, self.tick, self.length = mllm, start_layer, tick, ids.shape[1]
        self.cache = DynamicCache()
        embeds = mllm.model.get_input_embeddings()(ids.to(mllm.device))
        if features is not None:
            visual = _is_visual(mllm, ids).to(mllm.device)
            embeds[visual] = features.flatten(0, 1).to(embeds)
        self.rows, _ = self._run(embeds, positions, room=room)

    def _run(self, embeds: Tensor, positions: Tensor, *, to_the_end: bool = False, room: int | None = None) -> tuple[Rows, Tensor | None]:
        """Attention rows, and hidden states (B, n, width) if `to_the_end`, which only the next token needs."""
        positions = positions.to(embeds.device).expand(*positions.shape[:-2], len(embeds), -1)
        last_layer, hidden = None if to_the_end else self.mllm.layers - 1, None
        with capture_attention(self.start_layer, self.tick, room, last_layer) as rows:
            # A configuration may ask for all hidden states; transformers 4 would not let go of them when the pass ends early.
            kept = {"output_hidden_states": False, "output_attentions": False}
            out = self.mllm.text_tower(inputs_embeds=embeds, position_ids=positions, past_key_values=self.cache, use_cache=True, **kept)
            hidden = out.last_hidden_state
        return rows, hidden

    def ask(self, ids: Tensor, positions: Tensor, max_new_tokens: int = 0) -> tuple[Rows, list[list[int]]]:
        """Prefill one question, (n,) token ids after the prefix, and answer it greedily with up to `max_new_tokens`.

        Returns the question's attention rows and per prompt the answer's token ids (empty lists for 0 new tokens).
        """
        batch = self.cache_batch
        embed = self.mllm.model.get_input_embeddings()
        rows, hidden = self._run(embed(ids.to(self.mllm.device).expand(batch, -1)), positions, to_the_end=max_new_tokens > 0)
        answers = self._answer(hidden, positions, max_new_tokens) if max_new_tokens else [[] for _ in range(batch)]
        self.cache.crop(self.length - self.cache.get_seq_length())  # negative: how many to drop
        return rows, answers

    def next_logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, vocabulary) of the token after a question, (n,) token ids after the prefix."""
        embed, head = self.mllm.model.get_input_embeddings(), self.mllm.model.get_output_embeddings()
        _, hidden = self._run(embed(ids.to(self.mllm.device).expand(self.cache_batch, -1)), positions, to_the_end=True)
        self.cache.crop(self.length - self.cache.get_seq_length())
        return head(hidden[:, -1])

    @property
    def cache_batch(self) -> int:
        return next(iter(self.rows.queries.values())).shape[0]

    def _answer(self, hidden: Tensor, positions: Tensor, max_new_tokens: int) -> list[list[int]]:
        embed, head = self.mllm.model.get_input_embeddings(), self.mllm.model.get_output_embeddings()
        stops = end_tokens(self.mllm)
        place = positions[..., -1:]
        answers: list[list[int]] = [[] for _ in hidden]
        open_ = set(range(len(answers)))
        for step in range(max_new_tokens):
            chosen = head(hidden[:, -1:]).argmax(-1)
            for i in sorted(open_):
                token = int(chosen[i, 0])
                if token in stops:
                    open_.discard(i)
                else:
                    answers[i].append(token)
            if not open_ or step + 1 == max_new_tokens:
                break
            place = place + 1
            _, hidden = self._run(embed(chosen), place, to_the_end=True)
        return answers

    def set_aside(self) -> None:
        """Moves what is kept to host memory, between two questions."""
        self.rows.queries = {layer: query.cpu() for layer, query in self.rows.queries.items()}
        self._move_cache("cpu")

    def take_back(self) -> None:
        """Moves the cache to the model's device. The rollout fetches the queries itself, a layer at a time."""
        self._move_cache(self.mllm.device)

    def _move_cache(self, device: torch.device | str) -> None:
        """Layer by layer and in place: what runs out of memory halfway can be tried again."""
        for index, layer in enumerate(self.cache.layers):
            # A question that ran out of memory halfway has left its own keys in the lower layers: only the prefix's go along.
            layer.keys, layer.values = layer.keys[:, :, : self.length].to(device), layer.values[:, :, : self.length].to(device)
            if index in self.rows.keys:
                self.rows.keys[index] = layer.keys


def end_tokens(mllm: MLLM) -> set[int]:
    """Ids that end an answer."""
    listed = getattr(mllm.model.generation_config, "eos_token_id", None)
    ends = {listed} if isinstance(listed, int) else set(listed or ())
    ends.add(mllm.processor.tokenizer.eos_token_id)
    ends.discard(None)
    return ends


def _is_visual(mllm: MLLM, ids: Tensor) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted({mllm.family.token_id(mllm, kind) for kind in ("video", "image")})))


def lay_out(mllm: MLLM, visual: Visual, questions: list[str]) -> tuple[list[Tensor], Tensor, int]:
    """Prompts that ask `questions` about the same pictures: token ids (L_q,) of each, the mask (P,) of visual tokens in what they share, and
    the shared length P: as much as is equal, but the last token of no prompt."""
    prompts = [mllm.prompt_ids(visual, question) for question in questions]
    most = min(len(ids) for ids in prompts) - 1
    equal = torch.ones(most, dtype=torch.bool)
    for ids in prompts[1:]:
        equal &= ids[:most] == prompts[0][:most]
    shared = most if bool(equal.all()) else int(equal.int().argmin())
    mask = _is_visual(mllm, prompts[0])
    if int(mask.sum()) != visual.tokens or int(mask[:shared].sum()) != visual.tokens:
        raise DecafError(
            f"The chat template of {mllm.name} does not put the pictures, whole, before the question. Download the model's chat template again."
        )
    return prompts, mask[:shared], shared
