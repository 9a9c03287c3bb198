"""From a clip and a sentence to one attention map per key frame."""

from __future__ import annotations

from comfy_api.latest import io

from .. import decaf
from ..decaf.attention import fusion
from ..decaf.attention.batches import memory_needed
from ..decaf.attention.frames import read_key_frames
from ..decaf.attention.questions import Templates, clean_not_this, split_queries
from ..decaf.data import caption
from ..decaf.errors import DecafError
from ..decaf.settings import DETAILS, KEY_FRAMES_BY, METHODS, MODES, SINGLE_FRAMES, AttentionSettings
from . import host, live
from .core_mllm import managed
from .inputs import checked
from .sockets import CATEGORY, Attention, FusedAttention, frames_input, method_input, mllm_input

_MOST_FRAMES = 10_000_000


class ExtractRolloutAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ExtractRolloutAttention",
            display_name="Extract Rollout Attention",
            category=CATEGORY,
            description="Asks the multimodal LLM about the clip and its key frames, and follows its attention back to the pixels: once "
            "for the object that the sentence means, once for the background.",
            search_aliases=[
                "decaf", "attention map", "reasoning segmentation", "referring segmentation", "text to mask", "prompt to mask", "find object",
                "segment", "mask", "video segmentation",
            ],
            inputs=[
                mllm_input(
                    "From Load Multimodal LLM; or a CLIP, from Load CLIP or the loader of another pack, of a text encoder that sees pictures: "
                    "Qwen2.5-VL 7B (as for Qwen-Image) or Qwen3-VL 4B or 8B. A LoRA on the CLIP counts."
                ),
                frames_input(
                    "The clip (or one image). VIDEO is read from its file a few frames at a time; a batch of IMAGE lies in memory whole."
                ),
                io.String.Input(
                    "query",
                    default="",
                    multiline=True,
                    placeholder="the dog that gets the ball first",
                    tooltip="What to mask: a name, a description, or a sentence that needs thinking, in any language that the model reads. "
                    "One query a line: several share the model's passes over the pictures; everything behind runs for each, with a mask each. "
                    "A line may begin with a name: 'ball: the ball he throws'. Pick Query picks one of several.",
                ),
                io.Combo.Input(
                    "setting",
                    options=list(MODES),
                    default=AttentionSettings.setting,
                    tooltip="How the background question says what to leave out. expression: whatever the sentence refers to; nothing is "
                    "generated, so it is fast. class name: the model first names the object; slower, at times steadier.",
                ),
                io.Int.Input(
                    "max_key_frames",
                    default=AttentionSettings.max_key_frames,
                    min=1,
                    max=16,
                    tooltip="At most this many frames, evenly spread, are shown to the model. Fewer: less memory and time, less "
                    "knowledge of the action.",
                ),
                io.Int.Input(
                    "tokens_per_frame",
                    default=AttentionSettings.tokens_per_frame,
                    min=16,
                    max=1600,
                    step=16,
                    tooltip="Visual tokens a key frame may take in the video pass. More: finer maps, more memory and time. Lower it when "
                    "memory runs out.",
                ),
                io.Int.Input(
                    "start_layer",
                    default=-1,
                    min=-1,
                    max=200,
                    advanced=True,
                    optional=True,
                    tooltip="The first decoder layer that counts; -1 takes the upper half of the model.",
                ),
                io.String.Input(
                    "object_question",
                    default="",
                    multiline=True,
                    advanced=True,
                    optional=True,
                    placeholder=Templates.object,
                    tooltip="Your own wording of the object question, with the word query in braces where the query goes, as in the grey example. "
                    "Left empty, the built-in one is asked.",
                ),
                io.String.Input(
                    "background_question",
                    default="",
                    multiline=True,
                    advanced=True,
                    optional=True,
                    placeholder=Templates.background,
                    tooltip="Your own wording of the background question, with the word query in braces where the query goes (in the setting "
                    "'class name' the word object, for the name). Left empty, the built-in one is asked.",
                ),
                io.Combo.Input(
                    "detail",
                    options=list(DETAILS),
                    default=AttentionSettings.detail,
                    advanced=True,
                    optional=True,
                    tooltip="paper: as published. fast: single frames as coarse as the video's, and at most 8 key frames. "
                    "About a sixth of the visual tokens of 16 key frames. With the bundled models masks were as good, but for motion "
                    "(J&F 0.70 instead of 0.97) and sizes (0.61 instead of 0.70).",
                ),
                io.String.Input(
                    "not_this",
                    default="",
                    multiline=True,
                    optional=True,
                    placeholder="the hand that holds it",
                    tooltip="What must not be masked, in words of its own: where the model looks for this more than for the query, nothing is "
                    "masked. One for all queries. It costs no further look at the pictures.",
                ),
                io.Int.Input(
                    "first_frame",
                    default=0,
                    min=0,
                    max=_MOST_FRAMES,
                    advanced=True,
                    optional=True,
                    tooltip="The first frame that is asked about and masked, counted from 0. Masks of the frames before it are empty.",
                ),
                io.Int.Input(
                    "last_frame",
                    default=-1,
                    min=-1,
                    max=_MOST_FRAMES,
                    advanced=True,
                    optional=True,
                    tooltip="The last frame that is asked about and masked; -1: the clip's last one. Masks of the frames after it are empty.",
                ),
                io.String.Input(
                    "key_frames",
                    default="",
                    advanced=True,
                    optional=True,
                    placeholder="0, 12, 40",
                    tooltip="The frames that the model is shown, if you choose them yourself; max_key_frames then does not count. Left empty: as "
                    "key_frames_by says.",
                ),
                io.Combo.Input(
                    "single_frames",
                    options=list(SINGLE_FRAMES),
                    default=AttentionSettings.single_frames,
                    advanced=True,
                    optional=True,
                    tooltip="What the model is shown of each key frame by itself. whole: all of it, as published. zoom: the quarter that it looks at "
                    "in the video, as fine as before and with a quarter of the visual tokens; whole frames where a quarter is not enough. Only in "
                    "the setting 'expression'.",
                ),
                io.Combo.Input(
                    "key_frames_by",
                    options=list(KEY_FRAMES_BY),
                    default=AttentionSettings.key_frames_by,
                    advanced=True,
                    optional=True,
                    tooltip="How key frames are chosen. spacing: evenly spread, as published. presence: only of the parts of the clip in which the "
                    "model says that the query can be seen, for what is seen briefly in a long clip. It first looks at six times as many frames as "
                    "max_key_frames, in pieces.",
                ),
            ],
            outputs=[
                Attention.Output("object", is_output_list=True, tooltip="Where the model looks for the object; one for each query."),
                Attention.Output("background", is_output_list=True, tooltip="Where it looks for everything else; one for each query."),
                io.String.Output(
                    "answers",
                    is_output_list=True,
                    tooltip="What was asked, and what the model said: its yes (1) or no (0) to whether the object is there, and, in the "
                    "setting 'class name', its name.",
                ),
                io.String.Output(
                    "class_name",
                    is_output_list=True,
                    tooltip="What the object is, in a word or two, as the model names it in the setting 'class name': for SAM 3 and other nodes that "
                    "find things by name. In the setting 'expression' the query itself.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, query=None):
        # Only the query: ComfyUI shows what is returned once for every input that is taken here, whichever of them is wrong.
        try:
            if query is not None:  # None: linked, its value is not known yet; or missing, which ComfyUI says
                split_queries([query])
        except DecafError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(
        cls, mllm, frames, query, setting, max_key_frames, tokens_per_frame, start_layer=-1, object_question="", background_question="",
        detail=AttentionSettings.detail, not_this="",
        first_frame=0, last_frame=-1, key_frames="", single_frames=AttentionSettings.single_frames,
        key_frames_by=AttentionSettings.key_frames_by,
    ) -> io.NodeOutput:
        queries, templates = split_queries([query]), _templates(setting, object_question, background_question)
        templates.check(queries, setting)
        not_this = clean_not_this(not_this, queries) if not_this.strip() else None
        mllm = managed(mllm)
        settings = AttentionSettings(
            setting=setting, max_key_frames=max_key_frames, tokens_per_frame=tokens_per_frame, start_layer=None if start_layer < 0 else start_layer,
            detail=detail, not_this=not_this, first_frame=first_frame, last_frame=None if last_frame < 0 else last_frame,
            key_frames=read_key_frames(key_frames), single_frames=single_frames, key_frames_by=key_frames_by,
        )  # fmt: skip
        with host.returning_memory():
            clip = host.clip_of(frames)
            needed = memory_needed(
                mllm.value, len(clip), clip.frame_size, settings, queries=queries, templates=templates, device=host.compute_device()
            )
            found = decaf.extract_attentions(  # imports transformers only now
                mllm.load(needed), clip, queries, settings, templates=templates, progress=host.progress()
            )
        objects, backgrounds = map(list, zip(*found, strict=True))
        told = ["\n".join(_said(object) + _said(background)) for object, background in found]
        named = [templates.class_name(background.question) or background.query.rstrip(".?") for background in backgrounds]
        return io.NodeOutput(objects, backgrounds, told, named, ui=live.Says("\n".join(map(_presence, objects))))


def _templates(setting: str, object_question: str | None, background_question: str | None) -> Templates:
    own = {"object": object_question, "background" if setting == MODES[0] else "class_background": background_question}
    return Templates(**{name: text.strip() for name, text in own.items() if text and text.strip()})


def _said(attention) -> list[str]:
    lines = [f"{attention.kind}: {attention.question}", *(f"  {answer}" for answer in attention.answers)]
    if attention.not_this is not None:
        lines.append(f"not this: {attention.not_this.question}")
    if attention.kind != "object":
        return lines
    return [*([f"query: {caption(attention)}"] if attention.name else []), f"presence: {_presence_of(attention)}", *lines]


def _presence_of(attention) -> str:
    unknown = "not known, this model has no single token for yes, or no head in its file"
    return unknown if attention.presence is None else f"{attention.presence:.2f}"


def _presence(attention) -> str:
    return f"{live.named(attention.query)}: presence {_presence_of(attention)}"


class ObjectBackgroundFusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ObjectBackgroundFusion",
            display_name="Subtract Background Attention",
            category=CATEGORY,
            description="Object-background fusion: takes out of the object's attention what the background question attends as well, and what "
            "'not this' does, if Extract Rollout Attention was given it.",
            search_aliases=["decaf", "object background fusion", "contrast", "attention contrast"],
            inputs=[
                Attention.Input("object", tooltip="The object attention of Extract Rollout Attention."),
                Attention.Input("background", tooltip="The background attention of the same node."),
                io.Float.Input(
                    "sigma",
                    default=1.0,
                    min=0.0,
                    max=5.0,
                    step=0.1,
                    advanced=True,
                    optional=True,
                    tooltip="Blur of the maps before they are compared, in cells of the map. 0: none; single hot cells then stay.",
                ),
            ],
            outputs=[Attention.Output("attention", tooltip="What the object attends more than the background, 0..1.")],
        )

    @classmethod
    @checked
    def execute(cls, object, background, sigma=1.0) -> io.NodeOutput:
        return io.NodeOutput(fusion.object_background_fusion(object, background, sigma=sigma))


class FrameFusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrameFusion",
            display_name="Fuse Video and Frame Attention",
            category=CATEGORY,
            description="Video-frame fusion: joins the map of all key frames seen as a video, which knows the action, with the maps of "
            "each frame seen alone, which are finer.",
            search_aliases=["decaf", "frame fusion", "video frame fusion"],
            inputs=[
                Attention.Input(
                    "attention", tooltip="From Subtract Background Attention (or the object attention, to see it without that step)."
                ),
                io.Float.Input(
                    "video_weight",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    optional=True,
                    tooltip="Share of the video map. More: better for actions and order in time. Less: better for small things.",
                ),
                method_input(
                    "agreement: single frames, which show no motion, count as far as they agree with the video. as published: they "
                    "always count with the share that is set."
                ),
            ],
            outputs=[FusedAttention.Output("fused", tooltip="One map per key frame, 0..1.")],
        )

    @classmethod
    @checked
    def execute(cls, attention, video_weight=0.5, method=METHODS[0]) -> io.NodeOutput:
        return io.NodeOutput(fusion.frame_fusion(attention, video_weight=video_weight, method=method))
