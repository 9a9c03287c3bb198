"""Objects that were found: shown, picked, and corrected by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..decaf.clips import Clip, check_tracks, write_video
from ..decaf.data import Tracks as TracksRecord
from ..decaf.data import caption
from ..decaf.errors import DecafError
from ..decaf.pictures.styles import show_objects
from ..decaf.settings import CORRECTIONS, STYLES
from ..decaf.tracking import Marks, correct, is_kept, memory_needed
from . import host, live
from .inputs import checked
from .interop import box_of, objects_of, points_of
from .sockets import CATEGORY, SAM2, BoundingBox, Tracks, frames_input, preview_fps_input

_SHOWN_SIDE = 640
"""Pixels of the longer side of what a node shows."""

_CLICKED_SIDE = 1024
"""Pixels of the longer side of the picture that a person clicks on."""

_MOST = 9999

_FEW_FRAMES = 4
"""Decisive frames that are named."""


def describe(tracks: TracksRecord) -> str:
    """The query if it has a name, one line per object, and what there is to say of them: why there is none, or that it is a best guess."""
    heading = caption(tracks) if tracks.name else ""
    return "\n".join(filter(None, [heading, *(_described(track) for track in tracks.tracks), tracks.message]))


def _described(track) -> str:
    marked = f"marked on frame{'s' * (len(track.corrected) > 1)} {', '.join(map(str, track.corrected))}"
    if track.corrected and track.attention == track.consistency == 0:
        return f"object {track.id}: {marked} (SAM 2 {track.predicted_iou:.2f})"
    if track.match is not None:
        line = (
            f"object {track.id}: match {track.match:.2f} (attention {track.attention:.2f}, consistency {track.consistency:.2f}, tracker "
            f"{track.predicted_iou:.2f}), most of it on frame {track.frame}"
        )
        return f"{line}, {marked}" if track.corrected else line
    line = (
        f"object {track.id}: score {track.score:.2f} (SAM 2 {track.predicted_iou:.2f}, attention {track.attention:.2f}, "
        f"consistency {track.consistency:.2f}), prompted on frame {track.frame}{_decided(track)}"
    )
    return f"{line}, {marked}" if track.corrected else line


def _decided(track) -> str:
    """On which frames the model saw what it sought, where these are few; of what it attends all along there is nothing to tell."""
    if not 0 < len(track.decisive) <= _FEW_FRAMES:
        return ""
    *others, last = map(str, track.decisive)
    named = f"frames {', '.join(others)} and {last}" if others else f"frame {last}"
    return f", half of its attention on {named}"


def draw_overlay(
    path: Path, clip: Clip, tracks: TracksRecord, fps: Fraction | float, *, style: str, opacity: float, numbers: bool, side: int | None = None
) -> None:
    """Writes the clip with its objects shown; `side`: at most so many pixels wide and high."""
    size, report = shown_size(clip.frame_size, side), host.progress()

    def drawn(pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
        """One is drawn while the one before is encoded. What is reported stays in ComfyUI's own thread."""
        coming = pool.submit(drawn_frame, clip, tracks, 0, size, style, opacity, numbers)
        for index in range(len(clip)):
            report(index, len(clip), "drawing")
            frame = coming.result()
            if index + 1 < len(clip):
                coming = pool.submit(drawn_frame, clip, tracks, index + 1, size, style, opacity, numbers)
            yield frame

    with ThreadPoolExecutor(1) as pool:
        write_video(path, drawn(pool), fps, size, quick=side is not None)
    report(len(clip), len(clip), "drawing")


def drawn_frame(
    clip: Clip, tracks: TracksRecord, index: int, size: tuple[int, int], style: str, opacity: float, numbers: bool
) -> torch.Tensor:
    """(*size, 3) uint8."""
    picture = clip[index]
    if tuple(picture.shape[:2]) != tuple(size):
        picture = torch.from_numpy(np.array(Image.fromarray(picture.numpy()).resize(size[::-1], Image.Resampling.BILINEAR, reducing_gap=1.0)))
    # Made smaller, every edge is soft; the masks' own soft edges cost more than they show then, unless somebody has made them.
    of = tracks.levels if tuple(size) != tuple(tracks.frame_size) else tracks.alpha
    masks = [of(index, index + 1, [place])[0] for place in range(len(tracks.tracks))]
    return show_objects(picture, masks, style, opacity=opacity, ids=[track.id for track in tracks.tracks], numbers=numbers)


def shown_size(frame_size: Sequence[int], side: int | None) -> tuple[int, int]:
    """(height, width), made to fit into a square with that side."""
    if side is None or max(frame_size) <= side:
        return tuple(frame_size)
    return tuple(max(1, round(pixels * side / max(frame_size))) for pixels in frame_size)


class DecAFShowObjects(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DecAFShowObjects",
            display_name="Show Objects",
            category=CATEGORY,
            description="The clip with its objects shown: in a spotlight, tinted, outlined, cut out or as a matte, each with its number.",
            search_aliases=["decaf", "overlay", "preview mask", "track preview", "object numbers", "spotlight", "outline", "visualize mask"],
            inputs=[
                frames_input("The clip (or image) that the objects are in."),
                Tracks.Input("tracks", tooltip="From Propagate with SAM 2, Pick Objects as Mask or Correct Objects."),
                io.Combo.Input(
                    "style",
                    options=list(STYLES),
                    default=next(iter(STYLES)),
                    tooltip=" ".join(f"{name}: {what}." for name, what in STYLES.items()),
                ),
                io.Float.Input(
                    "opacity",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How strongly the style shows. At 0 the clip stays as it is, but for lines and numbers.",
                ),
                io.Boolean.Input(
                    "numbers", default=True, tooltip="Write each object's number at it: Pick Objects as Mask and Correct Objects take these."
                ),
                preview_fps_input(),
            ],
            outputs=[
                io.Video.Output(
                    "overlay", tooltip="What the node shows, in the clip's own size and silent, for Save Video. Drawn only if a node reads it."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, frames, tracks, style, opacity, numbers, preview_fps=24.0) -> io.NodeOutput:
        with host.returning_memory():
            clip = host.clip_of(frames)
            check_tracks(clip, tracks)
            fps, look = host.frame_rate(frames, clip, preview_fps), {"style": style, "opacity": opacity, "numbers": numbers}
            size = shown_size(clip.frame_size, _SHOWN_SIDE)
            if len(clip) == 1:
                shown = host.shown_images(host.as_image(drawn_frame(clip, tracks, 0, size, *look.values()))[None])
            else:
                path, saved = host.temp_file(".mp4")
                draw_overlay(path, clip, tracks, fps, side=_SHOWN_SIDE, **look)
                shown = ui.PreviewVideo([saved])
                if size == tuple(clip.frame_size):
                    return io.NodeOutput(host.drawn_video(overlay_of(frames, tracks, fps, **look), path), ui=live.Says(tracks.message, shown))
        return io.NodeOutput(host.drawn_video(overlay_of(frames, tracks, fps, **look)), ui=live.Says(tracks.message, shown))


def overlay_of(frames, tracks: TracksRecord, fps: Fraction | float, **look):
    """Draws the overlay of IMAGE or VIDEO `frames` into a file, when it is called with its path."""

    def draw(path: Path) -> None:
        with host.returning_memory():
            clip = host.clip_of(frames)
            check_tracks(clip, tracks)
            draw_overlay(path, clip, tracks, fps, **look)

    return draw


class DecAFTracksToMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DecAFTracksToMask",
            display_name="Pick Objects as Mask",
            category=CATEGORY,
            description="The mask of one object, or of several, that Propagate with SAM 2 has kept: by number, by score, or the best ones. "
            "No model runs for it.",
            search_aliases=["decaf", "tracks to mask", "object mask", "select object", "per object mask", "filter objects", "score threshold"],
            inputs=[
                Tracks.Input("tracks", tooltip="From Propagate with SAM 2 or Correct Objects."),
                io.String.Input(
                    "objects",
                    default="",
                    placeholder="all",
                    tooltip="Numbers of the objects, as the report of Propagate with SAM 2 lists them, for example 0 or 0, 2. Empty: all.",
                ),
                io.Float.Input(
                    "score_threshold",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Of these only the objects that score above this, and those marked by hand. 0: all.",
                ),
                io.Int.Input(
                    "max_objects",
                    default=0,
                    min=0,
                    max=_MOST,
                    optional=True,
                    tooltip="At most so many, the best by score; those marked by hand come first. 0: all.",
                ),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="One mask per frame: pixels of any of these objects."),
                Tracks.Output("tracks", tooltip="These objects, each with its number, for Show Objects and Correct Objects."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, tracks, objects, score_threshold=0.0, max_objects=0) -> io.NodeOutput:
        places = objects_of(tracks, objects)
        chosen = (tracks if places is None else tracks.picked(places)).best(score_threshold or None, max_objects or None)
        return io.NodeOutput(host.tracks_mask(chosen, host.progress()), chosen)


class DecAFCorrectObjects(io.ComfyNode):
    HAS_INTERMEDIATE_OUTPUT = True
    """So that ComfyUI sends the picture to a page that was opened anew, although nothing has to run. Hosts that do not know it pass it over."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DecAFCorrectObjects",
            display_name="Correct Objects",
            category=CATEGORY,
            description="Changes one object by what you mark on one frame: points on it and points off it, a box, or a mask of your own; or "
            "adds an object. SAM 2 tracks that object anew, all others stay as they are.",
            search_aliases=[
                "decaf", "correct mask", "refine mask with points", "add points", "negative points", "point editor", "fix mask", "sam2 points",
                "bounding box", "roto", "rotoscope",
            ],
            inputs=[
                SAM2.Input("sam2", tooltip="From Load SAM 2."),
                frames_input("The same clip (or image) that the objects were found in."),
                Tracks.Input("tracks", tooltip="From Propagate with SAM 2, or from another Correct Objects: corrections add up."),
                io.Int.Input(
                    "object",
                    default=0,
                    min=-1,
                    max=_MOST,
                    tooltip="Number of the object to change, as Show Objects writes it. -1: a new object.",
                ),
                io.Int.Input("frame", default=0, min=0, max=10_000_000, tooltip="The frame that is marked, counted from 0."),
                io.Combo.Input(
                    "mode",
                    options=list(CORRECTIONS),
                    default=next(iter(CORRECTIONS)),
                    tooltip=" ".join(f"{name}: {what}." for name, what in CORRECTIONS.items()),
                ),
                io.String.Input(
                    "positive_points",
                    default="",
                    optional=True,
                    placeholder='[{"x": 120, "y": 80}]',
                    tooltip="Points on the object, from a points editor: JSON in pixels of the frame.",
                ),
                io.String.Input(
                    "negative_points",
                    default="",
                    optional=True,
                    placeholder='[{"x": 200, "y": 90}]',
                    tooltip="Points on what is masked and does not belong to the object.",
                ),
                # Without a widget: the page's own holds a box of 512 x 512 pixels from the beginning.
                BoundingBox.Input("box", optional=True, tooltip="A box around the object.", extra_dict={"forceInput": True}),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The object itself, painted by you or from another node: one mask, or one per frame of the clip, of which that of the "
                    "frame counts. Points and box then change this mask.",
                ),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="Union of all objects, one mask per frame of the clip."),
                Tracks.Output("tracks", tooltip="All objects, the changed one among them."),
                io.String.Output("report", tooltip="The objects with their scores, and the frames on which they were marked."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, sam2, frames, tracks, object, frame, mode, positive_points="", negative_points="", box=None, mask=None
    ) -> io.NodeOutput:
        report = host.progress()
        marks = Marks(
            frame,
            points_of(positive_points, "positive_points", tracks.frame_size),
            points_of(negative_points, "negative_points", tracks.frame_size),
            None if box is None else box_of(box, tracks.frame_size),
            None if mask is None else _own_mask(mask, frame, tracks.length),
        )
        if marks.mask is None and marks.clicks is None:
            told = "Nothing is marked, so nothing was changed. Give points, a box or a mask."
            told = f"{describe(tracks)}\n{told}".strip()
            with host.returning_memory():
                clip = host.clip_of(frames)
                check_tracks(clip, tracks)
                picture = ClickedPicture(clip, tracks, frame)
            return io.NodeOutput(host.tracks_mask(tracks, report), tracks, told, ui=live.Says("nothing is marked", picture))
        with host.returning_memory():
            clip = host.clip_of(frames)
            needed = memory_needed(sam2.value, host.compute_device(), len(clip))
            kept = host.kept_of(sam2, frames)
            number = None if object < 0 else object
            known = is_kept(kept.memo, clip, tracks, marks, number=number, mode=mode)
            found = correct(
                sam2.value if known else sam2.load(needed),
                clip,
                tracks,
                marks,
                number=number,
                mode=mode,
                progress=report,
                features=kept.features,
                memo=kept.memo,
            )
            kept.features.let_go()
            picture = ClickedPicture(clip, found, frame)
        changed, count = (found.tracks[-1].id if number is None else number), len(found.tracks)
        said = f"object {changed}, marked on frame {frame}; {count} object{'s' * (count > 1)} in all"
        return io.NodeOutput(host.tracks_mask(found, report), found, describe(found), ui=live.Says(said, picture))


class ClickedPicture:
    """What the page's editor of Correct Objects (web/points.js) shows: the frame with outlines and numbers, written to a file, and what a place
    on it means in the clip. It has a name of its own there: under "images" the page would show the picture a second time.

    `frame`: one beyond the end shows the last, so that a number that is too high has a picture as well.
    """

    def __init__(self, clip: Clip, tracks: TracksRecord, frame: int):
        shown, (height, width) = min(frame, len(clip) - 1), clip.frame_size
        # Outlines leave what is to be clicked on as it is; a spotlight would darken what is missing.
        drawn = drawn_frame(clip, tracks, shown, shown_size(clip.frame_size, _CLICKED_SIDE), "outline", 1.0, True)
        file = host.shown_picture(drawn)
        self._told = {**file, "frame": shown, "width": width, "height": height, "frames": len(clip)}

    def as_dict(self) -> dict:
        return {"decaf_points": [self._told]}


def _own_mask(mask: torch.Tensor, frame: int, length: int) -> torch.Tensor:
    """(H, W) bool of a MASK of one frame or of the whole clip."""
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or len(mask) not in (1, length):
        raise DecafError(
            f"The mask to correct with has the shape {tuple(mask.shape)}; give one mask, or one for each of the {length} frames of the clip."
        )
    if len(mask) > 1 and frame >= length:
        raise DecafError(f"There is no frame {frame} to correct: the clip has frames 0 to {length - 1}.")
    return (mask[frame if len(mask) > 1 else 0] >= 0.5).cpu()
