"""The yes or no of the model: its score, and what a threshold does with it."""

from types import SimpleNamespace

import pytest
import torch
from plain_passes import embedded, forward, whole_prompt
from slow import EACH_FAMILY

from decaf import clip_from_images, extract_attention, extract_attentions, load_mllm
from decaf.attention.points import attention_points
from decaf.attention.presence import presence_score, yes_and_no
from decaf.attention.questions import Templates
from decaf.data import ClipInfo, FusedAttention
from decaf.errors import DecafError


def test_score_is_the_share_of_yes():
    logits = torch.log(torch.tensor([0.5, 0.06, 0.03, 0.01, 0.4]))
    assert presence_score(logits, [1, 2], [3]) == pytest.approx(0.9)
    assert presence_score(logits, [3], [1, 2]) == pytest.approx(0.1)
    assert presence_score(torch.tensor([90.0, -90.0], dtype=torch.bfloat16), [0], [1]) == 1


def test_every_way_to_begin_an_answer_counts_once():
    known = {"yes": [7], "Yes": [8], " yes": [7], "no": [3], "NO": [4, 5], " No": [6]}
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: known.get(text, [1, 2]))
    engine = SimpleNamespace(shape=SimpleNamespace(vocabulary=8))
    assert yes_and_no(SimpleNamespace(tokenizer=tokenizer, engine=engine)) == ([7], [3, 6]), "8 is beyond the model's vocabulary"
    engine.shape.vocabulary = 9
    assert yes_and_no(SimpleNamespace(tokenizer=tokenizer, engine=engine)) == ([7, 8], [3, 6])


def fused(presence):
    map = torch.zeros(2, 4, 4)
    map[1, 2, 3] = 1
    return FusedAttention(map, ClipInfo(2, (40, 40), (0, 1), torch.zeros(2, 16, 16, 3, dtype=torch.uint8)), "the cup.", presence)


@pytest.mark.parametrize(("presence", "threshold", "points"), [(0.1, 0.2, 0), (0.2, 0.2, 1), (0.0, 0.0, 1), (None, 1.0, 1), (0.99, 1.0, 0)])
def test_threshold(presence, threshold, points):
    prompts = attention_points(fused(presence), presence_threshold=threshold)
    assert len(prompts.key) == points
    assert ('"the cup" is not in this clip' in prompts.message) == (not points)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_threshold_that_cannot_be(threshold):
    with pytest.raises(DecafError, match="presence threshold"):
        attention_points(fused(0.5), presence_threshold=threshold)


@pytest.mark.parametrize("setting", ["expression", "class name"])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_is_the_next_token_of_the_whole_prompt(family, setting, mllm_folder):
    """The same score from one pass over the whole prompt, without a shared prefix or cache; maps are those of the query asked alone."""
    mllm = load_mllm(mllm_folder(family))
    torch.manual_seed(0)
    clip = clip_from_images(torch.rand(4, 60, 80, 3))
    queries = ["the cup.", "Who comes last, the dog or the cat?"]
    found = extract_attentions(mllm, clip, queries, setting=setting, tokens_per_frame=16)
    for query, (object, background) in zip(queries, found, strict=True):
        assert background.presence is None
        assert object.presence == pytest.approx(presence_alone(mllm, clip, Templates().ask_presence(query)), abs=1e-5)
        alone = extract_attention(mllm, clip, query, setting=setting, tokens_per_frame=16)
        for one, other in zip((object, background), alone, strict=True):
            torch.testing.assert_close(one.video, other.video, rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(one.frame, other.frame, rtol=1e-4, atol=1e-9)
            assert one.answers == other.answers and one.question == other.question


@torch.inference_mode()
def presence_alone(mllm, clip, question):
    frames = [clip[index] for index in range(len(clip))]
    layout = mllm.family.video_layout(mllm.vision, clip.frame_size, [index / 24 for index in range(len(clip))], 16)
    ids, mask, positions = whole_prompt(mllm, layout, question)
    embeds, deepstack = embedded(mllm, layout, frames, ids, mask)
    out = forward(mllm, embeds, positions, mask, deepstack)
    return presence_score(mllm.model.get_output_embeddings()(out.last_hidden_state[0, -1]), *yes_and_no(mllm))


def test_without_a_token_for_yes_nothing_is_asked(mllm_folder, monkeypatch):
    mllm = load_mllm(mllm_folder("qwen2_vl"))
    monkeypatch.setattr("decaf.attention.passes.yes_and_no", lambda mllm: ([], [3]))
    object, _ = extract_attention(mllm, clip_from_images(torch.rand(2, 60, 80, 3)), "the cup", tokens_per_frame=16)
    assert object.presence is None
