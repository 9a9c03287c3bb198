"""Which devices there are, and what room they have."""

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


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def free_memory(device: torch.device) -> int | None:
    """Bytes that PyTorch could still allocate on a GPU, what it keeps cached included; None for a device that has no memory of its own."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def empty_cache(device: torch.device) -> None:
    """Gives back what PyTorch holds on the device and nobody uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
