"""What memory PyTorch holds while something runs on a CPU, counted and not sampled."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from torch.profiler import ProfilerActivity, profile, record_function


class LiveMemory:
    """Within it, every allocation and release of PyTorch's CPU allocator is written down, those inside operators among them, such as the
    blocks of `scaled_dot_product_attention`. Not seen is what a library takes from the system by itself, as oneDNN does for repacked weights.

    `peak`: most bytes that were held at a time more than when it began. `peaks`: the same within each `named` function.
    """

    def __init__(self):
        self.peak, self.peaks = 0, {}
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> LiveMemory:
        self._profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        spans = [(event.name(), event.start_ns(), event.start_ns() + event.duration_ns()) for event in events if event.name().startswith(_MARK)]
        self.peaks = dict.fromkeys((name.removeprefix(_MARK) for name, *_ in spans), 0)
        held = 0
        for when, change in changes:
            held += change
            self.peak = max(self.peak, held)
            for name, begin, end in spans:
                if begin <= when <= end:
                    name = name.removeprefix(_MARK)
                    self.peaks[name] = max(self.peaks[name], held)


_MARK = "measured: "


def named(name: str, function: Callable) -> Callable:
    """The function, under a name in `LiveMemory.peaks`."""

    @wraps(function)
    def run(*args, **kwargs):
        with record_function(_MARK + name):
            return function(*args, **kwargs)

    return run
