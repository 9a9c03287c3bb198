"""Only until `pipeline` and `command.segment` import this from where it is now."""

from ..tracking.frames import FeatureCache

__all__ = ["FeatureCache"]
