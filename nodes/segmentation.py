"""From attention to points, and from points to masks over the whole clip."""

from __future__ import annotations

from comfy_api.latest import io

from ..decaf.attention import points
from ..decaf.settings import METHODS, TARGETS, PointSettings, TrackingSettings
from ..decaf.tracking import memory_needed, needs_model, segment
from . import host, live
from .inputs import checked
from .interop import attention_boxes, points_json
from .objects import describe, overlay_of
from .sockets import CATEGORY, SAM2, FusedAttention, Prompts, Tracks, frames_input, method_input, preview_fps_input


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
                    tooltip="Points of the best key frame as JSON, a list of x and y in pixels, for SAM3 Detect and kijai's SAM 2.",
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
            ui=live.Says(live.absent(prompts) or _points(prompts)),
        )


def _points(prompts) -> str:
    count, frames = len(prompts.key), len(prompts.key.unique())
    return f"{live.named(prompts.fused.query)}: {count} point{'s' * (count != 1)} on {frames} of {len(prompts.fused.map)} key frames"


def _objects(prompts, tracks) -> str:
    if not tracks.tracks:
        return live.absent(prompts) or tracks.message
    scores = sorted((track.score for track in tracks.tracks), reverse=True)
    shown = ", ".join(f"{score:.2f}" for score in scores[:4]) + ", ..." * (len(scores) > 4)
    guess = " (a best guess)" if tracks.message else ""
    return f"{live.named(prompts.fused.query)}: {len(scores)} object{'s' * (len(scores) > 1)}, score {shown}{guess}"


class SAM2VideoPropagate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SAM2VideoPropagate",
            display_name="Propagate with SAM 2",
            category=CATEGORY,
            description="SAM 2 turns the points into objects, keeps those that follow the attention over the clip, and masks them in "
            "every frame.",
            search_aliases=[
                "decaf", "sam2 video", "track object", "track", "video mask", "propagate mask", "segment", "video segmentation", "roto", "mask",
            ],
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
                    tooltip="Higher keeps fewer objects, where several are meant. With the method 'as published': the score above which an "
                    "object is kept; when none is, the best one.",
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
                preview_fps_input(
                    "Frames per second of the overlay, and of the output fps, when images are connected; a video brings its own."
                ),
                io.Combo.Input(
                    "targets",
                    options=list(TARGETS),
                    default=TARGETS[0],
                    optional=True,
                    tooltip="How many objects to keep. auto: what the query says in English ('the two dogs', 'all cars', a plural), else one. "
                    "one: the best. all: every object that matches.",
                ),
                method_input(
                    "agreement: objects are chosen by the attention to where they are, as many as the targets say. as published: by the "
                    "paper's score; the targets do not count then."
                ),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="Union of all kept objects, one mask per frame of the clip. Empty when nothing was found."),
                Tracks.Output(
                    "tracks",
                    tooltip="Each kept object by itself, with its number and scores, for Show Objects, Pick Objects as Mask and Correct Objects.",
                ),
                io.Video.Output(
                    "overlay",
                    tooltip="The clip with the objects in a spotlight, silent, for Save Video. Drawn only if a node reads it; Show Objects has "
                    "other styles.",
                ),
                io.Float.Output(
                    "fps", tooltip="Frames per second, for Create Video: those of a video; with images, which have none, just preview_fps."
                ),
                io.String.Output("report", tooltip="The objects with their scores, or why there are none."),
            ],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(
        cls, sam2, frames, prompts, score_threshold, nms_iou=TrackingSettings.nms_iou, preview_fps=24.0, targets=TARGETS[0], method=METHODS[0]
    ) -> io.NodeOutput:
        clip = host.clip_of(frames)
        report = host.progress()
        with host.returning_memory():
            needed = memory_needed(
                sam2.value, host.compute_device(), len(clip), points=max(1, len(prompts.key)), frame_size=clip.frame_size
            )
            kept = host.kept_of(sam2, frames)
            settings = TrackingSettings(nms_iou=nms_iou, score_threshold=score_threshold, targets=targets, method=method)
            computes = needs_model(kept.memo, prompts, settings)
            tracks = segment(
                sam2.load(needed) if computes else sam2.value,
                clip,
                prompts,
                settings,
                progress=report,
                features=kept.features,
                memo=kept.memo,
            )
            kept.features.let_go()
        fps = host.frame_rate(frames, clip, preview_fps)
        overlay = host.drawn_video(overlay_of(frames, tracks, fps, style="spotlight", opacity=1.0, numbers=len(tracks.tracks) > 1))
        mask = host.tracks_mask(tracks, report)
        return io.NodeOutput(mask, tracks, overlay, float(fps), describe(tracks), ui=live.Says(_objects(prompts, tracks)))
