"""Masks applied to a clip: read, changed and written frame by frame, so that memory does not grow with the clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..clips import Clip
from ..data import Tracks
from ..errors import DecafError
from ..report import Progress, Report, silent
from ..settings import EffectSettings
from .effects import check_effect, fitted, has_alpha, made
from .pictures import write_pictures
from .sound import Sound, SoundFile, SoundWave, open_sound
from .video_formats import format_of, video_writer

APPLYING = "Applying the masks"
"""Name of the step that is reported."""

_SOUND_AT_ONCE = 30
"""Seconds of sound after the last frame, from one chance to cancel to the next."""

_SLOWEST, _FASTEST = Fraction(1, 1000), Fraction(1000)


def apply_mask(
    path: Path,
    clip: Clip,
    masks: Tracks,
    settings: EffectSettings,
    *,
    objects: Sequence[int] | None = None,
    background: Clip | None = None,
    sound: SoundFile | SoundWave | None = None,
    fps: Fraction = Fraction(24),
    pictures: str = "png",
    progress: Progress | Report = silent,
) -> str:
    """Writes what `settings` makes of the clip and its masks to `path`, and returns what there is to say of its sound, or nothing.

    Every frame of the clip becomes one frame, which is shown at the same time and for as long; WebM counts in milliseconds.

    Args:
        path: a file that ends in .mp4 (H.264), .mov (ProRes 4444) or .webm (VP9), or a folder, for pictures without sound. The last two
            kinds of video and pictures hold alpha.
        masks: of this clip; or masks of a single frame, which then are those of all frames.
        objects: indices of the objects that are meant; None: all.
        background: for the effect "new background": the frame shown at the same time, from the beginning again when it ends; a picture
            stands still.
        sound: of the clip.
        fps: frames per second of a clip that has none.
        pictures: which kind goes into a folder, one of `decaf.finishing.pictures.PICTURES`.
        progress: called for every frame; may raise to stop, which leaves no file.

    Raises:
        DecafError: masks of another clip, an effect or a format that cannot be, alpha in a format without, a folder that holds pictures, or
            a file that cannot be written.
    """
    report = Report.of(progress)
    check_effect(settings, background is not None)
    check_masks(clip, masks)
    frames = _frames(clip, masks, settings, objects, background, report)
    if not path.suffix:
        write_pictures(path, frames, len(clip), kind=pictures)
        return "The pictures carry no sound." if sound is not None else ""
    alpha = has_alpha(settings)
    kind = format_of(path, alpha, clip.frame_size)
    rate = min(max(Fraction(clip.fps or fps), _SLOWEST), _FASTEST).limit_denominator(1001)
    track = open_sound(sound)
    with closing(track) if track is not None else nullcontext():
        timed = clip.time_base is not None and len(clip) > 1
        time_base = clip.time_base if timed else 1 / rate
        ticks = [clip.ticks(index) for index in range(len(clip))] if timed else list(range(len(clip)))
        ticks.append(ticks[-1] + max(round(1 / (rate * time_base)), 1))
        origin = _origin(ticks[0] * time_base, track, sound)
        first = round(origin / time_base)
        with video_writer(path, kind, alpha, clip.frame_size, rate, time_base) as writer:
            if track is not None:
                track.add_to(writer.output, path.suffix.lower(), first * time_base)
            for index, pixels in enumerate(frames):
                writer.write(pixels, ticks[index] - first, ticks[index + 1] - ticks[index])
                if track is not None:
                    track.write((ticks[index + 1] - first) * time_base)
            if track is not None:
                end = (ticks[-1] - first) * time_base
                while track.write(end := end + _SOUND_AT_ONCE):  # sound may last hours longer than the pictures
                    report.progress(len(clip), len(clip), APPLYING)
                track.write(None)
        return track.note if track is not None else ""


def apply_mask_each(
    path: Path, clip: Clip, masks: Tracks, settings: EffectSettings, *, objects: Sequence[int] | None = None, **more
) -> dict[Path, str]:
    """One file, or folder of pictures, for each of the objects, one after the other: what was written, and what there is to say of its sound.

    The object's number is at the end of the name: `cut-2.mov`. All else is as in `apply_mask`.
    """
    wanted = range(len(masks.tracks)) if objects is None else objects
    found = {path.with_name(f"{path.stem}-{masks.tracks[place].id}{path.suffix}"): place for place in wanted}
    return {one: apply_mask(one, clip, masks, settings, objects=[place], **more) for one, place in found.items()}


def check_masks(clip: Clip, masks: Tracks) -> None:
    """DecafError: the masks are not of this clip."""
    if tuple(masks.frame_size) != tuple(clip.frame_size):
        raise DecafError(
            f"The masks are {masks.frame_size[1]}x{masks.frame_size[0]}, but the frames of {clip.name} are {clip.frame_size[1]}x"
            f"{clip.frame_size[0]}. Give the masks of this clip, or resize one of the two."
        )
    if masks.length not in (1, len(clip)):
        raise DecafError(
            f"There are {masks.length} masks for the {len(clip)} frames of {clip.name}. Give the masks of this clip, of the same part of it: "
            "one per frame, or one for all."
        )


def _origin(first: Fraction, track: Sound | None, sound: SoundFile | SoundWave | None) -> Fraction:
    """The second of the source with which the new file begins: that of the first frame, or of the sound if that is earlier. Sound before
    second 0 is what a decoder needs to begin, and is not heard."""
    if not isinstance(sound, SoundFile) or track is None or sound.window is not None:
        return first
    return min(first, max(track.begin, Fraction(0)))


def _frames(
    clip: Clip, masks: Tracks, settings: EffectSettings, objects: Sequence[int] | None, background: Clip | None, report: Report
) -> Iterator[np.ndarray]:
    for index in range(len(clip)):
        report.progress(index, len(clip), APPLYING)
        place = index if masks.length > 1 else 0
        alpha = masks.alpha(place, place + 1, objects)[0].numpy()
        behind = None
        if settings.effect == "new background":
            behind = fitted(background[_same_time(clip, background, index)].numpy(), clip.frame_size)
        yield made(clip[index].numpy(), alpha, settings, behind)


def _same_time(clip: Clip, other: Clip, index: int) -> int:
    """Which frame of `other` is shown when frame `index` of the clip is, if both begin together and `other` begins again at its end."""
    if clip.fps and other.fps:
        index = int(index * other.fps / clip.fps)
    return index % len(other)
