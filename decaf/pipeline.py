"""Clip and query in, masks out: the stages of the method in their order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .attention.extract import extract_attention
from .attention.fusion import frame_fusion, object_background_fusion
from .attention.points import attention_points
from .attention.presence import THRESHOLD as PRESENCE_THRESHOLD
from .attention.questions import Templates, clean_query
from .clips import Clip
from .data import Attention, FusedAttention, SAM2Prompts, Tracks
from .errors import DecafError
from .mllm import MLLM
from .report import Progress, silent
from .sam2 import SAM2
from .sam2.frames import FeatureCache
from .tracking import segment


@dataclass(frozen=True)
class Result:
    """What every stage made of the clip. `counts`: work done (see `extract_attention` and `segment`); `seconds`: wall time per stage."""

    object: Attention
    background: Attention
    contrast: Attention
    fused: FusedAttention
    prompts: SAM2Prompts
    tracks: Tracks
    counts: dict[str, int]
    seconds: dict[str, float]


def segment_clip(
    mllm: MLLM | None,
    sam2: SAM2,
    clip: Clip,
    query: str,
    *,
    attention: tuple[Attention, Attention] | None = None,
    setting: str = "expression",
    max_key_frames: int = 16,
    tokens_per_frame: int = 400,
    templates: Templates | None = None,
    start_layer: int | None = None,
    point_threshold: float = 0.8,
    presence_threshold: float = PRESENCE_THRESHOLD,
    score_threshold: float = 0.8,
    progress: Progress = silent,
    features: FeatureCache | None = None,
) -> Result:
    """Masks of what `query` refers to, for every frame of the clip.

    Args:
        mllm: asked about the clip; may be None if `attention` is given.
        attention: (object, background) from `extract_attention` of the same clip and query, to go on from.
        point_threshold: fused attention, 0..1, from which a cell prompts SAM 2.
        presence_threshold: presence, 0..1, below which nothing is masked; 0 always masks the best match.
        score_threshold: score, 0..1, above which a tracklet is kept; if none is, the best one is kept.
        features: image features of the clip that several queries share; see `feature_cache`.
        The rest as in `extract_attention`.

    Raises DecafError for input that a stage cannot work with.
    """
    counts: dict[str, int] = {}
    seconds: dict[str, float] = {}
    if attention is None:
        if mllm is None:
            raise DecafError("segment_clip was given neither an MLLM nor attention. Load an MLLM, or pass the attention of an earlier run.")
        with _timed(seconds, "attention"):
            attention = extract_attention(
                mllm, clip, query, setting=setting, max_key_frames=max_key_frames, tokens_per_frame=tokens_per_frame,
                templates=templates, start_layer=start_layer, progress=progress, counts=counts,
            )  # fmt: skip
    elif attention[0].query != clean_query(query):
        raise DecafError(
            f'The query is "{clean_query(query)}", but the attention was asked for "{attention[0].query}". Extract the attention again, or '
            "give the query that it belongs to."
        )
    with _timed(seconds, "fusion"):
        contrast = object_background_fusion(*attention)
        fused = frame_fusion(contrast)
        prompts = attention_points(fused, threshold=point_threshold, presence_threshold=presence_threshold)
    with _timed(seconds, "segmentation"):
        tracks = segment(sam2, clip, prompts, score_threshold=score_threshold, progress=progress, counts=counts, features=features)
    return Result(*attention, contrast, fused, prompts, tracks, counts, seconds)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
