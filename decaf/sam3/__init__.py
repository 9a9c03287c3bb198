"""SAM 3's tracker, which is SAM 2.1's behind another image encoder: the tracker runs on the package `sam2` as SAM 2 does, the image encoder is
transformers'."""

from .build import load_sam3
from .segmenter import SAM3

__all__ = ["SAM3", "load_sam3"]
