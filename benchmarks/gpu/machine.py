"""The device that is measured, and its memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from counted_memory import Alive

from decaf.devices import empty_caches, free_memory

from .promises import Unsuitable

OLDEST = (8, 0)
"""Compute capability below which neither bfloat16 nor the fused kernel runs as intended."""


@dataclass
class Peak:
    """Bytes at the peak above what stood there before; known when the work is over."""

    bytes: int = 0


class Memory(Protocol):
    def peak(self) -> Iterator[Peak]:
        """`with memory.peak() as peak:` around work whose peak is wanted."""

    def leave(self, room: int) -> Iterator[None]:
        """Within it, no more than `room` bytes can be allocated beside what stands there already."""


class GPUMemory:
    """What PyTorch's allocator counts; room is left by filling the rest of the card with one tensor."""

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        torch.cuda.synchronize()
        empty_caches()
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), Peak()
        yield peak
        torch.cuda.synchronize()
        peak.bytes = torch.cuda.max_memory_allocated() - before

    @contextmanager
    def leave(self, room: int) -> Iterator[None]:
        torch.cuda.synchronize()
        empty_caches()
        free, _ = torch.cuda.mem_get_info()
        if free < room:
            raise Unsuitable(f"{room / 1e9:.1f} GB must be free, and {free / 1e9:.1f} GB are")
        ballast = torch.empty(free - room, dtype=torch.uint8, device="cuda")
        try:
            yield
        finally:
            del ballast
            empty_caches()


class CountedMemory:
    """Tensors that are alive; room is what further ones may take."""

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        peak = Peak()
        with Alive() as alive:
            yield peak
        peak.bytes = alive.most

    @contextmanager
    def leave(self, room: int) -> Iterator[None]:
        with Alive(room):
            yield


@dataclass(frozen=True)
class Machine:
    """`toy`: whether sizes are such that a CPU is soon done. `name`: of the card."""

    device: torch.device
    memory: Memory
    toy: bool
    name: str

    @property
    def free(self) -> int | None:
        """Bytes that could be allocated now; None where nobody knows."""
        empty_caches()
        return free_memory(self.device)

    def need(self, size: int) -> None:
        """Unsuitable: so many bytes are not free."""
        free = self.free
        if free is not None and free < size:
            raise Unsuitable(f"it takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")

    def seconds(self, work, *arguments) -> float:
        """Wall time of work, until the device is done with it."""
        self.wait()
        start = time.perf_counter()
        work(*arguments)
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def why_no_gpu() -> str | None:
    """Why the checks cannot be run on a GPU here; None if they can."""
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU that PyTorch can use"
    if torch.version.hip is not None:
        return "the GPU is AMD's; the figures are for NVIDIA's"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; it takes {OLDEST[0]}.{OLDEST[1]}"
    return None


def on_gpu() -> Machine:
    """The first GPU. Unsuitable: there is none."""
    if reason := why_no_gpu():
        raise Unsuitable(reason)
    return Machine(torch.device("cuda"), GPUMemory(), False, torch.cuda.get_device_name())


def on_cpu() -> Machine:
    """This machine's CPU in the place of a GPU, at toy sizes."""
    return Machine(torch.device("cpu"), CountedMemory(), True, "CPU")
