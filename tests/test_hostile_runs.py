"""One model asked in odd ways: by several threads, about clips with damaged rates, with a damaged head, within budgets that are none."""

import threading
from fractions import Fraction

import pytest
import torch
from random_clips import clip_of
from slow import EACH_FAMILY

from decaf.attention.extract import extract_attention
from decaf.attention.presence import yes_and_no
from decaf.errors import DecafError
from decaf.mllm import load_mllm, streaming

EXTRACTS = {"query": "the cup", "tokens_per_frame": 16}


@pytest.mark.parametrize("streamed", [False, True])
def test_threads_share_a_model(mllm_folder, monkeypatch, streamed):
    """Their maps are those of one after the other, also where layers come and go."""
    folder = mllm_folder("qwen2_5_vl")
    expected = [extract_attention(load_mllm(folder), clip_of(3, seed=number), **EXTRACTS)[0] for number in range(3)]
    monkeypatch.setattr(streaming, "HOST_MEMORY", ())
    mllm = load_mllm(folder, memory_budget=1 << 40 if streamed else None)
    if streamed:
        monkeypatch.setattr(streaming.Streaming, "keep", torch.inference_mode(False)(lambda self, room: self._make_area()))
    wrong = []

    def work(number):
        try:
            for _ in range(4):
                found = extract_attention(mllm, clip_of(3, seed=number), **EXTRACTS)[0]
                if not torch.equal(found.video, expected[number].video) or not torch.equal(found.frame, expected[number].frame):
                    wrong.append("other maps")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_that_waits_for_the_model_can_be_cancelled(mllm_folder):
    mllm = load_mllm(mllm_folder("qwen2_5_vl"))
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with mllm.alone(lambda: None):
            entered.set()
            leave.wait(30)

    def cancel():
        raise KeyError("cancelled")

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert entered.wait(5)
        with pytest.raises(KeyError), mllm.alone(cancel):
            raise AssertionError("two threads have it")
    finally:
        leave.set()
        holder.join()


@pytest.mark.parametrize("family", EACH_FAMILY)
@pytest.mark.parametrize("fps", [Fraction(1, 10**400), Fraction(1, 10**30), Fraction(10**400)])
def test_a_damaged_rate_of_frames(mllm_folder, family, fps):
    clip = clip_of(3)
    clip.fps = fps
    assert extract_attention(load_mllm(mllm_folder(family)), clip, **EXTRACTS)[0].video.isfinite().all()


@pytest.mark.parametrize("setting", ["expression", "class name"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_damaged_head_gives_no_answer(mllm_folder, setting, number):
    """A few bad rows are not seen when the model is loaded, and some token is the most likely one all the same."""
    mllm = load_mllm(mllm_folder("qwen2_5_vl"))
    head = mllm.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    yes, no = yes_and_no(mllm)
    head.weight[[*yes, *no]] = number
    with pytest.raises(DecafError, match="head .* is damaged. Download the model again"):
        extract_attention(mllm, clip_of(2), setting=setting, **EXTRACTS)


@pytest.mark.parametrize("budget", [float("nan"), "10GB", -1.5, [5]])
def test_budgets_that_are_no_numbers(mllm_folder, monkeypatch, budget):
    monkeypatch.setattr(streaming, "HOST_MEMORY", ())
    with pytest.raises(DecafError, match="give a number above 0"):
        load_mllm(mllm_folder("qwen2_5_vl"), memory_budget=budget)
