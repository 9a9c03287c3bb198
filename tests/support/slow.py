"""Parameters whose tests `pytest` leaves out unless --all is given: a few of many alike say as much in a tenth of the time."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest
from tiny_models import FAMILIES

USUAL_FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl", "glm4v")
"""One of each kind of position ids and picture layout."""


def slow_but(values: Iterable, usual: Collection) -> list:
    """The values as parameters, all but the `usual` ones marked as slow."""
    return [value if value in usual else pytest.param(value, marks=pytest.mark.slow) for value in values]


EACH_FAMILY = slow_but(FAMILIES, USUAL_FAMILIES)
