"""The second half of the paper: points to candidates, candidates to tracklets, tracklets to masks of every frame."""

from .track import feature_cache, memory_needed, segment

__all__ = ["feature_cache", "memory_needed", "segment"]
