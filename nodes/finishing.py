"""Masks refined, and applied to the clip: cut-outs, blurs, backgrounds, as video with sound."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import torch
from comfy.cli_args import args
from comfy_api.latest import InputImpl, io

from ..decaf.data import Tracks as TracksRecord
from ..decaf.errors import DecafError
from ..decaf.files import atomic_write
from ..decaf.finishing import apply_mask, copy_with_tags, fullest_frame, read_with_alpha, refine, tracks_from_masks, write_pictures
from ..decaf.finishing.effects import has_alpha
from ..decaf.finishing.video_formats import FORMATS
from ..decaf.pictures.styles import on_checkerboard
from ..decaf.settings import EFFECTS, REFINE_RANGES, EffectSettings, RefineSettings
from . import host, live
from .inputs import checked
from .interop import objects_of
from .sockets import CATEGORY, Tracks, frames_input, masks_input, preview_fps_input

_FORMATS = {"auto": "", **{f"{suffix[1:]} ({one.name})": suffix for suffix, one in FORMATS.items()}}
_PICTURES = {"PNG pictures": "png", "EXR pictures": "exr"}


def _number(name: str, default: float, tooltip: str, **more):
    low, high = REFINE_RANGES[name]
    kind = io.Float if isinstance(low, float) else io.Int
    step = 0.5 if kind is io.Float else 1
    return kind.Input(name, default=default, min=low, max=high, step=step, tooltip=tooltip, **more)


class DecAFRefineMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        masks = io.MatchType.Template("masks", [Tracks, io.Mask])
        return io.Schema(
            node_id="DecAFRefineMask",
            display_name="Refine Mask",
            category=CATEGORY,
            description="Makes masks ready for use: grows or shrinks them, gives them a soft edge, fills holes, drops specks, and calms flicker.",
            search_aliases=[
                "decaf", "grow mask", "shrink mask", "expand mask", "feather mask", "blur mask", "soft edge", "fill holes", "remove specks",
                "remove dots", "smooth mask", "deflicker", "matte", "alpha matte", "soft matte", "roto",
            ],
            inputs=[
                io.MatchType.Input(
                    "masks", masks, display_name="tracks or mask",
                    tooltip="From Propagate with SAM 2, or any MASK. Tracks are refined frame by frame when they are used, in little memory.",
                ),
                _number("grow", 0, "Pixels by which the mask grows; negative: shrinks."),
                _number("feather", 2.0, "Width of the soft edge, in pixels to either side of the contour. 0: a hard edge."),
                _number("holes", 200, "Holes of up to so many pixels are filled. 0: none."),
                _number("specks", 100, "Separate parts of fewer pixels than this are dropped. 0: none."),
                _number(
                    "smooth", 0,
                    "Frames before and after, each, that vote on what belongs to the mask: against flicker. 1 or 2 is usual; 0: none.",
                ),
                _number(
                    "border", 2, "Pixels along the frame's border in which the mask repeats what is next to them: masks often end short of it.",
                    advanced=True, optional=True,
                ),
                _number(
                    "shortest", 0, "An object that is seen for fewer frames in a row than this is dropped there.", advanced=True, optional=True
                ),
            ],
            outputs=[
                io.MatchType.Output(
                    masks, id="refined", display_name="refined",
                    tooltip="The same kind as came in: tracks, for Apply Mask (Video) or Pick Objects as Mask; or a mask.",
                )
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, masks, **settings) -> io.NodeOutput:
        chosen = RefineSettings(**settings)
        if isinstance(masks, TracksRecord):
            return io.NodeOutput(refine(masks, chosen))
        return io.NodeOutput(host.tracks_mask(refine(_tracks_of(masks), chosen), host.progress()))


class DecAFApplyMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DecAFApplyMask",
            display_name="Apply Mask (Video)",
            category=CATEGORY,
            description="Cuts the objects out of a video with alpha, blurs them, or puts them on another background. Every frame keeps its time, "
            "the video keeps its sound, and memory does not grow with its length.",
            search_aliases=[
                "decaf", "cut out", "remove background", "replace background", "green screen", "alpha", "transparent video", "prores", "matte",
                "alpha matte", "video matte", "matting", "blur face", "pixelate", "censor", "anonymize", "rotoscope", "composite",
            ],
            inputs=[
                frames_input("The clip that the masks belong to. A video keeps its frame rate and its sound."),
                masks_input("From Refine Mask or Propagate with SAM 2; or a MASK with one mask per frame, or one for all frames."),
                io.Combo.Input(
                    "effect", options=list(EFFECTS), default=EffectSettings.effect,
                    tooltip="\n".join(f"{name}: {what}" for name, what in EFFECTS.items()),
                ),
                io.Boolean.Input("invert", default=False, tooltip="Objects and the rest change places."),
                io.Float.Input(
                    "strength", default=EffectSettings.strength, min=0.0, max=1.0, step=0.05,
                    tooltip="How coarse blur and pixels are, or how strongly the rest is dimmed or greyed.",
                ),
                io.Combo.Input(
                    "format", options=list(_FORMATS), default="auto",
                    tooltip="auto: mov with alpha for a cut-out, else mp4. mov is for editing programs, webm for web pages; mp4 has no alpha.",
                ),
                io.MultiType.Input(
                    "background", types=[io.Image, io.Video], optional=True,
                    tooltip="For the effect 'new background': a picture or a video of any size. It fills the frame, and a shorter one starts again.",
                ),
                io.String.Input(
                    "objects", default="", placeholder="all", advanced=True, optional=True,
                    tooltip="Numbers of the objects that are meant, for example 0 or 0, 2. Empty: all.",
                ),
                io.String.Input("colour", default=EffectSettings.colour, advanced=True, optional=True, tooltip="Of 'colour rest', as #RRGGBB."),
                preview_fps_input(),
                io.Boolean.Input(
                    "one_per_object", default=False, advanced=True, optional=True,
                    tooltip="Also make a video of each object by itself: for the output 'one per object'.",
                ),
            ],
            outputs=[
                io.Video.Output("video", tooltip="The result with its sound, for Save Video with Alpha; mp4 for Save Video too."),
                io.String.Output("report", tooltip="What was made, and what became of the sound."),
                io.Video.Output(
                    "each", display_name="one per object", is_output_list=True,
                    tooltip="With one_per_object a list: a video of each object. Save Video with Alpha saves them all, each with the object's "
                    "number in its name. Else the video itself.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(
        cls, frames, masks, effect, invert, strength, format, background=None, objects="", colour=EffectSettings.colour, preview_fps=24.0,
        one_per_object=False,
    ) -> io.NodeOutput:  # fmt: skip
        settings = EffectSettings(effect, strength, colour, invert)
        suffix = _FORMATS[format] or (".mov" if has_alpha(settings) else ".mp4")
        tracks = _tracks_of(masks)
        places = objects_of(tracks, objects)
        if one_per_object and not tracks.tracks:
            raise DecafError(f"There is no object to make a video of. {tracks.message or 'Leave one_per_object off.'}")
        with host.returning_memory():
            clip = host.clip_of(frames)
            sound = host.sound_of(frames, clip)
            given = {
                "background": None if background is None else host.clip_of(background),
                "sound": sound,
                "fps": host.frame_rate(frames, clip, preview_fps),
            }
            each = [[place] for place in places or range(len(tracks.tracks))] * one_per_object
            videos, notes = [], []
            for part in [places, *each]:
                path, _ = host.temp_file(suffix)
                notes.append(apply_mask(path, clip, tracks, settings, objects=part, progress=host.progress(), **given))
                alone = f"object-{tracks.tracks[part[0]].id}" if len(videos) else ""
                videos.append(NamedVideo(path, "_".join(filter(None, [in_file_names(tracks.name), alone]))))
        height, width = clip.frame_size
        told = f"{len(clip)} frames, {width}x{height}, {FORMATS[suffix].name}{' with alpha' * has_alpha(settings)}, {effect}"
        told += f", and {len(each)} objects each by itself" * bool(each)
        told += ", with sound." if sound is not None and not notes[0] else "."
        nothing = "" if tracks.tracks else nothing_of(tracks)
        return io.NodeOutput(videos[0], " ".join(filter(None, [told, notes[0], nothing])), videos[1:] or videos, ui=live.Says(nothing))


def in_file_names(name: str) -> str:
    """The name of a query as a part of a file's name that every file system takes, and in which ComfyUI sees no %placeholder%; may be empty."""
    return re.sub(r"[^\w-]+", "-", unicodedata.normalize("NFC", name)).strip("-_")[:40]


def nothing_of(tracks: TracksRecord) -> str:
    """Says of tracks without an object why there is none: what is made of them is a whole film of nothing, which looks like a failure."""
    message = tracks.message or "No object was found."
    named = live.named(tracks.query)
    return message if not tracks.query or named in message else f"{named}: {message}"


class NamedVideo(InputImpl.VideoFromFile):
    """`part`: what tells it from others of the same node, for the name under which it is saved; may be empty."""

    def __init__(self, path: Path, part: str):
        super().__init__(str(path))
        self.part = part


def _tracks_of(masks) -> TracksRecord:
    """Of DECAF_TRACKS or MASK; some nodes give a single mask as (H, W)."""
    if isinstance(masks, TracksRecord):
        return masks
    return tracks_from_masks(masks if masks.ndim == 3 else masks[None])


class DecAFSaveCutOut(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DecAFSaveCutOut",
            display_name="Save Video with Alpha",
            category=CATEGORY,
            description="Saves a video as it is, with its alpha and sound, into ComfyUI's output folder; or its frames as PNG or EXR pictures.",
            search_aliases=["decaf", "save cut out", "save prores", "save mov", "save webm alpha", "png sequence", "exr sequence", "export alpha"],
            inputs=[
                io.Video.Input("video", tooltip="From Apply Mask (Video)."),
                io.String.Input("filename_prefix", default="video/DecAF", tooltip="The beginning of the file's name; may name a folder."),
                io.Combo.Input(
                    "format", options=["as it is", *_PICTURES], default="as it is",
                    tooltip="PNG or EXR pictures: a folder of numbered pictures, with alpha if the video has it, without sound. EXR is for "
                    "compositing: linear light, colours multiplied by alpha, half floats.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],  # for the workflow in the file
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, video, filename_prefix, format) -> io.NodeOutput:
        source, report = host.file_of(video), host.progress()
        kind = _PICTURES.get(format)
        suffix = "" if kind else source.suffix if source else ".mp4"
        told = workflow_of(cls.hidden)
        tags = {name: json.dumps(value) for name, value in told.items()}
        part = getattr(video, "part", "")
        path = host.output_path(f"{filename_prefix}_{part}" if part else filename_prefix, suffix, size_of(video))
        with host.returning_memory():
            clip = None if source else host.clip_of(video)
            if kind:
                frames = read_with_alpha(source, deep=kind == "exr") if source else (clip[index].numpy() for index in range(len(clip)))
                write_pictures(path, frames, video.get_frame_count(), report, kind=kind, tags=tags)
            else:
                with atomic_write(path) as unfinished:
                    if source is None:
                        video.save_to(str(unfinished), **({"metadata": told} if told else {}))
                    else:
                        copy_with_tags(source, unfinished, tags, report)
            fullest = torch.from_numpy(fullest_frame(source, report)) if source else clip[len(clip) // 2]
            shown = on_checkerboard(fullest)
        return io.NodeOutput(ui=host.shown_images(host.as_image(shown)[None]))


def workflow_of(hidden) -> dict[str, object]:
    """What ComfyUI's own nodes write into the files that they save, from the node's hidden inputs: the workflow as it is in the page, and the prompt
    as it was queued. Nothing with --disable-metadata, and nothing where nobody gave it."""
    if args.disable_metadata:
        return {}
    told = dict(hidden.extra_pnginfo) if isinstance(hidden.extra_pnginfo, dict) else {}
    return told if hidden.prompt is None else told | {"prompt": hidden.prompt}


def size_of(video) -> tuple[int, int]:
    """(H, W)."""
    return tuple(reversed(video.get_dimensions()))
