"""What the boxes and the example workflows consist of: columns of nodes, links, groups. `make_workflows.py` builds them in ComfyUI's page."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Model:
    """A file that the page offers to download where the widget names it and it is not there. `directory`: below ComfyUI's models."""

    name: str
    url: str
    directory: str


ENCODER = Model(
    "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "https://huggingface.co/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "text_encoders",
)
SAM2_LARGE = Model(
    "sam2.1_hiera_large.pt", "https://huggingface.co/facebook/sam2.1-hiera-large/resolve/main/sam2.1_hiera_large.pt", "sam2"
)

@dataclass(frozen=True)
class Node:
    """`type`: of a node, or the title of a box. Widget values by name; `size`: at least so wide and high (a preview needs room). `gap`: pixels
    left free above it, for links that pass."""

    type: str
    widgets: dict = field(default_factory=dict)
    size: tuple[int, int] = (320, 0)
    models: tuple[Model, ...] = ()
    gap: int = 0


@dataclass(frozen=True)
class Box:
    """Nodes in one box, a subgraph, that the page offers in its search. `inputs`: name -> "node.input", a widget's value among them;
    `outputs`: name -> "node.output"; `shows`: the node whose picture the box shows. `labels`: what the page shows in place of a name of either."""

    description: str
    columns: dict[str, dict[str, Node]]
    links: tuple[str, ...]
    inputs: dict[str, str]
    outputs: dict[str, str]
    shows: str
    labels: dict[str, str]
    size: tuple[int, int] = (380, 720)


@dataclass(frozen=True)
class Workflow:
    """`columns`: title of a group -> its nodes by key, from top to bottom. `links`: "node.output > node.input". `query`: what its picture asks
    for, `shows`: the type of the node whose result it is."""

    note: str
    columns: dict[str, dict[str, Node]]
    links: tuple[str, ...]
    query: str = "the red circle"
    shows: str = "DecAFSaveCutOut"


VIDEO_BOX, IMAGE_BOX = "Mask by Text (Video)", "Mask by Text (Image)"

ALIASES = (
    "segment", "mask", "roto", "rotoscope", "matte", "cut out", "remove background", "track", "video segmentation", "prompt to mask", "find object",
    "text to mask", "decaf",
)  # fmt: skip
"""What people type who look for the boxes."""

_FINDING = {
    "1 · Ask where the object is": {"extract": Node("ExtractRolloutAttention", {}, (340, 0))},
    "2 · Subtract the background": {"contrast": Node("ObjectBackgroundFusion")},
    "3 · Join video and frames": {"fused": Node("FrameFusion")},
    "4 · Points": {"prompts": Node("AttentionToSAM2Prompts")},
    "5 · Masks of the clip": {"segment": Node("SAM2VideoPropagate")},
    "6 · Finish": {"refine": Node("DecAFRefineMask")},
    "7 · Pick": {"pick": Node("DecAFTracksToMask")},
}
_FINDING_LINKS = (
    "extract.object > contrast.object",
    "extract.background > contrast.background",
    "contrast.attention > fused.attention",
    "fused.fused > prompts.fused",
    "prompts.prompts > segment.prompts",
    "segment.tracks > refine.masks",
    "refine.refined > pick.tracks",
)
# Inputs of the box in the order in which it shows them; those of the second part have a field in it.
_INPUTS = {
    "frames": "extract.frames, segment.frames, show.frames",
    "mllm": "extract.mllm",
    "sam2": "segment.sam2",
    "query": "extract.query",
    "not_this": "extract.not_this",
    "targets": "segment.targets",
    "score_threshold": "segment.score_threshold",
    "max_objects": "pick.max_objects",
    "grow": "refine.grow",
    "feather": "refine.feather",
}

_LABELS = {
    "mllm": "language model",
    "sam2": "SAM 2",
    "not_this": "not this",
    "score_threshold": "score threshold",
    "max_objects": "max objects",
    "cut_out": "cut-out",
}

BOXES = {
    VIDEO_BOX: Box(
        "Masks what a sentence means, in every frame of a video: a multimodal LLM finds it, SAM 2 follows it. Gives the mask, the video with the "
        "object shown, and the object cut out, with sound.",
        _FINDING
        | {
            "8 · Show and cut out": {
                "show": Node("DecAFShowObjects", {"numbers": True}, (340, 300)),
                "cut": Node("DecAFApplyMask", {"effect": "cut out"}),
            },
        },
        (*_FINDING_LINKS, "pick.tracks > show.tracks", "pick.tracks > cut.masks"),
        _INPUTS | {"frames": f"{_INPUTS['frames']}, cut.frames"},
        {
            "mask": "pick.mask",
            "overlay": "show.overlay",
            "cut_out": "cut.video",
            "refined": "pick.tracks",
            "tracks": "segment.tracks",
            "report": "segment.report",
        },
        "show",
        _LABELS | {"frames": "video"},
    ),
    IMAGE_BOX: Box(
        "Masks what a sentence means, in a picture: a multimodal LLM finds it, SAM 2 outlines it. Gives the mask, the picture with the object "
        "shown, and the object cut out on nothing.",
        _FINDING
        | {
            "8 · Show and cut out": {
                "show": Node("DecAFShowObjects", {"numbers": True}, (340, 300)),
                "invert": Node("InvertMask"),
            },
            "9 · Pictures": {"picture": Node("GetVideoComponents"), "cut": Node("JoinImageWithAlpha")},
        },
        (
            *_FINDING_LINKS,
            "pick.tracks > show.tracks",
            "show.overlay > picture.video",
            "pick.mask > invert.mask",
            "invert.MASK > cut.alpha",
        ),
        _INPUTS | {"frames": f"{_INPUTS['frames']}, cut.image"},
        {
            "mask": "pick.mask",
            "overlay": "picture.images",
            "cut_out": "cut.IMAGE",
            "refined": "pick.tracks",
            "tracks": "segment.tracks",
            "report": "segment.report",
        },
        "show",
        _LABELS | {"frames": "image"},
    ),
}

_MLLM = Node("LoadMLLM", {"model": ENCODER.name}, (320, 120), models=(ENCODER,))
_SAM2 = Node("DecAFLoadSAM2", {"model": SAM2_LARGE.name}, (320, 120), models=(SAM2_LARGE,))
_VIDEO = {"clip": Node("LoadVideo", {"file": None}, (320, 300)), "mllm": _MLLM, "sam2": _SAM2}
_INTO_BOX = ("mllm.mllm > box.mllm", "sam2.sam2 > box.sam2")
_FOLDERS = (
    "```\nComfyUI/models\n├─ text_encoders\n│  └─ qwen_2.5_vl_7b_fp8_scaled.safetensors\n├─ LLM\n│  └─ or a folder such as "
    "Qwen2.5-VL-3B-Instruct\n└─ sam2\n   └─ sam2.1_hiera_large.pt\n```\n\n"
    f"Download: [{ENCODER.name}]({ENCODER.url}) (9 GB), [{SAM2_LARGE.name}]({SAM2_LARGE.url}) (0.9 GB). "
)
_OTHERS = (
    "Any other model that *Load Multimodal LLM* and *Load SAM 2* list will do; the *download* entries of the first fetch one by themselves."
)
_DOG = "the dog that gets the ball first"


def _box(query: str, title: str = VIDEO_BOX, gap: int = 0) -> Node:
    return Node(title, {"query": query}, (380, 720), gap=gap)


WORKFLOWS = {
    "A First Try (No Download)": Workflow(
        "# A first try\n\nPress **Run**. No download, no GPU: a made-up clip of moving shapes, and two tiny models that come with the pack.\n\n"
        "*Save Video with Alpha* shows what was found, cut out. Now write another sentence in the box: the list at the right names some that "
        "this clip knows. Another number in *clip_seed* makes another clip.\n\n"
        "A double click on the box's title bar shows what is in it.\n\n"
        "The tiny models know nothing but such clips. For your own video, open the template **Cut Out by Text (Video)**.",
        {
            "1 · Clip and models": {
                "clip": Node("DecAFSampleClip", {"frames": 24}, (320, 210)),
                "mllm": Node("LoadMLLM", {"model": "bundled"}, (320, 120)),
                "sam2": Node("DecAFLoadSAM2", {"model": "bundled"}, (320, 120)),
            },
            "2 · Say what": {"box": _box("the red circle")},
            "3 · Result": {
                "save": Node("DecAFSaveCutOut", {"filename_prefix": "video/first_try"}, (340, 420)),
                "queries": Node("PreviewAny", {}, (340, 260)),
            },
        },
        ("clip.images > box.frames", *_INTO_BOX, "box.cut_out > save.video", "clip.queries > queries.source"),
        shows="DecAFShowObjects",
    ),
    "Blur by Text (Video)": Workflow(
        "# Blur by text\n\nBlurs what your sentence means, and keeps the sound.\n\n"
        "1. **Load Video**: your clip\n2. Models: see below\n3. Write in the box what to blur\n4. **Run**\n\n"
        "Everything else instead? Turn *invert* on. *effect* also pixelates, dims or greys the rest, or puts a colour or another background "
        f"behind.\n\n{_FOLDERS}{_OTHERS}",
        {
            "1 · Clip and models": _VIDEO,
            "2 · Say what": {"box": _box("the face of the man with the hat")},
            "3 · Blur": {"apply": Node("DecAFApplyMask", {"effect": "blur"})},
            "4 · Save": {"save": Node("SaveVideo", {"filename_prefix": "video/blurred"}, (360, 380))},
        },
        ("clip.VIDEO > box.frames", *_INTO_BOX, "clip.VIDEO > apply.frames", "box.refined > apply.masks", "apply.video > save.video"),
        "the yellow circle",
        "SaveVideo",
    ),
    "Correct a Mask (Video)": Workflow(
        "# Correct a mask\n\nWhen a part is missing, or too much is masked.\n\n"
        "1. **Run** once. *Show Objects* numbers what was found\n2. **Correct Objects**: the *object*'s number, the *frame*; then click on what "
        "belongs to it, and shift-click what does not. A box or a painted mask can be connected\n"
        "3. **Run**: only that object is tracked anew\n\nNothing marked: nothing is changed. For more corrections, put more of these nodes in a "
        f"row.\n\n{_FOLDERS}{_OTHERS}",
        {
            "1 · Clip and models": _VIDEO,
            "2 · Say what": {"box": _box(_DOG)},
            "3 · Mark what is wrong": {"correct": Node("DecAFCorrectObjects", {}, (440, 680))},
            "4 · See it, finish it": {
                "show": Node("DecAFShowObjects", {}, (340, 420)),
                "refine": Node("DecAFRefineMask", {}, (340, 0)),
            },
            "5 · Cut out": {"apply": Node("DecAFApplyMask", {})},
            "6 · Save": {"save": Node("DecAFSaveCutOut", {"filename_prefix": "video/corrected"}, (340, 420))},
        },
        (
            "clip.VIDEO > box.frames",
            *_INTO_BOX,
            "sam2.sam2 > correct.sam2",
            "clip.VIDEO > correct.frames",
            "box.tracks > correct.tracks",
            "clip.VIDEO > show.frames",
            "correct.tracks > show.tracks",
            "correct.tracks > refine.masks",
            "clip.VIDEO > apply.frames",
            "refine.refined > apply.masks",
            "apply.video > save.video",
        ),
        "the pink shape",
        "DecAFShowObjects",
    ),
    "Cut Out by Text (Video)": Workflow(
        "# Cut out by text\n\nType what you mean; get it cut out of the video, with soft edges and sound.\n\n"
        "1. **Load Video**: your clip\n2. Models: see below\n3. Write your sentence in the box\n4. **Run**\n\n"
        "One of several, or a part only? Set *targets* to *all*; too many? To *one*. Press Run again: no model runs twice. Wrong in "
        f"places? Open the template **Correct a Mask (Video)**.\n\n{_FOLDERS}{_OTHERS}",
        {
            "1 · Clip and models": _VIDEO,
            "2 · Say what": {"box": _box(_DOG)},
            "3 · Save the cut-out": {"save": Node("DecAFSaveCutOut", {"filename_prefix": "video/cut_out"}, (360, 440))},
        },
        ("clip.VIDEO > box.frames", *_INTO_BOX, "box.cut_out > save.video"),
    ),
    "Mask by Text (Image)": Workflow(
        "# Mask by text, in a picture\n\n1. **Load Image**: your picture\n2. Models: see below. Here ComfyUI's own *Load CLIP* loads the "
        "text encoder of Qwen-Image as the language model; *Load Multimodal LLM* does as well\n3. Write your sentence in the box\n4. **Run**\n\n"
        f"Connect *mask* to whatever takes one: inpainting, a detailer, a new background.\n\n{_FOLDERS}",
        {
            "1 · Picture and models": {
                "clip": Node("LoadImage", {"image": None}, (320, 330)),
                "mllm": Node("CLIPLoader", {"clip_name": ENCODER.name, "type": "qwen_image"}, (320, 150), models=(ENCODER,)),
                "sam2": _SAM2,
            },
            "2 · Say what": {"box": _box("the cup that is nearest to the window", IMAGE_BOX)},
            "3 · Result": {
                "save": Node("SaveImage", {"filename_prefix": "cut_out"}, (340, 400)),
                "mask": Node("MaskPreview", {}, (340, 300)),
            },
        },
        ("clip.IMAGE > box.frames", "mllm.CLIP > box.mllm", "sam2.sam2 > box.sam2", "box.cut_out > save.images", "box.mask > mask.mask"),
        "the purple diamond",
        "SaveImage",
    ),
    "Step by Step (Video)": Workflow(
        "# Step by step\n\nThe method node by node: what is in the box *Mask by Text (Video)*. To look at each step, to tune it, or to "
        "replace it.\n\n"
        "The heat map shows where the model looks, before SAM 2 runs. Too little is marked? Lower *threshold* in Turn Attention into Prompts. "
        f"Several lines in *query* give several masks.\n\n{_FOLDERS}{_OTHERS}",
        {
            "1 · Clip and models": _VIDEO,
            "2 · Ask where the object is": {"extract": Node("ExtractRolloutAttention", {"query": _DOG}, (360, 780))},
            "3 · Subtract": {
                "contrast": Node("ObjectBackgroundFusion", {}, (300, 0)),
                "answers": Node("PreviewAny", {}, (300, 240)),
            },
            "4 · Join": {"fused": Node("FrameFusion", {}, (300, 0))},
            "5 · Points": {"prompts": Node("AttentionToSAM2Prompts", {}, (320, 270))},
            "6 · Look": {"preview": Node("DecAFAttentionPreview", {}, (340, 460))},
            "7 · Masks": {"segment": Node("SAM2VideoPropagate", {}, (340, 560))},
            "8 · Result": {
                "show": Node("DecAFShowObjects", {}, (340, 500)),
                "report": Node("PreviewAny", {}, (340, 180)),
            },
        },
        (
            "clip.VIDEO > extract.frames",
            "mllm.mllm > extract.mllm",
            "extract.answers > answers.source",
            *_FINDING_LINKS[:4],
            "clip.VIDEO > preview.frames",
            "fused.fused > preview.fused",
            "prompts.prompts > preview.prompts",
            "preview.prompts > segment.prompts",
            "sam2.sam2 > segment.sam2",
            "clip.VIDEO > segment.frames",
            "clip.VIDEO > show.frames",
            "segment.tracks > show.tracks",
            "segment.report > report.source",
        ),
        shows="DecAFAttentionPreview",
    ),
}
