"""DecAF: training-free video reasoning segmentation with a multimodal LLM's attention and SAM 2 (arXiv 2510.19592).

`decaf.segment_clip` runs the whole method; every stage is a module of its own. Nothing heavy is imported before it is used.
"""

from importlib import import_module

__version__ = "0.2.0"

_WHERE = {
    "Attention": "data",
    "FusedAttention": "data",
    "SAM2Prompts": "data",
    "Track": "data",
    "Tracks": "data",
    "DecafError": "errors",
    "Templates": "attention.questions",
    "extract_attention": "attention.extract",
    "extract_attentions": "attention.extract",
    "key_frames": "attention.frames",
    "object_background_fusion": "attention.fusion",
    "frame_fusion": "attention.fusion",
    "coarse_masks": "attention.fusion",
    "attention_points": "attention.points",
    "load_mllm": "mllm",
    "find_mllm": "mllm",
    "load_sam2": "sam2",
    "load_sam3": "sam3",
    "load_segmenter": "segmenters",
    "segment": "tracking",
    "open_clip": "clips",
    "clip_from_images": "clips",
    "refine": "finishing",
    "apply_mask": "finishing",
    "segment_clip": "pipeline",
    "Sample": "evaluation.samples",
    "evaluate": "evaluation.samples",
    "segment_attention": "pipeline",
    "Report": "report",
    "AttentionSettings": "settings",
    "FusionSettings": "settings",
    "PointSettings": "settings",
    "TrackingSettings": "settings",
    "RefineSettings": "settings",
    "EffectSettings": "settings",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__():
    return sorted(__all__)
