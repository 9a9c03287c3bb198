"""What the nodes say to inputs that they cannot take. Run by inside.py; each raises when something is wrong."""

import comfy.utils
import torch
from comfy_api.latest import InputImpl, io
from kit import NODES, attention, error_of, fused, images, mllm, prompts, refused, run, sam2, segment, video

NOT_A_SOCKETS = (
    None,
    True,
    0,
    -5,
    2.5,
    float("nan"),
    "",
    "a path/../of a model",
    "x" * 10**5,
    "\ud800",
    [],
    [1, 2, 3],
    {"a": {}},
    object(),
)


def whole(node):
    """Inputs with which the node runs."""
    clip = images(2)
    made = {
        "LoadMLLM": lambda: {"model": "bundled"},
        "DecAFLoadSAM2": lambda: {"model": "bundled"},
        "DecAFSampleClip": lambda: {"frames": 1},
        "ExtractRolloutAttention": lambda: {"mllm": mllm(), "frames": clip, "query": "it", "tokens_per_frame": 16, "max_key_frames": 1},
        "ObjectBackgroundFusion": lambda: dict(zip(("object", "background"), attention(2), strict=True)),
        "FrameFusion": lambda: {"attention": attention(2)[0]},
        "DecAFAttentionPreview": lambda: {"frames": clip, "fused": fused(2), "prompts": prompts(2)},
        "AttentionToSAM2Prompts": lambda: {"fused": fused(2)},
        "SAM2VideoPropagate": lambda: {"sam2": sam2(), "frames": clip, "prompts": prompts(2)},
        "DecAFShowObjects": lambda: {"frames": clip, "tracks": segment(2)[1]},
        "DecAFCorrectObjects": lambda: {"sam2": sam2(), "frames": clip, "tracks": segment(2)[1], "mask": torch.ones(1, 72, 96)},
        "DecAFPickQuery": lambda: {"tracks": [segment(2)[1]], "query": ["1"]},
        "DecAFTracksToMask": lambda: {"tracks": segment(2)[1]},
        "DecAFPickTracks": lambda: {"fused": fused(2), "objects": segment(2)[1]},
        "DecAFFrameOfVideo": lambda: {"frames": clip},
        "DecAFRefineMask": lambda: {"masks": segment(2)[1]},
        "DecAFApplyMask": lambda: {"frames": clip, "masks": segment(2)[1], "background": images(1)},
        "DecAFSaveCutOut": lambda: {"video": video()},
    }
    return made[node]()


def inputs_of(node):
    return {item.id: item for item in NODES[node].GET_SCHEMA().inputs}


def is_socket(item):
    return item.get_io_type().startswith("DECAF_") or item.get_io_type() in ("IMAGE,VIDEO", "VIDEO", "COMFY_MATCHTYPE_V3")


def wrong_values(item):
    """Values that an input of this kind cannot take."""
    if is_socket(item):
        return NOT_A_SOCKETS
    if isinstance(item, io.Int.Input | io.Float.Input):
        beyond = (item.min - 1, item.max + 1, 10**400, -(10**400), float("inf"), float("-inf"), float("nan"))
        return (*beyond, "5", [5], {}, torch.ones(1))
    if isinstance(item, io.Combo.Input):
        return ("of no combo", "", "../../etc", "\ud800", "x" * 10**5, 7, ["fp32"], {"fp32": 1}, True)
    if isinstance(item, io.Boolean.Input):
        return (0, 1, "true", None, [True], {}, torch.ones(1))
    return (7, ["text"], {}, "half a letter \ud800", torch.ones(1))


def case_every_input_of_every_node_refuses_what_it_cannot_take():
    tried = 0
    for node in NODES:
        given = whole(node)
        run(node, **given)
        for name, item in inputs_of(node).items():
            for value in wrong_values(item):
                if value is None and item.optional:
                    continue
                message = error_of(node, **given | {name: value})
                assert len(message) < 1000 and message.isprintable() is ("\n" not in message), message[:200]
                message.encode()
                assert name in message or name == "model", (node, name, message)
                tried += 1
    assert tried > 300, tried


def case_a_literal_on_a_socket_is_told_with_node_input_and_remedy():
    message = error_of("ExtractRolloutAttention", mllm=5, frames=images(1), query="it")
    assert "Extract Rollout Attention" in message and "'mllm'" in message and "value 5" in message and "Load Multimodal LLM" in message
    message = error_of("SAM2VideoPropagate", sam2=mllm(), frames=images(2), prompts=prompts(2))
    assert "'sam2'" in message and "Load SAM 2" in message, "the wrong kind of model is no SAM 2 either"
    assert "'frames'" in error_of("SAM2VideoPropagate", sam2=sam2(), frames="clip.mp4", prompts=prompts(2))


def case_sockets_of_one_kind_do_not_take_another():
    records = [mllm(), sam2(), attention(2)[0], fused(2), prompts(2), segment(2)[1], images(2)]
    for node in NODES:
        given = whole(node)
        for name, item in inputs_of(node).items():
            if is_socket(item):
                own = given[name][0] if isinstance(given[name], list) else given[name]
                fitting = [one for one in records if type(one) is type(own) and not (one in records[:2] and one is not own)]
                assert len(fitting) == (item.get_io_type() != "VIDEO")  # none of these is one
                for other in records:
                    if not any(other is one for one in fitting):
                        assert f"'{name}'" in error_of(node, **given | {name: other})


def case_an_optional_input_that_holds_nothing_is_left_out():
    for node in NODES:
        given = whole(node)
        names = [name for name, item in inputs_of(node).items() if item.optional]
        run(node, **given | dict.fromkeys(names))


def case_validation_takes_what_the_api_sends():
    """As ComfyUI calls it: without inputs that are missing, None for those that are linked, and with any JSON."""
    for node in ("LoadMLLM", "DecAFLoadSAM2", "ExtractRolloutAttention"):
        name = "query" if node == "ExtractRolloutAttention" else "model"
        assert NODES[node].validate_inputs() is True and NODES[node].validate_inputs(**{name: None}) is True
        for value in ("", "\ud800", "x" * 10**5, "a\x00b" * 3000):
            refused(node, **{name: value}).encode()
    for value in (7, 2.5, True, float("nan"), [], ["bundled"], {}, {"a": [1]}):  # a text is made of these before the query is checked
        for node in ("LoadMLLM", "DecAFLoadSAM2"):
            assert len(refused(node, model=value)) < 1000


def case_one_wrong_input_is_one_error():
    import inspect

    for node in NODES:
        if "validate_inputs" in vars(NODES[node]):
            assert len(inspect.signature(NODES[node].validate_inputs).parameters) == 1, "ComfyUI would show the sentence at each of them"


def case_a_video_that_comfyui_cannot_read_is_a_sentence():
    class Broken:
        def get_components(self):
            raise RuntimeError("moov atom not found")

    assert "moov atom" in error_of("ExtractRolloutAttention", mllm=mllm(), frames=Broken(), query="it")
    no_video = InputImpl.VideoFromFile(str(__file__), start_time=-1.0, duration=1.0)  # ComfyUI looks how long it is, to count from its end
    assert "could not read" in error_of("ExtractRolloutAttention", mllm=mllm(), frames=no_video, query="it")
    no_video = InputImpl.VideoFromFile(str(__file__), start_time=1.0, duration=1.0)  # this pack reads it
    assert "could not be opened as a video" in error_of("ExtractRolloutAttention", mllm=mllm(), frames=no_video, query="it")


def case_every_phase_shows_its_progress():
    """The bar starts anew for each: ComfyUI sends nothing that is less than what it has sent before."""
    sent = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: sent.append((value, total)))
    try:
        tracks = segment(6)[1]
        run("DecAFShowObjects", frames=images(6), tracks=tracks)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    starts = [place for place, (value, _) in enumerate(sent) if value <= 1 and (place == 0 or sent[place - 1][0] > value)]
    assert len(starts) >= 4, f"tracking twice, filling the mask, drawing: {sent}"
