"""The second half of the paper: points to candidates, candidates to tracklets, tracklets to masks of every frame; and corrections by hand."""

from .correction import Marks, correct, is_kept
from .memo import TrackMemo
from .track import feature_cache, memory_needed, needs_model, segment

__all__ = ["Marks", "TrackMemo", "correct", "feature_cache", "is_kept", "memory_needed", "needs_model", "segment"]
