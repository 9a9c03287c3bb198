"""The example workflows around ComfyUI's own SAM 3: see `workflow_specs.py`."""

from __future__ import annotations

from workflow_specs import CHOOSE, SAM3, Node, Workflow

MODELS = "Load Multimodal LLM: choose a folder of **models/LLM**, or a *download* entry"
CHECKPOINT = f"Load Checkpoint: choose a SAM 3.1 checkpoint of **models/checkpoints**: [{SAM3.name}]({SAM3.url})"

SIDE = 1008
"""Pixels that SAM 3 looks at: larger images only fill the memory."""


def _clip_and_models() -> dict[str, Node]:
    return {
        "clip": Node("LoadVideo", {"file": None}, (320, 300)),
        "mllm": Node("LoadMLLM", {"model": CHOOSE}),
        "sam3": Node("CheckpointLoaderSimple", {"ckpt_name": None}, models=(SAM3,)),
    }


def _maps() -> dict[str, Node]:
    return {
        "contrast": Node("ObjectBackgroundFusion", {}, (340, 0)),
        "fused": Node("FrameFusion", {}, (340, 0)),
        "preview": Node("DecAFAttentionPreview", {}, (340, 400)),
    }


_ATTENTION_LINKS = (
    "mllm.mllm > extract.mllm",
    "extract.object > contrast.object",
    "extract.background > contrast.background",
    "contrast.attention > fused.attention",
    "fused.fused > preview.fused",
)
_CLIP_LINKS = ("clip.VIDEO > extract.frames", "clip.VIDEO > preview.frames")

WORKFLOWS = {
    "Pick SAM 3 Tracks by Text (Video)": Workflow(
        "# Pick SAM 3 Tracks by Text\n\nSAM 3 finds all dogs, with good masks. The multimodal LLM understands *which* dog you mean. Here both work "
        "together: the model names the thing, SAM 3 tracks everything of that name, and the attention picks the one.\n\n"
        f"1. Load Video: choose your clip\n2. {MODELS}\n3. {CHECKPOINT}\n4. Extract Rollout Attention: write the *query*\n5. Press **Run**\n\n"
        "The report lists every object with its match. A wrong one is picked? Put Pick Objects as Mask behind *all_tracks*, and write the number.\n\n"
        "Does SAM 3 find nothing? Look at the class name, and write a better one into the text node.",
        {
            "1 · Clip and models": _clip_and_models(),
            "2 · Ask what and where it is": {
                "extract": Node("ExtractRolloutAttention", {"query": "the dog that gets the ball first", "setting": "class name"}, (380, 320)),
                "name": Node("PreviewAny", {}, (380, 130)),
            },
            "3 · Attention": _maps(),
            "4 · SAM 3 tracks all of that name": {
                "text": Node("CLIPTextEncode", {}, (340, 120)),
                "frames": Node("DecAFFrameOfVideo", {"which": "all frames", "longest_side": SIDE}, (340, 0)),
                "track": Node("SAM3_VideoTrack", {"max_objects": 16}, (340, 0)),
            },
            "5 · Pick the one that is meant": {
                "pick": Node("DecAFPickTracks", {}, (340, 0)),
                "report": Node("PreviewAny", {}, (340, 170)),
                "show": Node("DecAFShowObjects", {}, (340, 430)),
            },
            "6 · Cut it out": {
                "cut": Node("DecAFApplyMask", {}, (340, 0)),
                "save": Node("DecAFSaveCutOut", {}, (340, 360)),
            },
        },
        (
            *_CLIP_LINKS,
            *_ATTENTION_LINKS,
            "extract.class_name > name.source",
            "sam3.CLIP > text.clip",
            "extract.class_name > text.text",
            "clip.VIDEO > frames.frames",
            "frames.images > track.images",
            "sam3.MODEL > track.model",
            "text.CONDITIONING > track.conditioning",
            "fused.fused > pick.fused",
            "track.track_data > pick.objects",
            "pick.report > report.source",
            "clip.VIDEO > show.frames",
            "pick.tracks > show.tracks",
            "clip.VIDEO > cut.frames",
            "pick.tracks > cut.masks",
            "cut.video > save.video",
        ),
    ),
    "Points to SAM 3 (Video)": Workflow(
        "# DecAF's points into core SAM 3\n\nSAM 3 understands short noun phrases; DecAF understands the sentence and tells SAM 3 where to look. "
        "The points of the best key frame give SAM 3 the object's mask there, and SAM 3 tracks it from that frame back to the first and on to the "
        "last.\n\n"
        f"1. Load Video: choose your clip\n2. {MODELS}\n3. {CHECKPOINT}\n4. Extract Rollout Attention: write the *query*\n5. Press **Run**",
        {
            "1 · Clip and models": _clip_and_models(),
            "2 · Ask where the object is": {
                "extract": Node("ExtractRolloutAttention", {"query": "the child that kicks the ball"}, (380, 320)),
            },
            "3 · Attention": _maps(),
            "4 · Its mask on the best key frame": {
                "prompts": Node("AttentionToSAM2Prompts", {}, (340, 0)),
                "frame": Node("DecAFFrameOfVideo", {"which": "one frame"}, (340, 0)),
                "detect": Node("SAM3_Detect", {}, (340, 0)),
                "found": Node("MaskPreview", {}, (340, 300)),
            },
            "5 · SAM 3 tracks it": {
                "frames": Node("DecAFFrameOfVideo", {"which": "back, then all", "longest_side": SIDE}, (340, 0)),
                "track": Node("SAM3_VideoTrack", {"max_objects": 1}, (340, 0)),
                "pick": Node("DecAFPickTracks", {}, (340, 0)),
                "report": Node("PreviewAny", {}, (340, 150)),
            },
            "6 · Show and save": {
                "show": Node("DecAFShowObjects", {}, (340, 430)),
                "overlay": Node("SaveVideo", {"filename_prefix": "video/decaf_overlay"}, (320, 340)),
            },
        },
        (
            *_CLIP_LINKS,
            *_ATTENTION_LINKS,
            "fused.fused > prompts.fused",
            "prompts.prompts > preview.prompts",
            "clip.VIDEO > frame.frames",
            "prompts.key_frame > frame.frame",
            "frame.images > detect.image",
            "sam3.MODEL > detect.model",
            "prompts.positive_points > detect.positive_coords",
            "detect.masks > found.mask",
            "clip.VIDEO > frames.frames",
            "prompts.key_frame > frames.frame",
            "frames.images > track.images",
            "sam3.MODEL > track.model",
            "detect.masks > track.initial_mask",
            "fused.fused > pick.fused",
            "track.track_data > pick.objects",
            "frames.lead > pick.lead",
            "pick.report > report.source",
            "clip.VIDEO > show.frames",
            "pick.tracks > show.tracks",
            "show.overlay > overlay.video",
        ),
        shows="DecAFShowObjects",
    ),
}
