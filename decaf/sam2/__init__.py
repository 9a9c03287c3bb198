"""Everything that knows the package `sam2`: loading its models, and running them below its predictor, as a segmenter for `decaf.tracking`."""

from .build import load_sam2
from .download import PUBLISHED, download_checkpoint
from .segmenter import SAM2

__all__ = ["PUBLISHED", "SAM2", "download_checkpoint", "load_sam2"]
