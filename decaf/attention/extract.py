"""Object and background attention of a clip: two questions, asked of the whole clip and of every key frame alone (DecAF paper, section 3).

Any number of queries share what is expensive: each batch of pictures goes through the model once, with all questions behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..clips import Clip, clip_info
from ..data import Attention
from ..errors import DecafError
from ..mllm import MLLM, Layout
from ..mllm.engine import explained
from ..report import Progress, Report, silent
from ..settings import DETAILS, KEY_FRAMES_BY, MODES, MOST_TOKENS_PER_FRAME, SINGLE_FRAMES, AttentionSettings, check_choice
from .batches import memory_needed
from .frames import asked_frames, shown_frames
from .passes import Extraction, Look
from .present_frames import PresentFrames, find_present_frames
from .questions import Templates, clean_not_this, clean_query, names_of
from .zoom import Windows

FPS_OF_IMAGES = 24
"""Frames per second of a clip that does not know its own, for models that are told the times of their frames."""

MOST_FPS = 10**6
"""Frames per second, and seconds per frame, beyond which a file's rate is damaged and its times are no times."""


def extract_attention(
    mllm: MLLM, clip: Clip, query: str, settings: AttentionSettings | None = None, **options
) -> tuple[Attention, Attention]:
    """`extract_attentions` for one query: its (object, background)."""
    return extract_attentions(mllm, clip, [query], settings, **options)[0]


@torch.inference_mode()
def extract_attentions(
    mllm: MLLM,
    clip: Clip,
    queries: Sequence[str],
    settings: AttentionSettings | None = None,
    *,
    templates: Templates | None = None,
    progress: Progress | Report = silent,
    **changes,
) -> list[tuple[Attention, Attention]]:
    """Attention rollout of the object and the background question over the clip's key frames, for each query.

    Args:
        queries: what to look for, in any words; before it may stand a name, as in "ball: the ball he throws". Each pass over the pictures is
            shared by all of them.
        settings: see `AttentionSettings`; `changes`: fields of it that are given by name.
        templates: question wording; None takes our own.
        progress: callback or `Report`. Counts of the latter: forward_passes, frames_encoded_video, frames_encoded_image,
            visual_tokens_encoded, visual_tokens_prefilled, text_tokens_prefilled, tokens_generated, key_frames, and frames_zoomed where single
            frames may be cut; its stage: attention.

    Returns (object, background) of each query, in their order. With `not_this`, all object attentions have the same `Attention.not_this`, which
    comes from one more question in the same passes; where each query looks at a region of its own, the maps of single frames are of that
    region. Raises DecafError for a query, setting or clip that cannot be asked about.
    """
    settings = replace(settings or AttentionSettings(), **changes)
    queries = [clean_query(query) for query in queries]
    templates = templates or Templates()
    if not queries:
        raise DecafError("There is no query. Give one or more.")
    if settings.not_this is not None:
        settings = replace(settings, not_this=clean_not_this(settings.not_this, queries))
    if settings.setting not in MODES:
        raise DecafError(f'There is no setting "{settings.setting}"; choose one of {", ".join(MODES)}.')
    if settings.detail not in DETAILS:
        raise DecafError(f'There is no detail "{settings.detail}"; choose one of {", ".join(DETAILS)}.')
    check_choice("kind of single frames", settings.single_frames, SINGLE_FRAMES)
    check_choice("way to choose key frames", settings.key_frames_by, KEY_FRAMES_BY)
    if settings.zooms and settings.setting != MODES[0]:
        raise DecafError(
            f'Single frames are cut to what is attended more than the background, which the setting "{settings.setting}" asks about last. Choose '
            f'the setting "{MODES[0]}", or whole frames.'
        )
    templates.check([*queries, *_not_this(settings)], settings.setting)
    if settings.setting != MODES[0] and not mllm.engine.has_head:
        raise DecafError(
            f'{mllm.name} cannot answer in words, because the head that turns its states into words is not in its file; the setting '
            f'"{settings.setting}" asks it to. Choose the setting "{MODES[0]}", or another model.'
        )
    if not 1 <= settings.tokens_per_frame <= MOST_TOKENS_PER_FRAME:
        raise DecafError(
            f"{settings.tokens_per_frame} visual tokens per frame were asked for; ask for at least 1 and at most {MOST_TOKENS_PER_FRAME:,}."
        )
    start = mllm.layers // 2 if settings.start_layer is None else settings.start_layer
    if not 0 <= start < mllm.layers:
        raise DecafError(
            f"The start layer is {start}, but {mllm.name} has layers 0 to {mllm.layers - 1}. Choose one of them; the middle is usual."
        )
    keys, part = shown_frames(len(clip), settings), asked_frames(len(clip), settings)
    needed = memory_needed(mllm, len(clip), clip.frame_size, settings, queries=queries, templates=templates)
    report = Report.of(progress)
    report.count("tokens_generated", 0)
    fps = float(min(max(clip.fps or FPS_OF_IMAGES, 1 / MOST_FPS), MOST_FPS))
    seconds, keep = [index / fps for index in range(len(clip))], settings.setting != MODES[0]
    present = PresentFrames(keys)
    if settings.looks_for_key_frames:
        with mllm.alone(report.check_cancelled), report.stage("attention"):
            mllm.make_room(needed)
            present = find_present_frames(mllm, clip, [*map(templates.ask_presence, queries)], settings, seconds, start, report)
            keys = present.keys
    report.count("key_frames", len(keys))
    frames = [clip[index] for index in keys]
    extraction = Extraction(mllm, keys, frames, [seconds[index] for index in keys], settings, start, report, keep=keep)
    with mllm.alone(report.check_cancelled), report.stage("attention"), explained(mllm.name, report):
        mllm.make_room(needed)
        found = (_by_class_name if keep else _by_expression)(extraction, queries, templates)
    info = clip_info(clip, keys, part)
    sought = [*queries, *_not_this(settings)]

    def record(number: int, place: int, kind: str, query: str) -> Attention:
        """Of the question at `place`, with the frame maps of the query's own look at the frames."""
        frames = found.frames[number]
        return Attention(kind, found.video[place][0].cpu(), frames.maps[place], info, str(query), found.asked[place], seen=frames.seen)

    pairs = []
    for number, (query, name) in enumerate(zip(queries, names_of(queries), strict=True)):
        not_this = None if settings.not_this is None else record(number, len(queries), "object", settings.not_this)
        presence = _largest(found.presence[number], present.presence and present.presence[number])
        told = {"answers": tuple(found.answers[number]), "presence": presence, "not_this": not_this, "name": name}
        background = record(number, len(sought) + number, "background", query)
        pairs.append((replace(record(number, number, "object", query), **told), replace(background, name=name)))
    return pairs


def _largest(*presence: float | None) -> float | None:
    return max((one for one in presence if one is not None), default=None)


def _not_this(settings: AttentionSettings) -> list[str]:
    return [] if settings.not_this is None else [settings.not_this]


@dataclass
class _FrameMaps:
    """Of one look at all key frames: per place of a question (K, rows, cols), and which cells were shown, as in `Attention.seen`."""

    maps: dict[int, Tensor]
    seen: Tensor | None = None


@dataclass
class _Found:
    """What was asked, per question its map of the video, (1, slots, rows, cols), and per query the look at single frames that is its own, its
    answers and its presence."""

    asked: list[str]
    video: list[Tensor]
    frames: list[_FrameMaps]
    answers: list[list[str]]
    presence: list[float | None]


def _joined(looks: Sequence[Look], places: Sequence[int], seen: Tensor | None = None) -> _FrameMaps:
    """Of looks at batches of frames in which the questions at `places` were asked, in this order."""
    maps = zip(*(look.maps for look in looks), strict=True)
    return _FrameMaps({place: torch.cat([one[:, 0] for one in parts]).cpu() for place, parts in zip(places, maps, strict=True)}, seen)


def _by_expression(extraction: Extraction, queries: list[str], templates: Templates) -> _Found:
    """Everything is asked of pictures at once."""
    more = _not_this(extraction.settings)
    asked = [*map(templates.ask_object, [*queries, *more]), *map(templates.ask_background, queries)]
    present = [*map(templates.ask_presence, queries)]
    video = extraction.look_at_video(asked, lambda layout, frames: extraction.look(layout, frames, asked, present))[-1]
    windows = extraction.windows(video.maps, len(queries)) if extraction.settings.zooms else None
    looked: dict[Windows | None, _FrameMaps] = {}
    shown = windows or [None] * len(queries)
    extraction.rounds = len({*shown})
    for one in dict.fromkeys(shown):
        own = [number for number, other in enumerate(shown) if other == one]
        places = [*own, *range(len(queries), len(queries + more)), *(len(queries + more) + number for number in own)]
        wanted = [asked[place] for place in places]

        def step(layout: Layout, frames: Sequence[Tensor], wanted=wanted) -> Look:
            return extraction.look(layout, frames, wanted, [])

        looks = [look for *_, look in extraction.look_at_frames(wanted, step, one)]
        looked[one] = _joined(looks, places, None if one is None else one.seen)
    none = [None] * len(queries)
    return _Found(asked, video.maps, [looked[one] for one in shown], [[] for _ in queries], video.presence or none)


def _by_class_name(extraction: Extraction, queries: list[str], templates: Templates) -> _Found:
    """All object questions come before the first background question. In between, what was computed of the pictures waits in host memory."""
    asked = [*map(templates.ask_object, [*queries, *_not_this(extraction.settings)])]
    present = [*map(templates.ask_presence, queries)]

    def step(layout: Layout, frames: Sequence[Tensor]) -> Look:
        return extraction.look(layout, frames, asked, present, answered=len(queries))

    looked = [extraction.look_at_video(asked, step), *extraction.look_at_frames(asked, step)]
    looks = [look for *_, look in looked]
    answers = [[said for look in looks for said in look.answers[index]] for index in range(len(queries))]
    names = [extraction.choose_name(templates.ask_choice(query, said), query, said) for query, said in zip(queries, answers, strict=True)]
    backgrounds = [*map(templates.ask_class_background, names)]
    extraction.done = 0
    for layout, frames, look in looked:
        look.maps += extraction.ask_again(layout, frames, look.kept, backgrounds)
        look.kept = None
    video, *images = looks
    asked += backgrounds
    return _Found(asked, video.maps, [_joined(images, range(len(asked)))] * len(queries), answers, video.presence or [None] * len(queries))
