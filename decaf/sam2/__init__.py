"""Everything that knows the package `sam2`: loading its models, and running them below its predictor."""

from .build import SAM2, load_sam2

__all__ = ["SAM2", "load_sam2"]
