"""Masks made ready for use: refined, and applied to the clip."""

from .apply import apply_mask
from .given import tracks_from_masks
from .refine import refine
from .sound import SoundFile, SoundWave

__all__ = ["SoundFile", "SoundWave", "apply_mask", "refine", "tracks_from_masks"]
