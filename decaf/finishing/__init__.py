"""Masks made ready for use: refined, and applied to the clip."""

from .apply import apply_mask, apply_mask_each
from .given import tracks_from_masks
from .pictures import PICTURES, write_pictures
from .read_alpha import fullest_frame, read_with_alpha
from .refine import refine
from .sound import SoundFile, SoundWave
from .tags import copy_with_tags

__all__ = [
    "PICTURES", "SoundFile", "SoundWave", "apply_mask", "apply_mask_each", "copy_with_tags", "fullest_frame", "read_with_alpha", "refine",
    "tracks_from_masks", "write_pictures",
]  # fmt: skip
