"""From attention to points, and from points to masks over the whole clip."""

from __future__ import annotations

import logging

import torch
from comfy_api.latest import InputImpl, io, ui

from ..decaf.attention import points
from ..decaf.clips import write_video
from ..decaf.data import Tracks as TracksRecord
from ..decaf.errors import DecafError
from ..decaf.pictures.styles import show_objects
from ..decaf.settings import PointSettings, TrackingSettings
from ..decaf.tracking import memory_needed, segment
from . import host
from .inputs import checked
from .interop import attention_boxes, points_json
from .sockets import CATEGORY, SAM2, FusedAttention, Prompts, Tracks, frames_input

log = logging.getLogger(__name__)

class AttentionToSAM2Prompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AttentionToSAM2Prompts",
            display_name="Turn Attention into Prompts",
            category=CATEGORY,
            description="Every spot that is attended strongly enough becomes a point for SAM 2. Also gives points and boxes that other "
            "segmenters take.",
            search_aliases=["decaf", "points", "sam2 prompts", "attention to points", "bounding box"],
            inputs=[
                FusedAttention.Input("fused", tooltip="From Fuse Video and Frame Attention."),
                io.Float.Input(
                    "threshold",
                    default=PointSettings.point_threshold,
                    min=0.05,
                    max=1.0,
                    step=0.01,
                    tooltip="Attention from which on a spot becomes a point. Lower: more candidates, also weaker ones, and more time. "
                    "Higher: fewer, surer ones.",
                ),
                io.Float.Input(
                    "presence_threshold",
                    default=PointSettings.presence_threshold,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="The model is asked whether the object is there at all. If its yes against no is below this, there are no points, "
                    "and the mask is empty. 0: always mask the best match.",
                ),
            ],
            outputs=[
                Prompts.Output("prompts", tooltip="The points and their attention, for Propagate with SAM 2."),
                io.String.Output(
                    "positive_points",
                    tooltip='Points of the best key frame as JSON [{"x": .., "y": ..}, ...] in pixels, for SAM3 Detect and kijai\'s SAM 2.',
                ),
                io.BoundingBox.Output("boxes", tooltip="One list per key frame with the box around its attended spots, or with none."),
                io.Int.Output(
                    "key_frame",
                    tooltip="Number of the best key frame in the clip, counted from 0: the frame that positive_points belong to.",
                ),
                io.Float.Output(
                    "presence", tooltip="The model's yes against no to whether the object is there, 0 to 1; 1 if it could not be asked."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, fused, threshold, presence_threshold=PointSettings.presence_threshold) -> io.NodeOutput:
        prompts = points.attention_points(fused, threshold=threshold, presence_threshold=presence_threshold)
        best = points.best_key_frame(prompts)
        return io.NodeOutput(
            prompts,
            points_json(prompts, best),
            attention_boxes(prompts),
            fused.clip.key_frames[best],
            1.0 if fused.presence is None else fused.presence,
        )


class SAM2VideoPropagate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SAM2VideoPropagate",
            display_name="Propagate with SAM 2",
            category=CATEGORY,
            description="SAM 2 turns the points into objects, keeps those that follow the attention over the clip, and masks them in "
            "every frame.",
            search_aliases=["decaf", "sam2 video", "track object", "video mask", "propagate mask"],
            inputs=[
                SAM2.Input("sam2", tooltip="From Load SAM 2."),
                frames_input("The same clip (or image) that the attention was extracted from."),
                Prompts.Input("prompts", tooltip="From Turn Attention into Prompts."),
                io.Float.Input(
                    "score_threshold",
                    default=TrackingSettings.score_threshold,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Objects whose mean of SAM 2's confidence, attention and attention consistency is above this are kept; when "
                    "none is, the best one.",
                ),
                io.Float.Input(
                    "nms_iou",
                    default=TrackingSettings.nms_iou,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    optional=True,
                    tooltip="Two candidates whose masks overlap more than this count as one object; the better one stays.",
                ),
                io.Float.Input(
                    "preview_fps",
                    default=24.0,
                    min=1.0,
                    max=120.0,
                    step=1.0,
                    advanced=True,
                    optional=True,
                    tooltip="Frames per second of the overlay, and of the output fps, when images are connected; a video brings its own.",
                ),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="Union of all kept objects, one mask per frame of the clip. Empty when nothing was found."),
                Tracks.Output("tracks", tooltip="Each kept object by itself, with its scores; see Pick Objects as Mask."),
                io.Video.Output("overlay", tooltip="The clip with the objects in a spotlight and numbered, silent, ready for Save Video."),
                io.Float.Output(
                    "fps", tooltip="Frames per second, for Create Video: those of a video; with images, which have none, just preview_fps."
                ),
                io.String.Output("report", tooltip="The objects with their scores, or why there are none."),
            ],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, sam2, frames, prompts, score_threshold, nms_iou=TrackingSettings.nms_iou, preview_fps=24.0) -> io.NodeOutput:
        clip = host.clip_of(frames)
        report = host.progress()
        with host.returning_memory():
            needed = memory_needed(
                sam2.value, host.compute_device(), len(clip), points=max(1, len(prompts.key)), frame_size=clip.frame_size
            )
            tracks = segment(sam2.load(needed), clip, prompts, nms_iou=nms_iou, score_threshold=score_threshold, progress=report)
        fps = host.frame_rate(frames, clip, preview_fps)
        mask = host.tracks_mask(tracks, report)
        told = describe(tracks)
        try:
            with host.returning_memory():
                overlay, shown = _overlay(clip, tracks, fps, report)
        except host.Cancelled:
            raise
        except Exception as error:  # whatever it is: a picture for people must not cost the masks
            problem = f"The overlay could not be made: {str(error).rstrip('.') or type(error).__name__}. The masks are whole."
            log.warning(problem)
            again = "To have it made again, give preview_fps another value."
            overlay, shown, told = host.blocked(f"{problem} {again}"), None, f"{told}\n{problem} {again}"
        return io.NodeOutput(mask, tracks, overlay, float(fps), told, ui=shown)


def _overlay(clip, tracks: TracksRecord, fps, report):
    """The clip with its objects coloured, as VIDEO over a file of ComfyUI's temporary folder, and what the node shows of it."""

    numbers = [track.id for track in tracks.tracks] if len(tracks.tracks) > 1 else None  # one object needs none

    def frame(index: int) -> torch.Tensor:
        report(index, len(clip), "drawing")
        masks = [tracks.masks(place, index, index + 1)[0] for place in range(len(tracks.tracks))]
        return show_objects(clip[index], masks, numbers=numbers)

    path, saved = host.temp_file(".mp4")
    write_video(path, (frame(index) for index in range(len(clip))), fps, clip.frame_size)
    shown = ui.PreviewVideo([saved]) if len(clip) > 1 else host.shown_images(host.as_image(frame(0))[None])
    return InputImpl.VideoFromFile(str(path)), shown


def describe(tracks: TracksRecord) -> str:
    """One line per object, and what there is to say of them: why there is none, or that it is a best guess."""
    lines = [
        f"object {track.id}: score {track.score:.2f} (SAM 2 {track.predicted_iou:.2f}, attention {track.attention:.2f}, "
        f"consistency {track.consistency:.2f}), prompted on frame {track.frame}"
        for track in tracks.tracks
    ]
    return "\n".join(filter(None, [*lines, tracks.message]))


class DecAFTracksToMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DecAFTracksToMask",
            display_name="Pick Objects as Mask",
            category=CATEGORY,
            description="The mask of one object, or of several, that Propagate with SAM 2 has kept.",
            search_aliases=["decaf", "tracks to mask", "object mask", "select object", "per object mask"],
            inputs=[
                Tracks.Input("tracks", tooltip="From Propagate with SAM 2."),
                io.String.Input(
                    "objects",
                    default="",
                    placeholder="all",
                    tooltip="Numbers of the objects, as the report of Propagate with SAM 2 lists them, for example 0 or 0, 2. Empty: all.",
                ),
            ],
            outputs=[io.Mask.Output("mask", tooltip="One mask per frame: pixels of any of these objects.")],
        )

    @classmethod
    @checked
    def execute(cls, tracks, objects) -> io.NodeOutput:
        places = {track.id: place for place, track in enumerate(tracks.tracks)}
        wanted = _numbers(objects) or list(places)
        missing = [number for number in wanted if number not in places]
        if missing and places:
            raise DecafError(
                f"There is no object {missing[0]}; the tracks hold {', '.join(map(str, places))}. Change 'objects', or empty it for all."
            )
        kept = [places[number] for number in wanted if number in places]
        return io.NodeOutput(host.tracks_mask(tracks, host.progress(), kept))


def _numbers(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        raise DecafError(
            f"'objects' holds '{wrong[0]}', which is not a number. Write numbers of objects, for example 0 or 0, 2; or nothing for all."
        )
    return [int(word) for word in words]
