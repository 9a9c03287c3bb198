"""Packed passes: who sees whom, what is captured and kept, and which attention is refused."""

import pytest
import torch
from plain_passes import embedded, forward, whole_prompt
from random_clips import clip_of
from slow import EACH_FAMILY

from decaf.errors import DecafError
from decaf.mllm import load_mllm
from decaf.mllm.packed import PackedAttention, generate, pack, run

QUESTIONS = ["the dog that gets the ball first?", "it.", "Can a red thing be seen here, and where exactly is it?"]


@pytest.fixture(params=EACH_FAMILY)
def mllm(request, mllm_folder):
    return load_mllm(mllm_folder(request.param))


def shown(mllm, kind, frames=3):
    clip = [clip_of(frames)[index] for index in range(frames)]
    family, size = mllm.family, tuple(clip[0].shape[:2])
    layout = family.video_layout(mllm.vision, size, [0.0] * frames, 20) if kind == "video" else family.image_layout(mllm.vision, size, frames, 20)
    return layout, clip


@pytest.mark.parametrize("kind", ["video", "image"])
@torch.inference_mode()
def test_each_question_gets_what_a_prompt_of_its_own_would_give(mllm, kind):
    layout, frames = shown(mllm, kind)
    encoded = mllm.family.encode(mllm, layout, mllm.family.pixels(mllm, layout, frames))
    packed = pack(mllm, layout, QUESTIONS)
    together = run(mllm, packed, encoded, lambda segments: PackedAttention(segments, capture_from=0, keep=True), batch=layout.batch)
    past = together.attention.kept.shared().cpu()
    later = run(mllm, packed, None, lambda segments: PackedAttention(segments, past=past, capture_from=0), batch=layout.batch)
    for index, question in enumerate(QUESTIONS):
        ids, mask, positions = whole_prompt(mllm, layout, question)
        embeds, deepstack = embedded(mllm, layout, frames, ids, mask)
        alone = forward(mllm, embeds, positions, mask, deepstack).last_hidden_state[:, -1]
        for found in (together, later):
            torch.testing.assert_close(found.last[:, index], alone, rtol=1e-4, atol=1e-5)
            for layer, queries in found.attention.questions[index].q.items():
                torch.testing.assert_close(queries, together.attention.questions[index].q[layer], rtol=1e-4, atol=1e-5)
    assert not later.attention.shared.q, "the pictures were not run again"


@torch.inference_mode()
def test_answers_are_those_of_prompts_of_their_own(mllm):
    layout, frames = shown(mllm, "image")
    encoded = mllm.family.encode(mllm, layout, mllm.family.pixels(mllm, layout, frames))
    packed = pack(mllm, layout, QUESTIONS)
    answered = run(mllm, packed, encoded, lambda segments: PackedAttention(segments, keep=True), batch=layout.batch)
    found = generate(mllm, packed, answered, [0, 2], 6, lambda: None)
    for answers, question in zip(found, (QUESTIONS[0], QUESTIONS[2]), strict=True):
        ids, mask, positions = whole_prompt(mllm, layout, question)
        every, levels = embedded(mllm, layout, frames, ids, mask)
        for prompt, answer in enumerate(answers):
            embeds, places = every[prompt : prompt + 1], positions
            deepstack = [level[prompt : prompt + 1] for level in levels]
            for token in answer:
                logits = mllm.engine.logits(forward(mllm, embeds, places, mask, deepstack).last_hidden_state[:, -1])
                assert int(logits.argmax()) == token
                embeds = torch.cat([embeds, mllm.engine.embed(torch.tensor([[token]]))], 1)
                places = torch.cat([places, places[:, -1:] + 1], 1)
    assert any(answer for answers in found for answer in answers)


@pytest.mark.parametrize("budget, moved", [(None, []), (3072, []), (2500, [2]), (1023, [0, 1, 2]), (0, [0, 1, 2])])
def test_queries_beyond_their_budget_go_to_host_memory(monkeypatch, budget, moved):
    """Each layer's take 1024 bytes here, for the 32 shared tokens."""
    segments = torch.tensor([0] * 32 + [1] * 3)
    states = [torch.randn(1, 2, 35, 4) for _ in range(3)]
    attention, gone = PackedAttention(segments, capture_from=0, q_budget_bytes=budget), []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: gone.append(self) or self)
    for layer, one in enumerate(states):
        attention(layer, one, one, one, 0.5)
    assert [layer for layer, one in enumerate(states) if any(one.data_ptr() == other.data_ptr() for other in gone)] == moved
    for layer, one in enumerate(states):
        assert torch.equal(attention.shared.q[layer], one[:, :, :32])
        (question,) = attention.questions
        assert torch.equal(question.q[layer], one[:, :, 32:])
        # A view would keep the whole tensor on the device.
        assert (question.q[layer].data_ptr() == one[:, :, 32:].data_ptr()) == (layer not in moved)


@pytest.mark.parametrize(
    "extra, word",
    [
        ({"sliding_window": 4}, "sliding window"),
        ({"softcap": 30.0}, "soft-capped"),
        ({"s_aux": torch.ones(1)}, "sinks"),
        ({"is_causal": False}, "both directions"),
    ],
)
def test_other_attention_is_refused_by_name(mllm_folder, extra, word):
    mllm = load_mllm(mllm_folder("qwen2_5_vl"))
    attention = mllm.engine.text_tower.layers[1].self_attn
    original = attention.forward
    # The window comes from the layer, what else there is from the call.
    attention.sliding_window = extra.get("sliding_window")
    more = {name: value for name, value in extra.items() if name != "sliding_window"}
    attention.forward = lambda *args, **kwargs: original(*args, **{**kwargs, **more})
    with pytest.raises(DecafError, match=word):
        run(mllm, pack(mllm, None, ["what?"]), None, PackedAttention)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_that_is_not_causal_is_refused(mllm_folder, kind):
    """A model that lets pictures see later text, as some do, would get plausible wrong maps."""
    mllm = load_mllm(mllm_folder("internvl"))
    length = len(pack(mllm, None, ["what?"]).question_ids[0])
    visible = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    prefix = visible.clone()
    prefix[..., :4, :4] = True
    embeds, positions = mllm.engine.embed(torch.arange(length)[None]), torch.arange(length)[None]
    attention = mllm.engine.text_tower.layers[2].self_attn
    original = attention.forward
    for mask, fine in ((visible, True), (prefix, False), (torch.ones_like(visible), False)):
        mask = mask if kind == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(kind).min)
        attention.forward = lambda *args, mask=mask, **kwargs: original(*args, **{**kwargs, "attention_mask": mask})
        asked = PackedAttention(torch.ones(length, dtype=torch.long))
        if fine:
            mllm.engine.run(embeds, positions, asked)
        else:
            with pytest.raises(DecafError, match="both directions"):
                mllm.engine.run(embeds, positions, asked)
    attention.forward, attention.is_causal = original, False
    with pytest.raises(DecafError, match="both directions"):
        mllm.engine.run(embeds, positions, PackedAttention(torch.ones(length, dtype=torch.long)))


def test_a_model_that_fails_while_it_runs_is_named(mllm_folder):
    """What damaged numbers do shows only in a pass. A cancel and an out-of-memory go through."""
    from decaf.attention.extract import extract_attention

    mllm = load_mllm(mllm_folder("qwen2_vl"))

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        extract_attention(mllm, clip_of(2), "it", tokens_per_frame=16, progress=stop)

    def fail(*_):
        raise ZeroDivisionError("integer modulo by zero")

    mllm.engine.text_tower.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(DecafError, match="ZeroDivisionError.*Download it again"):
        extract_attention(mllm, clip_of(2), "it", tokens_per_frame=16)
