"""How a long step reports, and how it is cancelled."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""`progress(done, total, what)`: `done` of `total` units of the step named `what`. It may raise to cancel the step."""


def silent(done: int, total: int, what: str) -> None:
    """Reports nothing."""
