"""Parameters whose tests `pytest` leaves out unless --all is given: a few of many alike say as much in a tenth of the time."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest
from tiny_models import FAMILIES

USUAL_FAMILIES = ("qwen3_vl", "internvl")
"""One with time in its position ids and grids of any size, and one with tiles."""


def slow_but(values: Iterable, usual: Collection) -> list:
    """The values as parameters, all but the `usual` ones marked as slow."""
    return [value if value in usual else pytest.param(value, marks=pytest.mark.slow) for value in values]


EACH_FAMILY = slow_but(FAMILIES, USUAL_FAMILIES)
