"""What travels between the nodes. The records are described field by field in decaf/data.py."""

from comfy_api.latest import io

from ..decaf.settings import METHODS

CATEGORY = "DecAF"

# host.Managed around a decaf.mllm MLLM: the model, its tokenizer, and the patcher through which ComfyUI moves it.
MLLM = io.Custom("DECAF_MLLM")

# host.Managed around a decaf.sam2 SAM2: image encoder, mask decoder and memory in one module.
SAM2 = io.Custom("DECAF_SAM2")

# decaf.data.Attention, of kind "object", "background" or "contrast":
#   video (slots, rows, cols) and frame (K, rows', cols') float32 >= 0 (contrast: 0..1), the clip's K key frames, query, question, answers,
#   and of the object presence 0..1 or None.
Attention = io.Custom("DECAF_ATTENTION")

# decaf.data.FusedAttention: map (K, rows', cols') float32 in 0..1, one map per key frame; presence 0..1 or None.
FusedAttention = io.Custom("DECAF_FUSED_ATTENTION")

# decaf.data.SAM2Prompts: n points, each with its key frame, x and y in 0..1 and attention in 0..1; and the fused attention they come from.
Prompts = io.Custom("DECAF_PROMPTS")

# decaf.data.Tracks: compressed masks of N objects over all T frames, with id, prompt frame and scores of each.
Tracks = io.Custom("DECAF_TRACKS")

# Core's tracks of SAM 3: a dict with packed_masks (T, N, h, w / 8) uint8 or None, n_frames, scores of each object, and orig_size (H, W).
SAM3TrackData = io.Custom("SAM3_TRACK_DATA")

# Core's {"x", "y", "width", "height"} in whole pixels, one or a list of them, as a socket without a widget.
BoundingBox = io.Custom(io.BoundingBox.io_type)


def mllm_input(tooltip: str):
    """A loaded multimodal LLM of ours, or the CLIP of a text encoder that is one."""
    return io.MultiType.Input("mllm", types=[MLLM, io.Clip], tooltip=tooltip)


def frames_input(tooltip: str):
    """The clip: IMAGE (T, H, W, C) float 0..1, or VIDEO, which is read from its file a few frames at a time."""
    return io.MultiType.Input("frames", types=[io.Image, io.Video], display_name="images or video", tooltip=tooltip)


def masks_input(tooltip: str):
    """What to mask in each frame: DECAF_TRACKS, which make a frame's mask when it is asked for, or MASK (T, H, W) float 0..1."""
    return io.MultiType.Input("masks", types=[Tracks, io.Mask], display_name="tracks or mask", tooltip=tooltip)


def objects_input(tooltip: str):
    """Objects of any tracker: SAM3_TRACK_DATA, DECAF_TRACKS, or MASK (N * T, H, W) float 0..1, object by object."""
    return io.MultiType.Input(
        "objects", types=[SAM3TrackData, Tracks, io.Mask], display_name="SAM 3 tracks, tracks or masks", tooltip=tooltip
    )


def preview_fps_input(tooltip: str = "Frames per second when images are connected; a video brings its own."):
    """The frame rate of what has none of its own: IMAGE."""
    return io.Float.Input("preview_fps", default=24.0, min=1.0, max=120.0, step=1.0, advanced=True, optional=True, tooltip=tooltip)


def method_input(tooltip: str):
    """The rule by which a step is done: ours, or the paper's."""
    return io.Combo.Input("method", options=list(METHODS), default=METHODS[0], advanced=True, optional=True, tooltip=tooltip)
