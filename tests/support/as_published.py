"""`segment` by the published rule, for tests that compare with its oracle or need every object above a score."""

from functools import partial

from decaf import tracking

segment = partial(tracking.segment, method="as published")
