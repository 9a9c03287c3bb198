"""How a long step reports, and how it is cancelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[int, int, str], None]
"""`progress(done, total, what)`: `done` of `total` units of the step named `what`. It may raise to cancel the step."""


def silent(done: int, total: int, what: str) -> None:
    """Reports nothing."""


class Cancellable:
    """A progress callback that knows what it was cancelled with: a cancel may be any exception, and must pass through code that explains
    others."""

    def __init__(self, progress: Progress):
        self._progress, self._raised = progress, None

    def __call__(self, done: int, total: int, what: str) -> None:
        try:
            self._progress(done, total, what)
        except BaseException as error:
            self._raised = error
            raise

    def cancelled_by(self, error: BaseException | None) -> bool:
        """Whether the error is what the callback raised, or was raised because of that."""
        while error is not None:
            if error is self._raised:
                return True
            error = error.__cause__ or error.__context__
        return False


@contextmanager
def ticking(model: nn.Module, tick: Callable[[], None]) -> Iterator[None]:
    """Within it, `tick` is called before every block of `model`. It may raise, so that a long forward pass can be cancelled halfway."""
    from torch import nn

    blocks = [block for group in model.modules() if isinstance(group, nn.ModuleList) for block in group]
    handles = [block.register_forward_pre_hook(lambda *_: tick()) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
