"""Loading a segmenter from its checkpoint, whichever it is: the names of the weights tell."""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import DecafError
from .report import Progress, Report, silent
from .sam2 import SAM2, load_sam2
from .sam2.checkpoint import open_checkpoint
from .sam3 import load_sam3
from .sam3.names import whose


def load_segmenter(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | Report = silent,
) -> SAM2:
    """Loads SAM 2, SAM 2.1 or the tracker of SAM 3. See `decaf.sam2.load_sam2` and `decaf.sam3.load_sam3`, whose errors these are.
    `progress`: callback or `Report`, which is called while a large file is read; may raise to stop."""
    file = open_checkpoint(path)
    try:
        sam3 = whose(file.names) is not None
    except DecafError as error:
        raise DecafError(f"{file.path} {error}.") from error
    if sam3:
        return load_sam3(file, device=device, dtype=dtype, progress=progress)
    return load_sam2(file, device=device, dtype=dtype)
