"""The example workflows around ComfyUI's own SAM 3: see `workflow_specs.py`."""

from __future__ import annotations

from workflow_specs import _FINDING_LINKS, _MLLM, ENCODER, Model, Node, Workflow

SAM3 = Model(
    "sam3.1_multiplex_fp16.safetensors",
    "https://huggingface.co/Comfy-Org/sam3.1/resolve/main/checkpoints/sam3.1_multiplex_fp16.safetensors",
    "checkpoints",
)
SIDE = 1008
"""Pixels that SAM 3 looks at: larger images only fill the memory."""

PICK, POINTS = "Pick SAM 3 Tracks by Text (Video)", "Points to SAM 3 (Video)"

_STEPS = (
    "1. **Load Video**: your clip\n2. Models: see below\n3. **Extract Rollout Attention**: write the *query*\n4. **Run**\n\n"
    "```\nComfyUI/models\n├─ text_encoders\n│  └─ qwen_2.5_vl_7b_fp8_scaled.safetensors\n├─ LLM\n│  └─ or a folder such as "
    "Qwen2.5-VL-3B-Instruct\n└─ checkpoints\n   └─ sam3.1_multiplex_fp16.safetensors\n```\n\n"
    f"Download: [{ENCODER.name}]({ENCODER.url}) (9 GB), [{SAM3.name}]({SAM3.url}).\n\n"
)


def _clip_and_models() -> dict[str, Node]:
    return {
        "clip": Node("LoadVideo", {"file": None}, (320, 300)),
        "mllm": _MLLM,
        "sam3": Node("CheckpointLoaderSimple", {"ckpt_name": SAM3.name}, (320, 130), models=(SAM3,)),
    }


_CLIP_LINKS = ("clip.VIDEO > extract.frames", "clip.VIDEO > preview.frames", "mllm.mllm > extract.mllm", "fused.fused > preview.fused")

WORKFLOWS = {
    PICK: Workflow(
        "# Pick SAM 3 tracks by text\n\nSAM 3 finds all dogs, with good masks. The multimodal LLM understands *which* dog you mean. Here both work "
        "together: the model names the thing, SAM 3 tracks everything of that name, and the attention picks the one.\n\n"
        f"{_STEPS}The report lists every object with its match. A wrong one is picked? Put Pick Objects as Mask behind *all_tracks*, and write "
        "the number. Does SAM 3 find nothing? Look at the class name, and write a better one into the text node.",
        {
            "1 · Clip and models": _clip_and_models(),
            "2 · Ask what and where": {
                "extract": Node("ExtractRolloutAttention", {"query": "the dog that gets the ball first", "setting": "class name"}, (360, 0)),
            },
            "3 · Subtract; the name": {
                "contrast": Node("ObjectBackgroundFusion", {}, (300, 0)),
                "name": Node("PreviewAny", {}, (300, 180)),
                "text": Node("CLIPTextEncode", {}, (300, 130)),
            },
            "4 · Join; the frames": {
                "fused": Node("FrameFusion", {}, (300, 0)),
                "frames": Node("DecAFFrameOfVideo", {"which": "all frames", "longest_side": SIDE}, (300, 0)),
            },
            "5 · SAM 3 tracks all": {
                "track": Node("SAM3_VideoTrack", {"max_objects": 16}, (320, 0)),
                "preview": Node("DecAFAttentionPreview", {}, (320, 400)),
            },
            "6 · Pick the one": {"pick": Node("DecAFPickTracks", {}, (320, 0))},
            "7 · See it, cut it out": {
                "cut": Node("DecAFApplyMask", {}, (340, 0)),
                "show": Node("DecAFShowObjects", {}, (340, 430)),
                "report": Node("PreviewAny", {}, (340, 180)),
            },
            "8 · Save": {"save": Node("DecAFSaveCutOut", {"filename_prefix": "video/picked"}, (340, 420))},
        },
        (
            *_CLIP_LINKS,
            *_FINDING_LINKS[:3],
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
        "the yellow circle",
        "DecAFAttentionPreview",
    ),
    POINTS: Workflow(
        "# Points to SAM 3\n\nSAM 3 understands short noun phrases; DecAF understands the sentence and tells SAM 3 where to look. The points of the "
        "best key frame give SAM 3 the object's mask there, and SAM 3 tracks it from that frame back to the first and on to the last.\n\n" + _STEPS,
        {
            "1 · Clip and models": _clip_and_models(),
            "2 · Ask where it is": {"extract": Node("ExtractRolloutAttention", {"query": "the child that kicks the ball"}, (360, 0))},
            "3 · Subtract": {"contrast": Node("ObjectBackgroundFusion", {}, (300, 0))},
            "4 · Join": {"fused": Node("FrameFusion", {}, (300, 0))},
            "5 · Points": {"prompts": Node("AttentionToSAM2Prompts", {}, (320, 0))},
            "6 · Best key frame": {
                "frame": Node("DecAFFrameOfVideo", {"which": "one frame"}, (320, 0)),
                "frames": Node("DecAFFrameOfVideo", {"which": "back, then all", "longest_side": SIDE}, (320, 0)),
                "preview": Node("DecAFAttentionPreview", {}, (320, 400)),
            },
            "7 · Its mask there": {"detect": Node("SAM3_Detect", {}, (320, 0))},
            "8 · SAM 3 tracks it": {
                "track": Node("SAM3_VideoTrack", {"max_objects": 1}, (320, 0)),
                "found": Node("MaskPreview", {}, (320, 300)),
            },
            "9 · As tracks": {"pick": Node("DecAFPickTracks", {}, (320, 0))},
            "10 · Result": {
                "show": Node("DecAFShowObjects", {}, (340, 430)),
                "report": Node("PreviewAny", {}, (340, 180)),
            },
            "11 · Save": {"overlay": Node("SaveVideo", {"filename_prefix": "video/sam3_overlay"}, (340, 360))},
        },
        (
            *_CLIP_LINKS,
            *_FINDING_LINKS[:4],
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
        "the purple diamond",
        "DecAFAttentionPreview",
    ),
}
