"""Queries with names, and one of several picked for a branch of its own. Run by inside.py; each raises when something is wrong."""

import torch
from kit import error_of, extract_all, images, run, sam2

CLIP = 3


def tracks_of(query):
    """DECAF_TRACKS of each query, as ComfyUI's list has them."""
    objects, backgrounds, answers, _ = extract_all(images(CLIP), query=query)
    found = []
    for object, background in zip(objects, backgrounds, strict=True):
        fused = run("FrameFusion", attention=run("ObjectBackgroundFusion", object=object, background=background)[0])[0]
        prompts = run("AttentionToSAM2Prompts", fused=fused, threshold=0.95, presence_threshold=0.0)[0]
        found.append(run("SAM2VideoPropagate", sam2=sam2(), frames=images(CLIP), prompts=prompts))
    return [out[1] for out in found], [out[4] for out in found], answers, fused


def case_names_go_through_the_graph():
    tracks, reports, answers, _ = tracks_of("square: the bright square\n\nthe ground: dark or not\nLeft-1: the left side")
    assert [one.name for one in tracks] == ["square", "2", "Left-1"]
    assert [one.query for one in tracks] == ["the bright square.", "the ground: dark or not.", "the left side."]
    assert reports[0].startswith("square: the bright square.\n") and reports[1].startswith("2: the ground: dark or not.\n")
    assert answers[2].startswith("query: Left-1: the left side.") and "left-1" not in answers[2]


def case_a_single_query_without_a_name_reads_as_before():
    tracks, reports, answers, _ = tracks_of("the bright square")
    assert tracks[0].name == "" and reports[0].startswith(("object 0", "Nothing")) and answers[0].startswith("presence: ")


def case_pick_query_by_name_and_number():
    tracks, reports, *_ = tracks_of("square: the bright square\nthe ground\nleft: the left side")
    for wanted, place, name in (("square", 0, "square"), (" SQUARE: ", 0, "square"), ("2", 1, "2"), ("3", 2, "left"), ("left", 2, "left")):
        mask, picked, report, told = run("DecAFPickQuery", tracks=tracks, query=[wanted]).args
        assert picked is tracks[place] and report == reports[place] and told == name
        assert mask.shape == (CLIP, 72, 96) and torch.equal(mask.bool(), tracks[place].union())
    (alone,), *_ = tracks_of("the bright square")
    assert run("DecAFPickQuery", tracks=[alone], query=["1"])[3] == "1"


def case_pick_query_refuses_what_is_not_there():
    tracks, *_ = tracks_of("square: the bright square\nthe ground")
    for wanted in ("circle", "0", "3", "-1", "", "the ground"):
        told = error_of("DecAFPickQuery", tracks=tracks, query=[wanted])
        assert "There is no query" in told and told.endswith("square: the bright square.; 2: the ground."), told
    assert "2 queries are called 'square'" in error_of("DecAFPickQuery", tracks=[tracks[0], tracks[0]], query=["square"])
    assert "given 2 texts" in error_of("DecAFPickQuery", tracks=tracks, query=["1", "2"])
    assert "Connect Propagate with SAM 2" in error_of("DecAFPickQuery", tracks=[tracks[0], torch.zeros(1)], query=["1"])


def case_names_that_are_given_twice_are_refused():
    from kit import mllm

    told = error_of("ExtractRolloutAttention", mllm=mllm(), frames=images(1), query="a: one\nA: two", tokens_per_frame=16)
    assert 'Two queries are called "A"' in told


def case_the_preview_names_its_query():
    *_, fused = tracks_of("the ground\nsquare: the bright square")
    named, plain = (run("DecAFAttentionPreview", frames=images(CLIP), fused=one)[0] for one in (fused, without_name(fused)))
    assert named.shape == plain.shape
    assert not torch.equal(named[:, :12], plain[:, :12]) and torch.equal(named[:, 16:], plain[:, 16:])


def without_name(fused):
    from dataclasses import replace

    return replace(fused, name="")


# -- frames that are asked about -------------------------------------------------------------------------------------------------------


def case_only_a_part_is_masked():
    clip = images(8)
    object, background, *_ = extract_all(clip, first_frame=2, last_frame=5)
    fused = run("FrameFusion", attention=run("ObjectBackgroundFusion", object=object[0], background=background[0])[0])[0]
    assert fused.clip.key_frames == (2, 3, 4, 5)
    prompts = run("AttentionToSAM2Prompts", fused=fused, threshold=0.9, presence_threshold=0.0)[0]
    mask = run("SAM2VideoPropagate", sam2=sam2(), frames=clip, prompts=prompts)[0]
    assert len(mask) == 8 and mask[2:6].any() and not mask[:2].any() and not mask[6:].any()


def case_key_frames_by_hand():
    object, *_ = extract_all(images(8), key_frames="6, 1", max_key_frames=1)
    assert object[0].clip.key_frames == (1, 6)


def case_frames_that_cannot_be_are_refused():
    from kit import mllm

    for inputs, told in (
        ({"first_frame": 5, "last_frame": 4}, "Exchange the two"),
        ({"last_frame": 8}, "clip has frames 0 to 7"),
        ({"key_frames": "9"}, "Key frame 9"),
        ({"key_frames": "one"}, "no number of a frame"),
    ):
        assert told in error_of("ExtractRolloutAttention", mllm=mllm(), frames=images(8), query="it", tokens_per_frame=16, **inputs)
