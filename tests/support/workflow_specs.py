"""What the example workflows consist of: columns of nodes, links, groups. `make_workflows.py` builds them in ComfyUI's page."""

from __future__ import annotations

from dataclasses import dataclass, field

# Nothing is presumed to be on a machine: core's combos are left empty, ours have an entry that says so.
CHOOSE = "choose a model"

MODELS = "Load Multimodal LLM: choose a folder of **models/LLM**, or a *download* entry"
SAM2 = "Load SAM 2: choose a checkpoint of **models/sam2**"


@dataclass(frozen=True)
class Node:
    """`type` and widget values by name; `size`: at least so wide and high (a preview needs room)."""

    type: str
    widgets: dict = field(default_factory=dict)
    size: tuple[int, int] = (320, 0)


@dataclass(frozen=True)
class Workflow:
    """`columns`: title of a group -> its nodes by key, from top to bottom. `links`: "node.output > node.input"."""

    title: str
    note: str
    columns: dict[str, dict[str, Node]]
    links: tuple[str, ...]


def _attention(query: str) -> dict[str, dict[str, Node]]:
    return {
        "2 · Ask where the object is": {
            "extract": Node("ExtractRolloutAttention", {"query": query}, (380, 320)),
            "answers": Node("PreviewAny", {}, (380, 170)),
        },
        "3 · Attention": {
            "contrast": Node("ObjectBackgroundFusion", {}, (340, 0)),
            "fused": Node("FrameFusion", {}, (340, 0)),
            "preview": Node("DecAFAttentionPreview", {}, (340, 400)),
        },
    }


_ATTENTION_LINKS = (
    "mllm.mllm > extract.mllm",
    "extract.answers > answers.source",
    "extract.object > contrast.object",
    "extract.background > contrast.background",
    "contrast.attention > fused.attention",
    "fused.fused > preview.fused",
)

WORKFLOWS = {
    "decaf_quick_start": Workflow(
        "Quick start",
        "# Quick start\n\nPress **Run**: no download, no GPU needed. A made-up clip of moving shapes, a query for one of them, and two tiny "
        "models that come with the pack.\n\n"
        "Then play: change *clip_seed* or *kind* in Make Sample Clip. The heat map shows where the model looks, Show Objects the masks, "
        "the last picture the true one.\n\n"
        "The tiny models know nothing but such clips. For your own, open *decaf_video_to_mask*.",
        {
            "1 · Sample clip and bundled models": {
                "clip": Node("DecAFSampleClip", {}),
                "mllm": Node("LoadMLLM", {"model": "bundled"}),
                "sam2": Node("DecAFLoadSAM2", {"model": "bundled"}),
                "query": Node("PreviewAny", {}, (320, 130)),
            },
            "2 · Ask where the object is": {
                "extract": Node("ExtractRolloutAttention", {}, (380, 320)),
            },
            "3 · Attention": {
                "contrast": Node("ObjectBackgroundFusion", {}, (340, 0)),
                "fused": Node("FrameFusion", {}, (340, 0)),
                "preview": Node("DecAFAttentionPreview", {}, (340, 400)),
            },
            "4 · Points, then masks": {
                "prompts": Node("AttentionToSAM2Prompts", {}, (340, 0)),
                "segment": Node("SAM2VideoPropagate", {}, (340, 0)),
                "show": Node("DecAFShowObjects", {"preview_fps": 12}, (340, 460)),
            },
            "5 · Result and truth": {
                "report": Node("PreviewAny", {}, (340, 150)),
                "mask": Node("MaskPreview", {}, (340, 280)),
                "truth": Node("MaskPreview", {}, (340, 280)),
            },
        },
        (
            "clip.images > extract.frames",
            "clip.query > extract.query",
            "clip.query > query.source",
            *(link for link in _ATTENTION_LINKS if "answers" not in link),
            "clip.images > preview.frames",
            "fused.fused > prompts.fused",
            "prompts.prompts > preview.prompts",
            "sam2.sam2 > segment.sam2",
            "clip.images > segment.frames",
            "clip.images > show.frames",
            "segment.tracks > show.tracks",
            "prompts.prompts > segment.prompts",
            "segment.report > report.source",
            "segment.mask > mask.mask",
            "clip.truth > truth.mask",
        ),
    ),
    "decaf_video_to_mask": Workflow(
        "Video to mask",
        "# Video to mask\n\nType what you mean, get a mask for every frame.\n\n"
        f"1. Load Video: choose your clip\n2. {MODELS}\n3. {SAM2}\n4. Extract Rollout Attention: write the *query*\n5. Press "
        f"**Run**\n\n"
        "The heat map shows where the model looks. Too little is marked? Lower *threshold* in Turn Attention into Prompts. Several "
        "objects? "
        "Show Objects numbers them, Pick Objects as Mask takes them apart. Is one of them wrong? Put Correct Objects between the two, and mark it.",
        {
            "1 · Clip and models": {
                "clip": Node("LoadVideo", {"file": None}, (320, 300)),
                "mllm": Node("LoadMLLM", {"model": CHOOSE}),
                "sam2": Node("DecAFLoadSAM2", {"model": CHOOSE}),
            },
            **_attention("the dog that gets the ball first"),
            "4 · Points, then masks": {
                "prompts": Node("AttentionToSAM2Prompts", {}, (340, 0)),
                "segment": Node("SAM2VideoPropagate", {}, (340, 0)),
                "report": Node("PreviewAny", {}, (340, 150)),
            },
            "5 · Show and save": {
                "show": Node("DecAFShowObjects", {}, (340, 430)),
                "overlay": Node("SaveVideo", {"filename_prefix": "video/decaf_overlay"}, (320, 340)),
                "picture": Node("MaskToImage", {}, (320, 0)),
                "create": Node("CreateVideo", {}, (320, 0)),
                "masks": Node("SaveVideo", {"filename_prefix": "video/decaf_mask"}, (320, 340)),
            },
        },
        (
            "clip.VIDEO > extract.frames",
            *_ATTENTION_LINKS,
            "clip.VIDEO > preview.frames",
            "fused.fused > prompts.fused",
            "prompts.prompts > preview.prompts",
            "sam2.sam2 > segment.sam2",
            "clip.VIDEO > segment.frames",
            "clip.VIDEO > show.frames",
            "segment.tracks > show.tracks",
            "prompts.prompts > segment.prompts",
            "segment.report > report.source",
            "show.overlay > overlay.video",
            "segment.mask > picture.mask",
            "picture.IMAGE > create.images",
            "segment.fps > create.fps",
            "create.VIDEO > masks.video",
        ),
    ),
    "decaf_your_text_encoder": Workflow(
        "The text encoder you already have",
        "# The text encoder you already have\n\nThe text encoder of an image or video model can be a multimodal LLM. Then it finds your object as "
        "well: no second download, and ComfyUI loads it as usual, quantised and in parts where the GPU is small.\n\n"
        "1. Load Video: choose your clip\n2. Load CLIP: choose one of\n   - **qwen_2.5_vl_7b...** (Qwen-Image, HunyuanVideo 1.5)\n   - "
        "**qwen3vl_4b...** (Krea 2, Mage-Flow)\n   - **qwen3vl_8b...** (Ideogram 4, Boogu, JoyImage)\n\n   The *type* may stay qwen_image\n"
        f"3. {SAM2}\n4. Extract Rollout Attention: write the *query*\n5. Press **Run**\n\n"
        "The loader of a GGUF pack in the place of Load CLIP works the same way.",
        {
            "1 · Clip and models": {
                "clip": Node("LoadVideo", {"file": None}, (320, 300)),
                "mllm": Node("CLIPLoader", {"clip_name": None, "type": "qwen_image"}),
                "sam2": Node("DecAFLoadSAM2", {"model": CHOOSE}),
            },
            **_attention("the dog that gets the ball first"),
            "4 · Points, then masks": {
                "prompts": Node("AttentionToSAM2Prompts", {}, (340, 0)),
                "segment": Node("SAM2VideoPropagate", {}, (340, 0)),
                "report": Node("PreviewAny", {}, (340, 150)),
            },
            "5 · Show and save": {
                "show": Node("DecAFShowObjects", {}, (340, 430)),
                "overlay": Node("SaveVideo", {"filename_prefix": "video/decaf_overlay"}, (320, 340)),
            },
        },
        (
            "clip.VIDEO > extract.frames",
            "mllm.CLIP > extract.mllm",
            *_ATTENTION_LINKS[1:],
            "clip.VIDEO > preview.frames",
            "fused.fused > prompts.fused",
            "prompts.prompts > preview.prompts",
            "sam2.sam2 > segment.sam2",
            "clip.VIDEO > segment.frames",
            "clip.VIDEO > show.frames",
            "segment.tracks > show.tracks",
            "prompts.prompts > segment.prompts",
            "segment.report > report.source",
            "show.overlay > overlay.video",
        ),
    ),
    "decaf_image_to_mask": Workflow(
        "Image to mask",
        "# Image to mask\n\nThe same for one picture: an image is a clip of one frame.\n\n"
        f"1. Load Image: choose your picture\n2. {MODELS}\n3. {SAM2}\n4. Write the *query*, press **Run**\n\n"
        "The object is saved cut out, on a transparent background.",
        {
            "1 · Image and models": {
                "clip": Node("LoadImage", {"image": None}, (320, 330)),
                "mllm": Node("LoadMLLM", {"model": CHOOSE}),
                "sam2": Node("DecAFLoadSAM2", {"model": CHOOSE}),
            },
            **_attention("the cup that is nearest to the window"),
            "4 · Points, then mask": {
                "prompts": Node("AttentionToSAM2Prompts", {}, (340, 0)),
                "segment": Node("SAM2VideoPropagate", {}, (340, 0)),
                "show": Node("DecAFShowObjects", {}, (340, 430)),
            },
            "5 · Save the cut-out": {
                "mask": Node("MaskPreview", {}, (320, 300)),
                "invert": Node("InvertMask", {}, (320, 0)),
                "join": Node("JoinImageWithAlpha", {}, (320, 0)),
                "save": Node("SaveImage", {"filename_prefix": "decaf_cutout"}, (320, 330)),
            },
        },
        (
            "clip.IMAGE > extract.frames",
            *_ATTENTION_LINKS,
            "clip.IMAGE > preview.frames",
            "fused.fused > prompts.fused",
            "prompts.prompts > preview.prompts",
            "sam2.sam2 > segment.sam2",
            "clip.IMAGE > segment.frames",
            "clip.IMAGE > show.frames",
            "segment.tracks > show.tracks",
            "prompts.prompts > segment.prompts",
            "segment.mask > mask.mask",
            "segment.mask > invert.mask",
            "clip.IMAGE > join.image",
            "invert.MASK > join.alpha",
            "join.IMAGE > save.images",
        ),
    ),
    "decaf_coarse_mask": Workflow(
        "Coarse mask from attention alone",
        "# Coarse mask, no SAM 2\n\nWhat the attention of the multimodal LLM gives by itself: a heat map and a soft-edged mask of "
        "each key frame "
        "(at most 16 of the clip).\n\n"
        f"1. Load Video: choose your clip\n2. {MODELS}\n3. Write the *query*, press **Run**\n\n"
        "Good enough to guide inpainting or a detailer; for exact edges and all frames use the workflow *decaf_video_to_mask*.",
        {
            "1 · Clip and model": {
                "clip": Node("LoadVideo", {"file": None}, (320, 300)),
                "mllm": Node("LoadMLLM", {"model": CHOOSE}),
            },
            **_attention("the person who is about to sit down"),
            "4 · Masks of the key frames": {
                "mask": Node("MaskPreview", {}, (340, 330)),
                "grow": Node("GrowMask", {"expand": 12}, (340, 0)),
                "soft": Node("MaskPreview", {}, (340, 330)),
            },
        },
        (
            "clip.VIDEO > extract.frames",
            *_ATTENTION_LINKS,
            "clip.VIDEO > preview.frames",
            "preview.coarse_mask > mask.mask",
            "preview.coarse_mask > grow.mask",
            "grow.MASK > soft.mask",
        ),
    ),
    "decaf_points_to_sam3": Workflow(
        "Points into SAM 3",
        "# DecAF's points into core SAM 3\n\nSAM 3 understands short noun phrases; DecAF understands the sentence and tells SAM 3 "
        "where to look. "
        "The points of the best key frame prompt ComfyUI's own SAM3 Detect.\n\n"
        f"1. Load Video: choose your clip\n2. {MODELS}\n3. Load Checkpoint: choose a SAM 3 or 3.1 checkpoint of "
        f"**models/checkpoints**\n"
        "4. Write the *query*, press **Run**",
        {
            "1 · Clip and models": {
                "clip": Node("LoadVideo", {"file": None}, (320, 300)),
                "frames": Node("GetVideoComponents", {}, (320, 0)),
                "mllm": Node("LoadMLLM", {"model": CHOOSE}),
                "sam3": Node("CheckpointLoaderSimple", {"ckpt_name": None}),
            },
            **_attention("the child that kicks the ball"),
            "4 · Best key frame and its points": {
                "prompts": Node("AttentionToSAM2Prompts", {}, (340, 0)),
                "points": Node("PreviewAny", {}, (340, 150)),
                "frame": Node("ImageFromBatch", {"length": 1}, (340, 0)),
            },
            "5 · SAM 3": {
                "detect": Node("SAM3_Detect", {}, (320, 0)),
                "mask": Node("MaskPreview", {}, (320, 330)),
            },
        },
        (
            "clip.VIDEO > frames.video",
            "frames.images > extract.frames",
            *_ATTENTION_LINKS,
            "frames.images > preview.frames",
            "fused.fused > prompts.fused",
            "prompts.prompts > preview.prompts",
            "prompts.positive_points > points.source",
            "frames.images > frame.image",
            "prompts.key_frame > frame.batch_index",
            "sam3.MODEL > detect.model",
            "frame.IMAGE > detect.image",
            "prompts.positive_points > detect.positive_coords",
            "detect.masks > mask.mask",
        ),
    ),
}
