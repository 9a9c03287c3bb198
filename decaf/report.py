"""How a long step reports what it does, and how it is cancelled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

Progress = Callable[[int, int, str], None]
"""`progress(done, total, what)`: `done` of `total` units of the step named `what`. It may raise to cancel the step."""


def silent(done: int, total: int, what: str) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class Preview:
    """What there is to see of a step while it works: one frame, and what was found in it.

    Attributes:
        index: of the frame in the clip.
        frame: (H, W, 3) uint8.
        heat: attention (rows, cols), any values, the frame's own largest being the strongest; None in a step that makes masks.
        masks: (h, w) bool of any size, stretched over the frame; one per object.
    """

    index: int
    frame: Tensor
    heat: Tensor | None = None
    masks: Sequence[Tensor] = ()


class Report:
    """What a run has done and how long it took, and the one place through which it is cancelled.

    Every function of the library that takes `progress` takes a plain callback or a `Report`. Give a `Report` to read its `counts` and
    `seconds` afterwards; they add up over all that it is given to.

        report = Report(callback)
        extract_attention(mllm, clip, "the dog", progress=report)
        report.counts["forward_passes"], report.seconds["attention"]

    Args:
        callback: called with every progress. What it raises cancels the work, whatever exception that is.
        watch: called with a function whenever there is something new to see; that function makes the `Preview`, which costs time, so it is to
            be called only for somebody who looks, a few times a second. None: nobody does.

    Attributes:
        counts: work done, by name.
        seconds: wall time by stage.
    """

    def __init__(self, callback: Progress = silent, watch: Callable[[Callable[[], Preview]], None] | None = None):
        self.counts: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._callback, self._watch = callback, watch
        self._last: tuple[int, int, str] | None = None
        self._raised: BaseException | None = None

    @classmethod
    def of(cls, progress: Progress | Report) -> Report:
        """The report itself, or a new one around a callback."""
        return progress if isinstance(progress, Report) else cls(progress)

    def progress(self, done: int, total: int, what: str) -> None:
        """Reports `done` of `total` units of the step named `what`, and raises if the callback cancels."""
        self._last = done, total, what
        try:
            self._callback(done, total, what)
        except BaseException as error:
            self._raised = error
            raise

    def preview(self, make: Callable[[], Preview]) -> None:
        """Offers something to see. `make` is called only if somebody looks, and before this returns. Raises if
        whoever looks cancels."""
        if self._watch is not None:
            try:
                self._watch(make)
            except BaseException as error:
                self._raised = error
                raise

    def check_cancelled(self) -> None:
        """Gives the callback a chance to cancel: repeats the latest progress, if there was any."""
        if self._last is not None:
            self.progress(*self._last)

    def cancelled_by(self, error: BaseException | None) -> bool:
        """Whether the error is what the callback raised, or was raised because of that. It must pass through code that explains others."""
        while error is not None:
            if error is self._raised:
                return True
            error = error.__cause__ or error.__context__
        return False

    def count(self, name: str, number: int = 1) -> None:
        """Adds to a count; 0 makes sure that it is there."""
        self.counts[name] = self.counts.get(name, 0) + number

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Within it, time goes to `seconds[name]`, also if it ends in an error."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def attempt(self) -> AbstractContextManager[None]:
        """`with report.attempt(): return step()`. If memory runs out in it, the program goes on behind it, and `counts` are what they were
        before: nothing came of what they count. See `decaf.devices.attempt`."""
        from .devices import attempt  # imports PyTorch, which a command that only prints its help does not need

        return attempt(self.counts)


@contextmanager
def checked_per_block(model: nn.Module, check_cancelled: Callable[[], None]) -> Iterator[None]:
    """Within it, `check_cancelled` is called before every block of `model`. It may raise, so that a long forward pass can be cancelled
    halfway."""
    from torch import nn

    blocks = [block for group in model.modules() if isinstance(group, nn.ModuleList) for block in group]
    handles = [block.register_forward_pre_hook(lambda *_: check_cancelled()) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
