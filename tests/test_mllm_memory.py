"""What the MLLM stage holds at a time, and what it does when memory runs out, with tiny random models."""

import pytest
import torch
from dense_rollout import relative
from random_clips import clip_of

from decaf.attention.extract import extract_attention
from decaf.mllm import load_mllm
from decaf.mllm.footprint import kept_bytes, passing_bytes
from decaf.report import Report

QUERY = "the dog that gets the ball first"


def out_of_memory_for(calls, monkeypatch, blocks):
    """Makes the first `calls` rollouts run out of GPU memory; `blocks` gets the block size of every one."""
    import decaf.attention.passes

    roll_out = decaf.attention.passes.last_row_rollout

    def limited(*args, block_bytes=None, **kwargs):
        blocks.append(block_bytes)
        if len(blocks) <= calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return roll_out(*args, block_bytes=block_bytes, **kwargs)

    monkeypatch.setattr(decaf.attention.passes, "last_row_rollout", limited)


def watch_budgets(monkeypatch):
    """Gets the byte budget of the queries in every pass over pictures."""
    from decaf.attention.batches import Batches

    budgets, budget_of = [], Batches.q_budget_bytes

    def watched(self, tokens):
        budgets.append(budget_of(self, tokens))
        return budgets[-1]

    monkeypatch.setattr(Batches, "q_budget_bytes", watched)
    return budgets


@pytest.mark.parametrize("setting", ["expression", "class name"])
def test_out_of_memory_once_is_tried_again_smaller(mllm_folder, monkeypatch, setting):
    mllm = load_mllm(mllm_folder("qwen2_5_vl"))
    expected, _ = extract_attention(mllm, clip_of(3), QUERY, setting=setting, tokens_per_frame=40)
    blocks = []
    out_of_memory_for(1, monkeypatch, blocks)
    found, _ = extract_attention(mllm, clip_of(3), QUERY, setting=setting, tokens_per_frame=40)
    assert blocks[0] is None and blocks[1] < 32 << 20
    assert relative(found.video, expected.video) < 1e-5 and relative(found.frame, expected.frame) < 1e-5


def test_out_of_memory_twice_says_what_to_lower(mllm_folder, monkeypatch):
    out_of_memory_for(2, monkeypatch, [])
    with pytest.raises(torch.OutOfMemoryError, match="tokens per frame"):
        extract_attention(load_mllm(mllm_folder("qwen2_5_vl")), clip_of(3), QUERY, tokens_per_frame=40)


@pytest.mark.parametrize("setting", ["expression", "class name"])
def test_frames_are_batched_as_memory_allows(mllm_folder, monkeypatch, setting):
    """Room for all of them: one batch. Out of memory: halves, without asking anything twice; the maps are the same."""
    mllm = load_mllm(mllm_folder("qwen2_5_vl"))
    once, report = Report(), Report()
    expected = extract_attention(mllm, clip_of(5), QUERY, setting=setting, tokens_per_frame=40, progress=once)
    batches, room = [], {}
    encode = mllm.family.encode

    def limited(mllm, layout, pixels):
        if layout.kind == "image":
            batches.append(layout.batch)
            if layout.batch > room["frames"]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return encode(mllm, layout, pixels)

    monkeypatch.setattr(mllm.family, "encode", limited)
    monkeypatch.setattr("decaf.mllm.engine.free_memory", lambda device: 1 << 40)
    for room["frames"], tried in ((5, [5]), (2, [5, 3, 2, 2, 1])):
        batches.clear()
        report.counts.clear()
        found = extract_attention(mllm, clip_of(5), QUERY, setting=setting, tokens_per_frame=40, progress=report)
        assert batches == tried
        passes = report.counts.pop("forward_passes")
        # What was done in vain is not counted. Answers are followed by a second pass on what was kept.
        done = sum(size <= room["frames"] for size in tried)
        assert passes == (1 + done) * (1 if setting == "expression" else 2) + (setting == "class name")
        assert report.counts == {name: number for name, number in once.counts.items() if name != "forward_passes"}
        for one, other in zip(found, expected, strict=True):
            assert relative(one.video, other.video) < 1e-5 and relative(one.frame, other.frame) < 1e-5
            assert one.answers == other.answers


def test_little_free_memory_makes_small_batches(mllm_folder, monkeypatch):
    mllm = load_mllm(mllm_folder("qwen2_5_vl"))
    monkeypatch.setattr("decaf.mllm.engine.free_memory", lambda device: 1)
    prompts = []
    encode = mllm.family.encode
    monkeypatch.setattr(mllm.family, "encode", lambda mllm, layout, pixels: prompts.append(layout.batch) or encode(mllm, layout, pixels))
    extract_attention(mllm, clip_of(4), QUERY, tokens_per_frame=40)
    assert prompts == [1, 1, 1, 1, 1]


def test_a_second_try_after_out_of_memory_leaves_the_queries_no_room(mllm_folder, monkeypatch):
    mllm = load_mllm(mllm_folder("qwen2_5_vl"))
    budgets, blocks = watch_budgets(monkeypatch), []
    monkeypatch.setattr("decaf.mllm.engine.free_memory", lambda device: 1 << 40)
    out_of_memory_for(1, monkeypatch, blocks)
    extract_attention(mllm, clip_of(3), QUERY, tokens_per_frame=40)
    assert budgets[0] > 1 << 30 and budgets[1:] == [0, 0]


def test_a_cpu_takes_frames_in_batches_that_help(mllm_folder, monkeypatch):
    """More than the video's tokens, as long as they are few."""
    mllm = load_mllm(mllm_folder("qwen2_5_vl"))
    prompts = []
    encode = mllm.family.encode
    monkeypatch.setattr(mllm.family, "encode", lambda mllm, layout, pixels: prompts.append(layout.batch) or encode(mllm, layout, pixels))
    for enough, expected in ((0, [1, 1, 1, 1, 1, 1]), (1024, [1, 5])):
        prompts.clear()
        monkeypatch.setattr("decaf.attention.batches.ENOUGH_TOKENS_ON_CPU", enough)
        extract_attention(mllm, clip_of(5), QUERY, tokens_per_frame=40)
        assert prompts == expected


@pytest.mark.parametrize("setting", ["expression", "class name"])
def test_where_memory_is_scarce_queries_wait_in_host_memory(mllm_folder, monkeypatch, setting):
    """The room is what the rest of the pass leaves: none of a little memory, enough of a lot."""
    from decaf.attention.rollout import BLOCK_BYTES

    mllm = load_mllm(mllm_folder("qwen2_5_vl"))
    monkeypatch.setitem(BLOCK_BYTES, "cuda", 0)
    budgets, found = watch_budgets(monkeypatch), []
    whole = (passing_bytes(mllm, 1000) + kept_bytes(mllm, 1000, mllm.layers // 2, keep=True)) // 1000
    for free in (None, 1000, 500 * whole, 1 << 40):
        budgets.clear()
        monkeypatch.setattr("decaf.mllm.engine.free_memory", lambda device, free=free: free)
        found.append(extract_attention(mllm, clip_of(4), QUERY, setting=setting, tokens_per_frame=40))
        if free is None:
            assert set(budgets) == {None}, "a device without memory of its own has nothing to spare"
        elif free == 1000:
            assert len(budgets) >= 5 and not any(budgets)
        else:
            assert budgets and all(0 < budget < free for budget in budgets)
    for one in found[1:]:
        for other, first in zip(one, found[0], strict=True):
            assert relative(other.video, first.video) < 1e-5 and relative(other.frame, first.frame) < 1e-5


def test_out_of_memory_in_the_background_question_leaves_no_trace_in_what_is_kept(mllm_folder, monkeypatch):
    """In the setting *class name* the keys and values of the pictures outlive the failed try."""
    import decaf.attention.passes

    mllm = load_mllm(mllm_folder("qwen2_5_vl"))
    expected = extract_attention(mllm, clip_of(3), QUERY, setting="class name", tokens_per_frame=40)
    armed = []
    choose = decaf.attention.passes.Extraction.choose_name

    def choose_then_arm(self, *args):
        name = choose(self, *args)
        armed.append(True)
        return name

    def fail_once(*_):
        if armed:
            armed.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(decaf.attention.passes.Extraction, "choose_name", choose_then_arm)
    mllm.engine.text_tower.layers[2].register_forward_pre_hook(fail_once)
    found = extract_attention(mllm, clip_of(3), QUERY, setting="class name", tokens_per_frame=40)
    for one, other in zip(found, expected, strict=True):
        assert one.question == other.question
        assert relative(one.video, other.video) < 1e-5 and relative(one.frame, other.frame) < 1e-5


def test_what_does_not_fit_host_memory_is_computed_again(mllm_folder, monkeypatch):
    """*Class name* keeps keys, values and captured queries of the pictures up to a limit. Beyond it the maps are the same, for more passes."""
    import decaf.attention.passes

    mllm, kept = load_mllm(mllm_folder("qwen2_5_vl")), []
    put_aside = decaf.attention.passes.Extraction._put_aside
    monkeypatch.setattr(decaf.attention.passes.Extraction, "_put_aside", lambda *args: kept.append(put_aside(*args)) or kept[-1])
    monkeypatch.setattr("decaf.attention.batches.ENOUGH_TOKENS_ON_CPU", 1)
    once = Report()
    expected = extract_attention(mllm, clip_of(3), QUERY, setting="class name", tokens_per_frame=40, progress=once)
    sizes = [len(each.segments) for each, _ in kept]
    assert len(sizes) == 4  # the video and three images
    # What is held of a token, as the limit's comment counts it: keys and values of all layers, queries of the upper half; keys only once.
    text = mllm.engine.shape
    per_token = (2 * text.kv_heads * text.layers + text.heads * (text.layers - text.layers // 2)) * text.head_width * 4
    for size, (kv, qk) in zip(sizes, kept, strict=True):
        held = {tensor.data_ptr(): tensor.nbytes for part in (kv.k, kv.v, qk.q, qk.k) for tensor in part.values()}
        assert sum(held.values()) == size * per_token
    for fitting in (4, 2, 0):
        kept.clear()
        again = Report()
        monkeypatch.setattr(decaf.attention.passes, "MOST_KEPT_BYTES", sum(sizes[:fitting]) * per_token)
        found = extract_attention(mllm, clip_of(3), QUERY, setting="class name", tokens_per_frame=40, progress=again)
        assert [each is not None for each in kept] == [True] * fitting + [False] * (4 - fitting)
        assert again.counts["frames_encoded_image"] == 3 + min(3, 4 - fitting)
        assert again.counts["frames_encoded_video"] == 3 * (1 + (fitting == 0))
        assert again.counts["forward_passes"] == once.counts["forward_passes"]  # the pictures are in those that ask again
        for one, other in zip(found, expected, strict=True):
            assert one.question == other.question
            assert relative(one.video, other.video) < 1e-5 and relative(one.frame, other.frame) < 1e-5
