"""Key frames from the parts of a clip in which the query can be seen, for what is there only briefly.

Evenly spread key frames miss a visit that is shorter than the gaps between them, and where one or two of them show it, the model still says of the
whole video that nothing of the kind is in it. Asked about short pieces of the clip, it finds the visit (figures: `docs/experiments.md`). Not in the
paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..clips import Clip
from ..errors import DecafError
from ..mllm import MLLM
from ..mllm.engine import explained
from ..report import Report
from ..settings import AttentionSettings
from .frames import PIECE, asked_frames, key_frames, looked_at_frames, shown_frames
from .passes import Extraction
from .presence import yes_and_no

SHARE_OF_BEST = 0.5
"""Of the largest presence of a query, from which a piece shows it as well."""


@dataclass(frozen=True)
class PresentFrames:
    """`keys`: ascending clip indices of the key frames. `presence`: of each query, the largest of its pieces, 0..1; None if none was asked about."""

    keys: tuple[int, ...]
    presence: tuple[float, ...] | None = None


def find_present_frames(
    mllm: MLLM, clip: Clip, asked: Sequence[str], settings: AttentionSettings, seconds: Sequence[float], start_layer: int, report: Report
) -> PresentFrames:
    """Where a clip shows what is asked for.

    Args:
        asked: the presence question of each query.
        seconds: time of each frame of the clip.

    A query that is seen in more than half of the pieces has key frames over all of the clip, any other over the pieces that show it; several queries
    share the key frames. No more key frames than evenly spread ones would be. DecafError for a model that cannot answer.
    """
    part = asked_frames(len(clip), settings)
    looked = looked_at_frames(len(clip), settings)
    if not looked:
        return PresentFrames(shown_frames(len(clip), settings))
    if not (mllm.engine.has_head and all(yes_and_no(mllm))):
        raise DecafError(
            f'{mllm.name} cannot answer yes or no, so it cannot say in which frames the query can be seen. Choose key frames by "spacing", or '
            "another model."
        )
    pieces = [piece.tolist() for piece in np.array_split(looked, -(-len(looked) // PIECE))]
    presence = []
    for number, keys in enumerate(pieces):
        report.progress(number, len(pieces), "Looking for key frames")
        frames = [clip[index] for index in keys]
        extraction = Extraction(mllm, keys, frames, [seconds[index] for index in keys], settings, start_layer, report, keep=False)
        with explained(mllm.name, report):
            look = extraction.batches.attempt(lambda one=extraction: one.look(one.video, one.frames, [], asked), 1)
        presence.append(look.presence)
    report.progress(len(pieces), len(pieces), "Looking for key frames")
    starts = [part.start, *(piece[0] for piece in pieces[1:]), part.stop]
    spans = dict.fromkeys(_span(of_query, starts) for of_query in zip(*presence, strict=True))
    return PresentFrames(_shared(list(spans), settings.shown_key_frames), tuple(map(max, zip(*presence, strict=True))))


def _span(presence: Sequence[float], starts: Sequence[int]) -> tuple[int, ...]:
    """Clip indices in which one query is looked at, from its presence in each piece. `starts`: each piece's first frame, and the end."""
    seen = [one >= SHARE_OF_BEST * max(presence) for one in presence]
    if 2 * sum(seen) > len(seen):
        return tuple(range(starts[0], starts[-1]))
    return tuple(frame for piece, shows in enumerate(seen) if shows for frame in range(starts[piece], starts[piece + 1]))


def _shared(spans: Sequence[tuple[int, ...]], most: int) -> tuple[int, ...]:
    """At most so many frames, as many of each span and evenly spread over it; where there are more spans than frames, of the first ones."""
    each = max(1, most // len(spans))
    return tuple(sorted({span[place] for span in spans[:most] for place in key_frames(len(span), each)}))
