"""Not this, through the graph: no further link, no further pass. Run by inside.py; each raises when something is wrong."""

import torch
from kit import NODES, error_of, extract, extract_all, images, mllm, run


def case_not_this_is_the_last_input_and_left_out_by_default():
    item = NODES["ExtractRolloutAttention"].GET_SCHEMA().inputs[10]
    assert item.id == "not_this" and item.optional and item.default == ""
    for empty in ("", " \n", None):
        assert extract(images(2), not_this=empty)[0].not_this is None


def case_not_this_goes_through_the_graph():
    plain, background, *_ = extract(images(3))
    object, same, answers, *_ = extract(images(3), not_this="the dark ground")
    assert torch.allclose(object.video, plain.video, rtol=1e-4, atol=1e-9) and torch.allclose(same.frame, background.frame, rtol=1e-4, atol=1e-9)
    assert "not this: the dark ground." in answers
    maps = []
    for one in (plain, object):
        contrast = run("ObjectBackgroundFusion", object=one, background=background)[0]
        maps.append(run("FrameFusion", attention=contrast)[0])
    assert maps[0].not_this is None and maps[1].not_this.shape == maps[1].map.shape
    assert not torch.equal(maps[0].map, maps[1].map)


def case_not_this_is_one_for_all_queries():
    objects, _, answers, _ = extract_all(images(2), query="the bright square\nthe ground", not_this="the left side", max_key_frames=1)
    assert [one.not_this.query for one in objects] == ["the left side."] * 2
    assert all("not this: the left side." in one for one in answers)


def case_not_this_that_is_the_query_is_refused():
    told = error_of(
        "ExtractRolloutAttention", mllm=mllm(), frames=images(1), query="one\nthe square", not_this="The square.", tokens_per_frame=16
    )
    assert "says the same as the query" in told and "leave it out" in told
