"""Objects that another tracker has found, picked by attention; and the images that such a tracker takes."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..decaf.clips.still import FRAME_ORDERS, frame_order, scaled
from ..decaf.data import Tracks as TracksRecord
from ..decaf.settings import MATCHES, PICKS, PickSettings
from ..decaf.tracking.match import pick_by_attention
from ..decaf.tracking.outside import tracks_from
from . import host
from .inputs import checked
from .objects import describe
from .sockets import CATEGORY, FusedAttention, Tracks, frames_input, objects_input

_MOST_FRAMES = 10_000_000
_MOST_PIXELS = 16384


class DecAFPickTracks(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DecAFPickTracks",
            display_name="Pick Tracks by Attention",
            category=CATEGORY,
            description="Any tracker finds objects with good masks; the attention says which of them the sentence means. Takes SAM 3's tracks, "
            "masks of any node, or DecAF's own tracks. No model runs for it.",
            search_aliases=[
                "decaf", "sam3", "sam 3", "segment anything", "select track", "choose object", "filter objects", "referring segmentation",
                "text to mask", "video segmentation", "track to mask",
            ],
            inputs=[
                FusedAttention.Input("fused", tooltip="From Fuse Video and Frame Attention."),
                objects_input(
                    "What to pick from, of the same clip: track_data of Run SAM3 Video Track; tracks; or masks, one for every frame: all of the "
                    "first object, then all of the second. Batch Masks puts the masks of several objects together.",
                ),
                io.Combo.Input(
                    "pick", options=list(PICKS), default=PickSettings.pick, tooltip="\n".join(f"{name}: {what}." for name, what in PICKS.items())
                ),
                io.Int.Input("number", default=1, min=1, max=9999, tooltip="How many objects 'a fixed number' picks."),
                io.Float.Input(
                    "share",
                    default=PickSettings.share,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="For 'all that match': an object needs at least this part of the best one's match. Lower: more objects.",
                ),
                io.Float.Input(
                    "presence_threshold",
                    default=PickSettings.presence_threshold,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="The model is asked whether the object is there at all. If its yes against no is below this, nothing is picked. 0: "
                    "always pick the best match.",
                ),
                io.Float.Input(
                    "least_match",
                    default=PickSettings.least,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    optional=True,
                    tooltip="An object that matches less than this is never picked: the attention is somewhere else.",
                ),
                io.Combo.Input(
                    "match",
                    options=list(MATCHES),
                    default=PickSettings.match,
                    advanced=True,
                    optional=True,
                    tooltip="What is compared.\n" + "\n".join(f"{name}: {what}." for name, what in MATCHES.items()),
                ),
                io.Int.Input(
                    "lead",
                    default=0,
                    min=0,
                    max=_MOST_FRAMES,
                    advanced=True,
                    optional=True,
                    tooltip="Frames that SAM 3 was given before the clip's first one: connect lead of Video to Images. They are left out.",
                ),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="One mask per frame: pixels of any picked object. Empty when nothing is picked."),
                Tracks.Output("tracks", tooltip="The picked objects, each with its number, for Refine Mask, Apply Mask (Video) and Show Objects."),
                Tracks.Output("all_tracks", tooltip="All objects with their numbers and matches, to look at and to pick others by number."),
                io.String.Output("report", tooltip="Which objects were picked, and how well each matches; or why none was picked."),
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(
        cls, fused, objects, pick, number, share, presence_threshold=PickSettings.presence_threshold, least_match=PickSettings.least,
        match=PickSettings.match, lead=0,
    ) -> io.NodeOutput:
        report = host.progress()
        settings = PickSettings(pick, number, match, share, least_match, presence_threshold)
        with host.returning_memory():
            found = tracks_from(objects, fused.clip, lead)
            picked, matched = pick_by_attention(found, fused, settings, progress=report)
            return io.NodeOutput(host.tracks_mask(picked, report), picked, matched, _told(picked, matched))


def _told(picked: TracksRecord, matched: TracksRecord) -> str:
    """What was picked, then every object with its match, the best first."""
    numbers = ", ".join(str(track.id) for track in picked.tracks)
    first = f"Picked object{'s' * (len(picked.tracks) > 1)} {numbers} (of {len(matched.tracks)})." if picked.tracks else picked.message
    ordered = sorted(matched.tracks, key=lambda track: -track.score)
    return "\n".join(filter(None, [first, describe(TracksRecord(matched.store, tuple(ordered)))]))


class DecAFFrameOfVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DecAFFrameOfVideo",
            display_name="Video to Images",
            category=CATEGORY,
            description="One frame of a video as an image, without the others; or all of them, made smaller, in the order in which a tracker such as "
            "SAM 3 should see them.",
            search_aliases=["decaf", "get frame", "frame from video", "video frames", "extract frame", "key frame", "sam3 images"],
            inputs=[
                frames_input("The clip. A video is read a few frames at a time."),
                io.Combo.Input(
                    "which", options=list(FRAME_ORDERS), default=next(iter(FRAME_ORDERS)),
                    tooltip="\n".join(f"{name}: {what}." for name, what in FRAME_ORDERS.items()),
                ),
                io.Int.Input("frame", default=0, min=0, max=_MOST_FRAMES, tooltip="Number of the frame, counted from 0. All frames: not used."),
                io.Int.Input(
                    "longest_side", default=0, min=0, max=_MOST_PIXELS,
                    tooltip="Images are made smaller until their longer side has so many pixels. SAM 3 looks at 1008. 0: the clip's own size.",
                ),
            ],
            outputs=[
                io.Image.Output("images", tooltip="The image, or the images in that order."),
                io.Int.Output("lead", tooltip="How many of the images come before the clip's first frame: for Pick Tracks by Attention."),
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, frames, which, frame, longest_side) -> io.NodeOutput:
        report = host.progress()
        with host.returning_memory():
            clip = host.clip_of(frames)
            order, lead = frame_order(len(clip), which, frame)
            first = host.as_image(scaled(clip[order[0]], longest_side))
            images = torch.empty(len(order), *first.shape, dtype=first.dtype, device=first.device)
            for place, index in enumerate(order):
                report(place, len(order), "reading frames")
                images[place] = first if place == 0 else host.as_image(scaled(clip[index], longest_side))
            report(len(order), len(order), "reading frames")
        return io.NodeOutput(images, lead)
