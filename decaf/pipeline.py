"""Clip and query in, masks out: the stages of the method in their order."""

from __future__ import annotations

from dataclasses import dataclass

from .attention.extract import extract_attention
from .attention.fusion import frame_fusion, object_background_fusion
from .attention.points import attention_points
from .attention.questions import Templates
from .clips import Clip
from .data import Attention, FusedAttention, SAM2Prompts, Tracks
from .mllm import MLLM
from .report import Progress, Report, silent
from .sam2 import SAM2
from .settings import MAPS, METHODS, FusionSettings, PointSettings, TrackingSettings, check_choice, settings_of
from .tracking import segment
from .tracking.frames import FeatureCache


@dataclass(frozen=True)
class Result:
    """What every stage made of the clip. `counts`: work done (see `extract_attention` and `segment`); `seconds`: wall time per stage. Both
    are those of the `Report` that was given, if one was."""

    object: Attention
    background: Attention
    contrast: Attention
    fused: FusedAttention
    prompts: SAM2Prompts
    tracks: Tracks
    counts: dict[str, int]
    seconds: dict[str, float]


def segment_clip(
    mllm: MLLM,
    sam2: SAM2,
    clip: Clip,
    query: str,
    *,
    templates: Templates | None = None,
    progress: Progress | Report = silent,
    features: FeatureCache | None = None,
    **settings,
) -> Result:
    """Masks of what `query` refers to, for every frame of the clip: the whole method.

    Args:
        templates: question wording; None takes our own.
        progress: callback, called with (done, total, what) all the while, which may raise to cancel; or a `Report`.
        features: image features of the clip that several queries share; see `feature_cache`.
        settings: by name, fields of `AttentionSettings`, `FusionSettings`, `PointSettings` and `TrackingSettings`.

    Raises DecafError for input that a stage cannot work with.
    """
    shown, points, tracking, fusion = settings_of(settings)
    report = Report.of(progress)
    attention = extract_attention(mllm, clip, query, shown, templates=templates, progress=report)
    return segment_attention(sam2, clip, attention, points=points, tracking=tracking, fusion=fusion, progress=report, features=features)


def fused_attention(
    attention: tuple[Attention, Attention], fusion: FusionSettings | None = None, *, method: str = METHODS[0]
) -> tuple[Attention, FusedAttention]:
    """The attention that is fused, and the map that it gives: of (object, background) attention their contrast, by `method`. Without contrast it is
    the object attention as it is. DecafError as in `frame_fusion`, or there are no such maps."""
    fusion = fusion or FusionSettings()
    check_choice("choice of maps", fusion.maps, MAPS)
    one = object_background_fusion(*attention) if fusion.contrast else attention[0]
    if fusion.maps == MAPS[0]:
        return one, frame_fusion(one, method=method)
    if fusion.maps == MAPS[1]:
        return one, frame_fusion(one, video_weight=1)
    return one, frame_fusion(one, video_weight=0, method=METHODS[1])  # "agreement" would ask the video's map


def segment_attention(
    sam2: SAM2,
    clip: Clip,
    attention: tuple[Attention, Attention],
    *,
    points: PointSettings | None = None,
    tracking: TrackingSettings | None = None,
    fusion: FusionSettings | None = None,
    progress: Progress | Report = silent,
    features: FeatureCache | None = None,
) -> Result:
    """Masks from the (object, background) attention that `extract_attention` took from the same clip. The rest as in `segment_clip`."""
    points, tracking = points or PointSettings(), tracking or TrackingSettings()
    report = Report.of(progress)
    with report.stage("fusion"):
        contrast, fused = fused_attention(attention, fusion, method=tracking.method)
        prompts = attention_points(fused, threshold=points.point_threshold, presence_threshold=points.presence_threshold)
    tracks = segment(sam2, clip, prompts, tracking, progress=report, features=features)
    return Result(*attention, contrast, fused, prompts, tracks, dict(report.counts), dict(report.seconds))
