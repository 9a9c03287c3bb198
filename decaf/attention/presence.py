"""Whether the clip shows the queried object at all: the model's own yes or no, from one more short question behind the pictures.

The method as published masks something for every query. Asked "can it be seen?", a multimodal LLM tells more than its attention does, and
the answer costs no generation: the probabilities of "yes" and "no" as the next token are there after the prefill of the question. Works with
every model that says yes in one token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..mllm import MLLM


def yes_and_no(mllm: MLLM) -> tuple[list[int], list[int]]:
    """Token ids with which an answer "yes", and one "no", may begin; an empty list where the tokenizer has no single token for it."""
    tokenizer, known = mllm.tokenizer, mllm.engine.shape.vocabulary
    found = []
    for word in ("yes", "no"):
        spelled = [
            tokenizer.encode(space + form, add_special_tokens=False) for form in (word, word.title(), word.upper()) for space in ("", " ")
        ]
        found.append(sorted({ids[0] for ids in spelled if len(ids) == 1 and ids[0] < known}))
    return found[0], found[1]


def presence_score(logits: Tensor, yes: list[int], no: list[int]) -> float:
    """Share of "yes" in what the model gives to "yes" and "no", 0..1. `logits`: (vocabulary,) of the next token; `yes`, `no`: ids."""
    return float((logits[yes].float().logsumexp(0) - logits[no].float().logsumexp(0)).sigmoid())
