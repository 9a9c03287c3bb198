"""Which devices there are, how much memory is free, and how errors say that there is none left."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from traceback import clear_frames

import torch

from .errors import DecafError, reason

# torch.OutOfMemoryError is the allocator's on CUDA and ROCm alone. Libraries below it, drivers and the other devices say it in words, in
# RuntimeErrors of their own.
_GPU_WORDS = (
    "out of memory",
    "out_of_memory",
    "outofmemory",
    "alloc_failed",
    "out_of_device_memory",
    "out_of_resources",
    "gpu video memory",
)
_HOST_WORDS = ("defaultcpuallocator", "out_of_host_memory", "bad_alloc", "cannot allocate memory", "can't allocate memory")
_CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, and hipErrorOutOfMemory


class OutOfMemoryError(DecafError, torch.OutOfMemoryError):
    """Memory ran out, and doing less at a time did not help. A sentence for people; to a host it is PyTorch's own error, so that it frees
    memory. The other kinds are made into this one too: some cannot be made of a text, and no host knows all of them."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that a device's memory, or the host's, did not suffice, whoever raised it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY or _says(error, _GPU_WORDS + _HOST_WORDS)


def is_device_failure(error: BaseException) -> bool:
    """Whether a device broke off what it was doing, for other reasons than memory: nothing that a model's files would explain."""
    accelerator = getattr(torch, "AcceleratorError", ())
    return isinstance(error, accelerator) or (isinstance(error, RuntimeError) and _says(error, ("cuda error", "hip error", "xpu error")))


def out_of_memory(error: Exception, what: str, remedy: str) -> OutOfMemoryError:
    """The error for memory that ran out in `what`, also with smaller batches. `remedy`: what helps where it is a GPU's."""
    if of_the_host(error):
        whose, remedy = "The computer's memory", "Close other programs, or give a shorter clip or smaller frames."
    else:
        whose = "GPU memory"
    return OutOfMemoryError(f"{whose} ran out during {what}, also with smaller batches. {remedy}")


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Within it, memory that runs out is an `OutOfMemoryError` that says `what` could not be done for lack of it, and the remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DecafError) or not is_out_of_memory(error):
            raise
        whose = "The computer's memory" if of_the_host(error) else "The GPU's memory"
        raise OutOfMemoryError(f"{whose} does not suffice {what}. {remedy}") from error


def of_the_host(error: BaseException) -> bool:
    """Whether it was the memory of the host that did not suffice."""
    return isinstance(error, MemoryError) or (not isinstance(error, torch.OutOfMemoryError) and _says(error, _HOST_WORDS))


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    said = str(error).lower()
    return any(word in said for word in words)


def empty_caches() -> None:
    """Hands back the memory that PyTorch keeps for later, on every device that has some."""
    for device in (torch.cuda, getattr(torch, "xpu", None)):
        if device is not None and device.is_initialized():
            with suppress(RuntimeError):  # of the launch that failed: a driver reports it again in the next call, which is this one
                device.synchronize()
            device.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


class attempt:  # noqa: N801 (used like a function)
    """`with attempt(counts): return step()`. If memory runs out in it, the program goes on behind it: `counts` are what they were before, as
    nothing came of what they count, and the tensors of the failed try and PyTorch's caches are gone. Other errors pass."""

    def __init__(self, counts: MutableMapping[str, int]):
        self._counts, self._before = counts, dict(counts)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        self._counts.clear()
        self._counts.update(self._before)
        while error is not None:
            clear_frames(error.__traceback__)  # they hold the tensors of the failed try
            error = error.__cause__ or error.__context__
        empty_caches()
        return True


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name. DecafError if PyTorch does not know it or finds none here, before a model is loaded for it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a PyTorch built without a device's support asserts
        if is_out_of_memory(error):
            raise
        raise DecafError(
            f"PyTorch {torch.__version__} cannot use the device {name} here ({reason(error)}). Choose another, for example cpu."
        ) from error
    return device


def cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has units for products of bfloat16 matrices (AMX), and PyTorch knows of them.

    On a Xeon with AMX products were 6 times faster than in float32. With the older instructions of AVX512_BF16 alone they were 1.6 times slower.
    """
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)  # from PyTorch 2.6 on
    return bool(known and known())


def language_dtype(device: torch.device, stored: torch.dtype | None = None) -> torch.dtype:
    """In which number format a language model computes on a device: bfloat16 where it can, emulated or not, else float32. On a CPU that is where
    products of bfloat16 are fast and the weights are `stored` so, since then nothing of them is lost.

    Never float16: activations of Qwen's models pass its largest number. GPUs before Ampere only emulate bfloat16, slowly, but in float32
    the weights would take twice the memory, which those cards do not have.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if stored == torch.bfloat16 and cpu_multiplies_bfloat16() else torch.float32
    return torch.bfloat16


def mixed_dtype(device: torch.device) -> torch.dtype:
    """In which number format SAM 2 computes on a device: bfloat16 on a GPU that has it natively, as SAM 2 was trained, else float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def chosen_dtype(name: str, auto: torch.dtype) -> torch.dtype:
    """The dtype that an option names: "auto", or PyTorch's own name of one."""
    return auto if name == "auto" else getattr(torch, name)


def allocated_bytes(device: torch.device) -> int | None:
    """Bytes that live tensors of this process take on a GPU; None for a device that has no memory of its own."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def free_memory(device: torch.device) -> int | None:
    """Bytes that PyTorch could still allocate on a GPU, what it keeps cached included; None for a device that has no memory of its own."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def choose_device(name: str) -> torch.device:
    """The device that --device names, "auto" the fastest there is. DecafError if there is no such one here."""
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(one for one in ("cuda", "mps", "cpu") if has[one]))
    if not has[name]:
        raise DecafError(
            f"--device {name} was asked for, but PyTorch {torch.__version__} finds no such device here. Use --device auto or cpu."
        )
    return torch.device(name)
