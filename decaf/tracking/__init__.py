"""SAM 2: models from checkpoints, points to masks, masks through the clip."""

from .build import SAM2, load_sam2
from .segmentation import feature_cache, segment

__all__ = ["SAM2", "feature_cache", "load_sam2", "segment"]
