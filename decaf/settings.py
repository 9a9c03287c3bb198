"""What can be set in each stage of the method, with its default: functions, the command and the nodes read them here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from .errors import DecafError

MODES = ("expression", "class name")
"""What the background question leaves out: whatever the query refers to, or a class name that is chosen from the model's answers first."""

DETAILS = ("paper", "fast")
"""How finely a clip is looked at: as published, or with a fraction of the work."""

SINGLE_FRAMES = ("whole", "zoom")
"""What single frames show of the clip: all, as published, or the region that the video attends (see `decaf.attention.zoom`)."""

KEY_FRAMES_BY = ("spacing", "presence")
"""How key frames are chosen: evenly spread, as published, or where the model says that the query can be seen
(see `decaf.attention.present_frames`)."""

METHODS = ("agreement", "as published")
"""How the maps of video and frames are fused, and which objects are kept: our rule (see `docs/experiments.md`), or the paper's."""

TARGETS = ("auto", "one", "all")
"""How many objects a query means, with the method "agreement": what its words say ("the two dogs", "all cars", a plural), one, or all that match."""

FAST_KEY_FRAMES = 8
"""Key frames that are shown at most with the detail "fast"."""

MOST_KEY_FRAMES = 256
"""Key frames that can be asked for; the paper shows 16. A larger number is a slip, and would fill the memory."""

MOST_TOKENS_PER_FRAME = 16384
"""Visual tokens of a frame that can be asked for; the paper shows 400."""

STYLES = {
    "spotlight": "the rest dark and grey, the objects as they are",
    "tint": "each object in its colour, half transparent",
    "outline": "lines alone",
    "checkerboard": "the objects cut out, on a checkerboard",
    "matte": "the objects white on black",
}
"""How objects can be shown in a frame, and what each style shows (see `decaf.pictures.styles`)."""


CORRECTIONS = {
    "refine": "what is marked changes the object's mask on this frame; it is tracked anew from here and from the frames marked before",
    "add": "the same, and the frame on which the sentence found it stays a key frame beside them",
    "replace": "what is marked alone says what the object is; all that it was before is forgotten",
}
"""How marks change an object (see `decaf.tracking.correct`)."""


@dataclass(frozen=True)
class AttentionSettings:
    """How a clip is shown to the language model and its attention rolled out (paper, section 3).

    Attributes:
        setting: one of MODES. "expression" generates nothing; "class name" has the object named first.
        max_key_frames: frames shown to the model, spread evenly over the clip.
        tokens_per_frame: largest number of visual tokens of a frame in the video; images of single frames have four times as many. Families
            with tiles of a fixed size ignore it.
        start_layer: first decoder layer that is rolled out, counted from 0; None takes the upper half.
        detail: one of DETAILS. "paper": as published. "fast": images of single frames as coarse as the video's, and at most FAST_KEY_FRAMES
            key frames. What it costs in quality is in the README.
        first_frame, last_frame: of the part of the clip that is asked about and tracked, both included; None for the clip's last one. Masks
            outside of it are empty.
        v_max: whether heads of the model count by how strongly they look at the pictures; without it all count alike (an ablation of the paper).
        single_frames: one of SINGLE_FRAMES. "zoom": a quarter of each picture, where the video's attention is, with as many tokens as a frame
            of the video; whole where a quarter does not hold what is attended, or where several queries look at so many regions that whole
            frames, which they share, take no more tokens. With the setting "expression" alone.
        key_frames: frames that are shown to the model, chosen by hand; `max_key_frames` and `key_frames_by` then do not count. Empty: chosen by the
            latter.
        key_frames_by: one of KEY_FRAMES_BY. "presence": the model is first asked about short pieces of the clip whether the query can be seen, and
            key frames are those of the pieces that show it; evenly spread, if that is more than half of them. For what is seen briefly.
        not_this: what is not to be masked, in a sentence of its own; one for all queries. What it attends more than the query does is
            subtracted (see `decaf.attention.fusion.object_background_fusion`). Not in the paper. None for nothing.
    """

    setting: str = MODES[0]
    max_key_frames: int = 16
    tokens_per_frame: int = 400
    start_layer: int | None = None
    detail: str = DETAILS[0]
    not_this: str | None = None
    first_frame: int = 0
    last_frame: int | None = None
    key_frames: tuple[int, ...] = ()
    v_max: bool = True
    single_frames: str = SINGLE_FRAMES[0]
    key_frames_by: str = KEY_FRAMES_BY[0]

    @property
    def zooms(self) -> bool:
        """Whether single frames are cut to what the video attends."""
        return self.single_frames == SINGLE_FRAMES[1]

    @property
    def looks_for_key_frames(self) -> bool:
        """Whether key frames are chosen by where the query can be seen."""
        return self.key_frames_by == KEY_FRAMES_BY[1]

    @property
    def is_fast(self) -> bool:
        """Whether the clip is looked at with the detail "fast"."""
        return self.detail == DETAILS[1]

    @property
    def shown_key_frames(self) -> int:
        """Key frames that are shown at most."""
        return min(self.max_key_frames, FAST_KEY_FRAMES) if self.is_fast else self.max_key_frames


MAPS = ("both", "video", "frames")
"""Which maps the fused attention is made of: of the clip shown as a video, of its key frames shown one by one, or both."""


@dataclass(frozen=True)
class FusionSettings:
    """What the fused attention is made of; all but the defaults are ablations of the paper.

    Attributes:
        contrast: whether the attention of the background question is subtracted from that of the object question.
        maps: one of MAPS.
    """

    contrast: bool = True
    maps: str = MAPS[0]


@dataclass(frozen=True)
class PointSettings:
    """Which cells of the fused attention prompt the segmenter.

    Attributes:
        point_threshold: fused attention, above 0 and at most 1, from which a cell becomes a point (paper, section 3.4).
        presence_threshold: P(yes) / (P(yes) + P(no)), 0..1, for the question whether the object is visible, below which nothing is masked; 0
            always masks the best match, as published. Low, since a false empty mask costs more than a spurious one; set on the bundled
            model's figures and not measured on larger ones. The score is not calibrated: models differ in how readily they say yes.
    """

    point_threshold: float = 0.8
    presence_threshold: float = 0.2


@dataclass(frozen=True)
class TrackingSettings:
    """Which candidates become tracks.

    Attributes:
        nms_iou: overlap (IoU), 0..1, above which the worse of two masks is dropped.
        score_threshold: 0..1, higher keeps fewer objects. "as published": tracklets whose mean of predicted IoU, attention and attention
            consistency is above it are kept; if there are none, the best one. "agreement": where several objects are meant, those are kept
            that have at least its fifth power of the best one's attention, a third with 0.8.
        max_tracks: keeps at most so many, the best ones; None keeps all.
        method: one of METHODS; `decaf.pipeline` fuses the maps by it, too.
        targets: one of TARGETS; the published method ignores it.
        consistency: whether tracklets are judged by the attention along their whole way; without it, by that at their point alone (an ablation of
            the paper).
    """

    nms_iou: float = 0.7
    score_threshold: float = 0.8
    max_tracks: int | None = None
    method: str = METHODS[0]
    targets: str = TARGETS[0]
    consistency: bool = True

    @property
    def as_published(self) -> bool:
        """Whether the method is the paper's."""
        return self.method == METHODS[1]


PICKS = {
    "the best one": "the object that the attention matches best",
    "all that match": "every object that matches nearly as well as the best one",
    "a fixed number": "as many as you say, the best ones",
}
"""Which objects of another tracker are picked (see `decaf.tracking.match`)."""

MATCHES = {
    "agreement": "how much the object's area and the attention look alike on the frames where it is seen",
    "density": "the mean of the attention in its masks; for whole objects only, as the part of one that is attended most wins",
    "consistency": "the attention consistency of the paper",
}
"""What says how well the attention means an object (see `decaf.tracking.match`)."""


@dataclass(frozen=True)
class PickSettings:
    """Which of the objects that another tracker has found are picked.

    Attributes:
        pick: one of PICKS.
        number: of objects, at least 1, that "a fixed number" picks.
        match: one of MATCHES.
        share: of the best one's match, 0..1, that an object needs for "all that match".
        least: match, 0..1, below which no object is picked: the attention is somewhere else.
        presence_threshold: as in `PointSettings`.
    """

    pick: str = next(iter(PICKS))
    number: int = 1
    match: str = next(iter(MATCHES))
    share: float = 0.6
    least: float = 0.2
    presence_threshold: float = PointSettings.presence_threshold


@dataclass(frozen=True)
class RefineSettings:
    """How masks are finished (see `decaf.finishing`), in the order in which it is done. 0 leaves a step out.

    Attributes:
        border: pixels along the frame's border that take the mask of the pixels next to them; masks often end short of the border.
        holes: area, in pixels, up to which a hole in a mask is filled.
        specks: area, in pixels, below which a separate part of a mask is dropped.
        smooth: frames before and after, each, that have a say in what belongs to the mask: against flicker.
        shortest: frames in a row in which an object must be seen at least; shorter appearances are dropped.
        grow: pixels by which masks grow; negative: shrink.
        feather: width, in pixels, of the soft edge to either side of the contour. The contour itself, the half level, stays where it was.
    """

    border: int = 0
    holes: int = 0
    specks: int = 0
    smooth: int = 0
    shortest: int = 0
    grow: int = 0
    feather: float = 0.0


REFINE_RANGES = {
    "border": (0, 64),
    "holes": (0, 1_000_000),
    "specks": (0, 1_000_000),
    "smooth": (0, 7),
    "shortest": (0, 240),
    "grow": (-128, 128),
    "feather": (0.0, 64.0),
}
"""Lowest and highest number of each setting of `RefineSettings`."""

EFFECTS = {
    "cut out": "the objects alone, on nothing (alpha)",
    "blur": "the objects blurred",
    "pixelate": "the objects in coarse squares",
    "dim rest": "everything but the objects dark",
    "grey rest": "everything but the objects without colour",
    "colour rest": "the objects on one colour",
    "new background": "the objects on another picture or video",
    "matte": "the objects white on black",
}
"""What can be made of a clip and its masks, and what each shows (see `decaf.finishing.effects`)."""

CUT_OUTS = {
    "mov": "ProRes 4444, for editing programs",
    "webm": "VP9, for web pages",
    "png": "a folder of pictures, without sound",
    "exr": "the same in linear light, for compositing",
}
"""Kinds of files that a cut-out is written as: those with alpha."""


@dataclass(frozen=True)
class EffectSettings:
    """What is made of a clip and its masks.

    Attributes:
        effect: one of EFFECTS.
        strength: 0..1, how coarse a blur or pixels are, or how strongly the rest is dimmed or greyed. The others ignore it.
        colour: of "colour rest", as #RRGGBB.
        invert: objects and the rest change places.
    """

    effect: str = "cut out"
    strength: float = 0.5
    colour: str = "#00B140"
    invert: bool = False


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """DecafError if `value` of the setting `name` is none of those known."""
    if value not in known:
        raise DecafError(f'There is no {name} "{value}"; choose one of {", ".join(known)}.')


def settings_of(given: Mapping[str, object]) -> tuple[AttentionSettings, PointSettings, TrackingSettings, FusionSettings]:
    """The record of each stage from settings by name; defaults for the others. TypeError for a name that is none of them."""
    rest = dict(given)
    records = []
    for record in (AttentionSettings, PointSettings, TrackingSettings, FusionSettings):
        names = [one.name for one in fields(record)]
        records.append(record(**{name: rest.pop(name) for name in names if name in rest}))
    if rest:
        raise TypeError(f"there is no setting {', '.join(rest)}")
    return tuple(records)
