"""The MLLM stage against the plain way of the paper's reference, and against a plain prefill of the same pictures.

The plain way asks the object and the background question in prompts of their own: 2 of the clip and 2 of every key frame, and one without
pictures that chooses a name. It encodes and prefills every picture twice, one prompt at a time, answers every prompt, and multiplies dense
L x L matrices of attention in float32. Both sides are asked the same questions, so their maps can be compared.
"""

from __future__ import annotations

import contextlib
import tempfile
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import tiny_models
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, AutoTokenizer, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from decaf.attention.batches import ENOUGH_TOKENS, ENOUGH_TOKENS_ON_CPU
from decaf.attention.extract import extract_attention
from decaf.attention.frames import key_frames
from decaf.attention.questions import Templates, clean_query
from decaf.clips.base import Clip, clip_from_images
from decaf.demo.scenes import make_scene
from decaf.mllm import MLLM, Layout, registry
from decaf.mllm.engine import ATTENTION, TransformersEngine
from decaf.mllm.packed import pack
from decaf.report import Report

from .measure import Cost, Different, figures, measure, ratio
from .rollout import dense_layer

QUERY = "the red object"
ANSWER_TOKENS = 16
"""Generated per plain prompt. The reference stops at an end token or at 128; random models have no end."""

PLAIN = "benchmark_plain"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Relative error of a map. In bfloat16 the towers themselves round differently with every batch size and length of prompt."""


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5-VL with random weights. `text`, `vision`: entries of its configuration. `frame_size`: (H, W) of the clip in pixels."""

    text: dict
    vision: dict = field(default_factory=dict)
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    hidden: int = 3584
    tokens_per_frame: int = 400
    frame_size: tuple[int, int] = (720, 1280)
    frames: int = 16


_TOWER = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "fullatt_block_indexes": [7, 15, 23, 31]}
_SMALL_TOWER = {"depth": 8, "hidden_size": 384, "num_heads": 6, "intermediate_size": 1024, "fullatt_block_indexes": [3, 7]}
_SMALL = {"layers": 12, "heads": 12, "kv_heads": 2, "hidden": 768, "frame_size": (280, 364)}
SHAPES = {
    "3b": Shape({"intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True}, _TOWER, 36, 16, 2, 2048),
    "7b": Shape({"intermediate_size": 18944, "vocab_size": 152064}, _TOWER),
    "0.5b": Shape({"intermediate_size": 4864, "vocab_size": 32768, "tie_word_embeddings": True}, _SMALL_TOWER, 24, 14, 2, 896),
    "100m, 100 tokens": Shape({"intermediate_size": 2304, "vocab_size": 4096}, _SMALL_TOWER, tokens_per_frame=100, **_SMALL),
    "100m, 28 tokens": Shape({"intermediate_size": 2304, "vocab_size": 4096}, _SMALL_TOWER, tokens_per_frame=28, **_SMALL),
}


def build(shape: Shape, device: str, attention: str, dtype: torch.dtype | None = None) -> MLLM:
    """With weights that are drawn on the device; on the device "meta" without any. `dtype`: None takes bfloat16 on a GPU, else float32."""
    templates = Templates()
    words = " ".join([QUERY, templates.object, templates.background, templates.choose])
    with tempfile.TemporaryDirectory() as folder:
        numbers = {"layers": shape.layers, "heads": shape.heads, "kv_heads": shape.kv_heads, "hidden": shape.hidden}
        # As spread out at every width as the real width's 0.02: narrow models would otherwise attend to everything alike.
        text = {"initializer_range": 1.2 * shape.hidden**-0.5, **shape.text}
        tiny_models.write_files(folder, "qwen2_5_vl", **numbers, text=text, vision=shape.vision, known=words)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    torch.manual_seed(0)
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
    family = registry()[config.model_type]
    engine = TransformersEngine(model.eval().requires_grad_(False))
    engine.text_tower.set_attn_implementation(attention)
    return MLLM(engine, tokenizer, family, "random", family.vision_shape(config), family.mean, family.std)


def _prepare(device: str, shape: Shape, attention: str) -> tuple[MLLM, Clip, Shape]:
    scene = make_scene(1, size=shape.frame_size, length=shape.frames, lively=False)
    return build(shape, device, attention), clip_from_images(torch.from_numpy(scene.frames)), shape


def prepare_ours(device: str, shape: Shape):
    mllm, *rest = _prepare(device, shape, ATTENTION)
    mllm.family.prepare(mllm.model)  # as `load_mllm` does
    return mllm, *rest


def prepare_plain(device: str, shape: Shape):
    return _prepare(device, shape, PLAIN)


def prepare_prefill(device: str, shape: Shape):
    return _prepare(device, shape, "sdpa")


# -- the three runs: each returns maps (video and frames of the object question, then of the background's) and what it did ----------------------


def ours(mllm: MLLM, clip: Clip, shape: Shape) -> tuple[list[np.ndarray], dict]:
    report = Report()
    found = extract_attention(mllm, clip, QUERY, tokens_per_frame=shape.tokens_per_frame, progress=report)
    return [grid.numpy() for each in found for grid in (each.video, each.frame)], report.counts


@torch.inference_mode()
def plain(mllm: MLLM, clip: Clip, shape: Shape) -> tuple[list[np.ndarray], dict]:
    counts = {"prompts": 0, "visual_tokens_prefilled": 0, "tokens_generated": 0}
    frames = [clip[index] for index in key_frames(len(clip))]
    templates, query = Templates(), clean_query(QUERY)
    video, image = layouts(mllm, frames, shape)
    maps = []
    for question in (templates.ask_object(query), templates.ask_background(query)):
        maps.append(_plain_prompt(mllm, video, frames, question, counts))
        maps.append(np.concatenate([_plain_prompt(mllm, image, [frame], question, counts) for frame in frames]))
    _plain_prompt(mllm, None, [], templates.ask_choice(query, ["object"]), counts)
    return maps, counts


def layouts(mllm: MLLM, frames: list[Tensor], shape: Shape, batch: int = 1) -> tuple[Layout, Layout]:
    """The layout of all frames as one video, and of `batch` of them as images."""
    family, size = mllm.family, tuple(frames[0].shape[:2])
    video = family.video_layout(mllm.vision, size, [float(index) for index in range(len(frames))], shape.tokens_per_frame)
    return video, family.image_layout(mllm.vision, size, batch, shape.tokens_per_frame)


@torch.inference_mode()
def prefill(mllm: MLLM, clip: Clip, shape: Shape) -> None:
    """The pictures through the vision tower and the decoder once, in batches as large as ours may be."""
    frames = [clip[index] for index in key_frames(len(clip))]
    video, image = layouts(mllm, frames, shape)
    enough = ENOUGH_TOKENS_ON_CPU if mllm.device.type == "cpu" else ENOUGH_TOKENS
    batch = max(1, max(video.tokens, enough) // image.tokens)
    shown = [(video, frames)]
    for first in range(0, len(frames), batch):
        some = frames[first : first + batch]
        shown.append((layouts(mllm, frames, shape, len(some))[1], some))
    for layout, some in shown:
        packed = pack(mllm, layout, [QUERY])
        _forward(mllm, layout, some, packed.shared_ids, packed.visual, packed.positions[0][:, : len(packed.shared_ids)], DynamicCache())


def _forward(mllm: MLLM, layout: Layout | None, frames, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache):
    """Encode the pictures and prefill the prompt. Returns hidden states and the last position."""
    batch = layout.batch if layout is not None else 1
    embeds = mllm.engine.embed(ids.expand(batch, -1))
    if layout is not None:
        encoded = mllm.family.encode(mllm, layout, mllm.family.pixels(mllm, layout, frames))
        embeds[:, mask.to(mllm.device)] = encoded.tokens.to(embeds)
    positions = positions.to(mllm.device)[:, None].expand(-1, batch, -1)
    tower = mllm.engine.text_tower
    hidden = tower(inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True).last_hidden_state
    return hidden, positions[..., -1:]


def _plain_prompt(mllm: MLLM, layout: Layout | None, frames: list[Tensor], question: str, counts: dict) -> np.ndarray | None:
    """One prompt: its map (1 or slots, rows, cols), and an answer that nobody reads."""
    packed = pack(mllm, layout, [question])
    ids = torch.cat([packed.shared_ids, packed.question_ids[0]])
    mask = torch.cat([packed.visual, torch.zeros(len(packed.question_ids[0]), dtype=torch.bool)])
    cache = DynamicCache()
    dense = _Dense(mllm.layers // 2, None if layout is None else mask)
    with dense.at_work() if layout is not None else contextlib.nullcontext():
        hidden, place = _forward(mllm, layout, frames, ids, mask, packed.positions[0], cache)
    for _ in range(ANSWER_TOKENS - 1):
        chosen = mllm.model.get_output_embeddings()(hidden[:, -1:]).argmax(-1)
        place = place + 1
        embeds = mllm.model.get_input_embeddings()(chosen)
        tower = mllm.engine.text_tower
        hidden = tower(inputs_embeds=embeds, position_ids=place, past_key_values=cache, use_cache=True).last_hidden_state
    mllm.model.get_output_embeddings()(hidden[:, -1:]).argmax(-1)
    counts["prompts"] += 1
    counts["tokens_generated"] += ANSWER_TOKENS
    if layout is None:
        return None
    counts["visual_tokens_prefilled"] += layout.tokens
    return layout.to_grid(dense.rollout[:, -1][:, dense.visual])[0].cpu().numpy()


@dataclass
class _Dense:
    """The rollout of a prefill, layer by layer as the formula says."""

    start: int
    visual: Tensor | None
    rollout: Tensor | None = None

    @contextlib.contextmanager
    def at_work(self):
        token = _dense.set(self)
        try:
            yield
        finally:
            _dense.reset(token)


_dense: ContextVar[_Dense | None] = ContextVar("benchmark_dense", default=None)


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    dense = _dense.get()
    if dense is not None and module.layer_idx >= dense.start:
        mixed = dense_layer(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, dense.visual)
        dense.rollout = mixed if dense.rollout is None else mixed @ dense.rollout
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(PLAIN, _attention)
AttentionMaskInterface.register(PLAIN, sdpa_mask)


# -- the comparison ----------------------------------------------------------------------------------------------------------------------------


def compare(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> float:
    """The largest relative error of a map. Raises Different if it is too large."""
    error = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, expected, strict=True))
    if not error <= tolerance:
        raise Different(f"The attention maps differ by {error:.1e} (at most {tolerance:.0e} is rounding): nothing to compare.")
    return error


def run(device: str, shapes: list[str], repeats: int) -> list[dict]:
    return [run_shape(device, name, SHAPES[name], repeats) for name in shapes]


def run_shape(device: str, name: str, shape: Shape, repeats: int) -> dict:
    costs: dict[str, list[Cost]] = {"ours": [], "plain": [], "prefill": []}
    error = 0.0
    for _ in range(repeats):
        cost, (found, counts) = measure(prepare_ours, ours, device, shape)
        costs["ours"].append(cost)
        cost, (expected, plain_counts) = measure(prepare_plain, plain, device, shape)
        costs["plain"].append(cost)
        error = max(error, compare(found, expected, TOLERANCE[torch.bfloat16 if device == "cuda" else torch.float32]))
        costs["prefill"].append(measure(prepare_prefill, prefill, device, shape)[0])
    row = {"shape": name, "tokens_per_frame": shape.tokens_per_frame}
    for side, each in costs.items():
        row |= figures(side, each)
    return row | {
        "speedup": ratio(costs["plain"], costs["ours"]),
        "speedup_in_cpu_seconds": ratio(costs["plain"], costs["ours"], "cpu_seconds"),
        "over_prefill": ratio(costs["ours"], costs["prefill"]),
        "relative_error": error,
        "ours_did": counts,
        "plain_did": plain_counts,
    }


def summary(rows: list[dict]) -> dict[str, float]:
    """Of the last shape, and of each by name."""
    found = {"mllm_speedup": rows[-1]["speedup"], "mllm_over_prefill": rows[-1]["over_prefill"]}
    if len(rows) > 1:
        found |= {f"mllm_{figure}_{row['shape']}": row[figure] for row in rows for figure in ("speedup", "over_prefill")}
    return found


def table(rows: list[dict]) -> list[str]:
    lines = [
        f"MLLM stage, 16 key frames: ours against the plain way of {rows[0]['plain_did']['prompts']} prompts, {ANSWER_TOKENS} tokens generated for "
        "each, and over the plain prefill of the same pictures",
        f"{'shape':>20}{'tokens/frame':>14}{'ours s':>9}{'plain s':>9}{'speedup':>9}{'prefill s':>11}{'over prefill':>14}{'ours MB':>9}"
        f"{'plain MB':>10}",
    ]
    for row in rows:
        lines.append(
            f"{row['shape']:>20}{row['tokens_per_frame']:>14}{row['ours_seconds']:>9.2f}{row['plain_seconds']:>9.2f}{row['speedup']:>8.1f}x"
            f"{row['prefill_seconds']:>11.2f}{row['over_prefill']:>14.2f}{row['ours_bytes'] / 1e6:>9.0f}{row['plain_bytes'] / 1e6:>10.0f}"
        )
    return lines
