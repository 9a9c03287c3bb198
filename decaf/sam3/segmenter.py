"""A loaded SAM 3 as the segmenter that `decaf.tracking` asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..sam2.segmenter import SAM2
from ..sam2.trial import Ways
from .encoder import encoder_bytes
from .steps import Sam3FastSteps, Sam3PackageSteps


@dataclass(frozen=True)
class SAM3(SAM2):
    """As `SAM2`, around a `SAM2Base` with SAM 3's image encoder."""

    title: ClassVar[str] = "SAM 3"
    ways: ClassVar[Ways] = Ways(Sam3PackageSteps, Sam3FastSteps, encode_alike=True)

    def _encoder_bytes(self) -> int:
        return encoder_bytes(self.model)
