"""The streamed last-row rollout against the dense formula and against a prefill without any rollout, at the shape of Qwen2.5-VL-7B."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from decaf.attention.rollout import CapturedQK, last_row_rollout

from .measure import Different, Failed, figures, measure, ratio

SUFFIX = 40
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative error of a row. Both sides are given the same numbers; a GPU may multiply them in bfloat16."""


@dataclass(frozen=True)
class Shape:
    """`layers` of a decoder, of which the upper half is rolled out. `prefilled`, `rolled`: how many are run here; all are alike, so a whole
    model's costs follow."""

    layers: int
    heads: int
    key_heads: int
    width: int
    inner: int
    prefilled: int
    rolled: int


SHAPES = {"cpu": Shape(28, 28, 4, 128, 18944, 1, 2), "cuda": Shape(28, 28, 4, 128, 18944, 28, 14)}


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def prepare_rows(device: str, shape: Shape, tokens: int, questions: int) -> tuple[CapturedQK, list[CapturedQK], Tensor]:
    """Queries and keys of a prompt: pictures, then a question, or several that share the pictures."""
    torch.manual_seed(0)
    pieces = []
    for length in (tokens - SUFFIX, *[SUFFIX] * questions):
        rows = CapturedQK(shape.width**-0.5)
        for layer in range(shape.rolled):
            rows.q[layer] = torch.randn(1, shape.heads, length, shape.width, device=device).mul_(1.2).to(_dtype(device))
            rows.k[layer] = torch.randn(1, shape.key_heads, length, shape.width, device=device).mul_(1.2).to(_dtype(device))
        pieces.append(rows)
    visual = torch.ones(tokens - SUFFIX, dtype=torch.bool)
    visual[:20] = False
    return pieces[0], pieces[1:], visual


def streamed(prefix: CapturedQK, suffixes: list[CapturedQK], visual: Tensor) -> list[float]:
    return last_row_rollout(prefix, suffixes, visual)[0][0].tolist()


def dense(prefix: CapturedQK, suffixes: list[CapturedQK], visual: Tensor) -> list[float]:
    """The formula as it stands: per layer H x L x L attention in float32, and the L x L product of all layers."""
    rollout = None
    for layer in sorted(prefix.q):
        queries = torch.cat([prefix.q[layer], suffixes[0].q[layer]], 2)
        keys = torch.cat([prefix.k[layer], suffixes[0].k[layer]], 2)
        mixed = dense_layer(queries, keys, prefix.scale, visual)
        rollout = mixed if rollout is None else mixed @ rollout
    return rollout[0, -1].tolist()


def dense_layer(queries: Tensor, keys: Tensor, scale: float, visual: Tensor) -> Tensor:
    """Queries (B, H, L, D) and keys (B, KV, L, D) -> (B, L, L): what a layer passes on. `visual` (P,), P <= L."""
    keys = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    scores = queries.float() @ keys.transpose(2, 3) * scale
    length = scores.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    attention = scores.masked_fill_(later, -torch.inf).softmax(-1)
    del scores
    seen = visual.nonzero()[:, 0]  # one run of positions
    strength = attention[..., seen[0] : seen[-1] + 1].amax(-1).mean(-1)
    weight = strength / strength.amax(-1, keepdim=True)
    return (attention * weight[..., None, None]).mean(1) * 0.5 + torch.eye(length, device=attention.device) * 0.5


def prepare_prefill(device: str, shape: Shape, tokens: int) -> tuple:
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=shape.heads * shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.prefilled,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2Model(config).to(_dtype(device)).eval()
        embeds = torch.randn(1, tokens, config.hidden_size, dtype=_dtype(device))
    return model, embeds


@torch.inference_mode()
def prefill(model, embeds: Tensor) -> None:
    model(inputs_embeds=embeds, use_cache=True)


def compare(found: list[float], expected: list[float], tolerance: float) -> float:
    """Relative error. Raises Different if it is too large."""
    found, expected = torch.tensor(found), torch.tensor(expected)
    error = float((found - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise Different(f"The rollouts differ by {error:.1e} (at most {tolerance:.0e} is rounding): nothing to compare.")
    return error


def run(device: str, lengths: list[int], repeats: int, shape: Shape | None = None) -> list[dict]:
    """One record per prompt length. The sides take turns; ratios are made of neighbours. Where the dense formula does not fit into memory
    its figures are missing."""
    shape = shape or SHAPES[device]
    return [_length(device, shape, length, repeats) for length in lengths]


def _length(device: str, shape: Shape, tokens: int, repeats: int) -> dict:
    ours, theirs, plain, both, errors = [], [], [], [], []
    for _ in range(repeats):
        cost, found = measure(prepare_rows, streamed, device, shape, tokens, 1)
        ours.append(cost)
        try:
            cost, expected = measure(prepare_rows, dense, device, shape, tokens, 1)
        except Failed:
            pass
        else:
            theirs.append(cost)
            errors.append(compare(found, expected, TOLERANCE[_dtype(device)]))
        both.append(measure(prepare_rows, streamed, device, shape, tokens, 2)[0])
        plain.append(measure(prepare_prefill, prefill, device, shape, tokens)[0])
    # Of a whole model: the prefill runs all layers, the rollout the upper half.
    whole, upper = shape.layers / shape.prefilled, shape.layers / 2 / shape.rolled
    row = {
        "tokens": tokens,
        "layers_rolled_out": shape.rolled,
        **figures("streamed", ours),
        "prefill_seconds_whole_model": whole * median(cost.seconds for cost in plain),
        "both_questions_seconds_whole_model": upper * median(cost.seconds for cost in both),
        "over_prefill": upper / whole * ratio(both, plain),
        "over_prefill_in_cpu_seconds": upper / whole * ratio(both, plain, "cpu_seconds"),
    }
    if len(theirs) == repeats:
        row |= figures("dense", theirs)
        row |= {
            "speedup": ratio(theirs, ours),
            "speedup_in_cpu_seconds": ratio(theirs, ours, "cpu_seconds"),
            "memory_ratio": ratio(ours, theirs, "bytes"),
            "relative_error": max(errors),
        }
    return row


def growth(rows: list[dict], figure: str) -> float:
    """The power of the number of tokens with which a figure grows, from the shortest to the longest prompt that has it."""
    rows = [row for row in rows if figure in row]
    first, last = rows[0], rows[-1]
    return math.log(last[figure] / first[figure]) / math.log(last["tokens"] / first["tokens"])


def summary(rows: list[dict]) -> dict[str, float]:
    found = {}
    for row in rows:
        for figure in ("speedup", "memory_ratio", "over_prefill"):
            if figure in row:
                found[f"rollout_{figure}_{row['tokens']}"] = row[figure]
    for figure in ("streamed_seconds", "streamed_bytes", "dense_seconds", "dense_bytes"):
        found[f"rollout_growth_{figure}"] = growth(rows, figure)
    return found


def table(rows: list[dict], shape: Shape) -> list[str]:
    lines = [
        f"Rollout of {rows[0]['layers_rolled_out']} layers, {shape.heads} heads, {shape.key_heads} key heads, {shape.width} wide: "
        "streamed last row against the dense formula; of the whole model, both questions, over a prefill without rollout",
        f"{'tokens':>8}{'streamed s':>12}{'dense s':>10}{'speedup':>9}{'streamed MB':>13}{'dense MB':>10}{'memory ratio':>14}"
        f"{'rollout s':>11}{'prefill s':>11}{'over prefill':>14}",
    ]
    for row in rows:
        theirs = (
            f"{row['dense_seconds']:>10.2f}{row['speedup']:>8.1f}x{row['streamed_bytes'] / 1e6:>13.0f}{row['dense_bytes'] / 1e6:>10.0f}"
            f"{row['memory_ratio']:>14.3f}"
            if "speedup" in row
            else f"{'-':>10}{'-':>9}{row['streamed_bytes'] / 1e6:>13.0f}{'-':>10}{'-':>14}"
        )
        lines.append(
            f"{row['tokens']:>8}{row['streamed_seconds']:>12.3f}{theirs}{row['both_questions_seconds_whole_model']:>11.2f}"
            f"{row['prefill_seconds_whole_model']:>11.2f}{row['over_prefill']:>14.3f}"
        )
    return lines
