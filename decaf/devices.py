"""Which devices there are."""

from __future__ import annotations

import torch

from .errors import DecafError


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name. DecafError if PyTorch does not know it or finds none here, before a model is loaded for it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # a PyTorch built without a device's support asserts
        reason = str(error).splitlines()[0].split(". ")[0]
        raise DecafError(
            f"PyTorch {torch.__version__} cannot use the device {name} here ({reason}). Choose another, for example cpu."
        ) from error
    return device
