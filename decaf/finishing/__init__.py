"""Masks made ready for use: refined, and applied to the clip."""

from .apply import apply_mask, write_pictures
from .given import tracks_from_masks
from .read_alpha import read_with_alpha
from .refine import refine
from .sound import SoundFile, SoundWave

__all__ = ["SoundFile", "SoundWave", "apply_mask", "read_with_alpha", "refine", "tracks_from_masks", "write_pictures"]
