"""Figures that are computed, and what is measured against them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

AT_MOST, AT_LEAST, ABOUT, TOLD = "at most", "at least", "about", "told"
TOLERANCE = 0.25
"""Share by which a measured figure may lie above or below one that is computed to be about so large."""


@dataclass(frozen=True)
class Promise:
    """A line of the report before anything is measured. `figure`: what is computed, None for what only a machine can tell. `kind`: how it bounds
    the measured one. `unit`: "bytes", "s", "error", "share", "times" or "".  `source`: where the figure comes from, in a few words."""

    figure: float | None
    kind: str = AT_MOST
    unit: str = ""
    source: str = ""

    def holds(self, measured: float) -> bool | None:
        """None where nothing is bounded."""
        if self.figure is None or self.kind == TOLD:
            return None
        if self.kind == AT_MOST:
            return measured <= self.figure
        if self.kind == AT_LEAST:
            return measured >= self.figure
        return abs(measured - self.figure) <= TOLERANCE * self.figure


class Unsuitable(Exception):
    """This machine cannot run the check; the message says why."""


@dataclass(frozen=True)
class Check:
    """`promises(toy)`: by the name of a line, at the real sizes or at toy sizes; runs without a GPU. `run(machine)`: the measured figures by the
    same names; raises Unsuitable. `seconds`: after so long on a GPU it is given up."""

    name: str
    title: str
    promises: Callable[[bool], dict[str, Promise]]
    run: Callable[[object], dict[str, float]]
    seconds: int = 120


@dataclass(frozen=True)
class Line:
    """A line of the report. `holds`: None where nothing was measured or nothing is bounded. `reason`: why nothing was measured."""

    check: str
    name: str
    promise: Promise
    measured: float | None = None
    reason: str = ""

    @property
    def holds(self) -> bool | None:
        return None if self.measured is None else self.promise.holds(self.measured)


def lines(check: Check, toy: bool, measured: dict[str, float]) -> list[Line]:
    """Every promise of the check with its figure. KeyError: the check measured something else than it promised."""
    promises = check.promises(toy)
    if set(promises) != set(measured):
        raise KeyError(f"{check.name} promised {sorted(promises)} and measured {sorted(measured)}")
    return [Line(check.name, name, promise, float(measured[name])) for name, promise in promises.items()]


def unmeasured(check: Check, reason: str) -> list[Line]:
    """The promises at the real sizes, and why nothing was measured."""
    return [Line(check.name, name, promise, reason=reason) for name, promise in check.promises(False).items()]
