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
