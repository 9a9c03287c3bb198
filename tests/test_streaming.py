"""Weights that come to the device layer by layer. The device is a CPU here, which stands in for one with memory of its own: copies are made and
dropped as on a GPU, only the second stream is missing."""

import pytest
import tiny_models
import torch
from dense_rollout import relative
from random_clips import clip_of
from safetensors.torch import load_file, save_file
from slow import EACH_FAMILY

import decaf
from decaf.attention.batches import Batches, memory_needed
from decaf.attention.extract import extract_attentions
from decaf.attention.questions import clean_query
from decaf.attention.rollout import BLOCK_BYTES
from decaf.errors import DecafError
from decaf.mllm import load_mllm, streaming
from decaf.report import Report
from decaf.settings import AttentionSettings

QUERIES = ["the dog that gets the ball first", "the cup"]
SETTINGS = AttentionSettings(tokens_per_frame=40)


@pytest.fixture(autouse=True)
def a_cpu_with_memory_of_its_own(monkeypatch):
    monkeypatch.setattr(streaming, "HOST_MEMORY", ())
    # Blocks of attention rows are as small as the models here, or they would be all that counts.
    monkeypatch.setitem(BLOCK_BYTES, "cuda", 1 << 16)


def least_budget(mllm, clip, settings=SETTINGS) -> int:
    """With which nothing stays on the device but what must."""
    return mllm.streaming.least_bytes + memory_needed(mllm, len(clip), clip.frame_size, settings, queries=[*map(clean_query, QUERIES)])


def streamed(folder, clip, settings=SETTINGS, *, more: int = 0):
    mllm = load_mllm(folder, memory_budget=1 << 40)
    mllm.memory_budget = least_budget(mllm, clip, settings) + more
    return mllm


def same(found, expected) -> None:
    """Presence to the rounding of float32: with some processors' arithmetic, how a single row times the head's matrix rounds depends on where in
    memory the matrix lies, and a file that is read in place lies anywhere."""
    for pair, other in zip(found, expected, strict=True):
        for one, two in zip(pair, other, strict=True):
            assert torch.equal(one.video, two.video) and torch.equal(one.frame, two.frame)
            assert one.answers == two.answers and one.presence == pytest.approx(two.presence, abs=1e-6)


@pytest.mark.parametrize("setting", ["expression", "class name"])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_maps_and_answers_are_equal_to_the_bit(mllm_folder, family, setting):
    clip, settings = clip_of(5), AttentionSettings(setting, tokens_per_frame=40)
    expected = extract_attentions(load_mllm(mllm_folder(family)), clip, QUERIES, settings)
    mllm = streamed(mllm_folder(family), clip, settings)
    same(extract_attentions(mllm, clip, QUERIES, settings), expected)
    same(extract_attentions(mllm, clip, QUERIES, settings), expected)
    kept = [layer.name for layer in mllm.streaming.layers if layer.resident is not None]
    assert not kept, "with the least budget no layer stays"


def test_tied_embeddings_are_looked_up_in_host_memory(tmp_path):
    folder = tiny_models.make_mllm(tmp_path / "tied", "qwen2_5_vl", text={"tie_word_embeddings": True})
    weights = load_file(folder / "model.safetensors")
    save_file({name: one for name, one in weights.items() if name != "lm_head.weight"}, folder / "model.safetensors", {"format": "pt"})
    clip, settings = clip_of(3), AttentionSettings("class name", tokens_per_frame=40)
    expected = extract_attentions(load_mllm(folder), clip, QUERIES, settings)
    mllm = streamed(folder, clip, settings)
    head = next(layer for layer in mllm.streaming.layers if layer.name == "head")
    places = []
    mllm.model.get_input_embeddings().register_forward_hook(
        lambda module, *_: places.append(module.weight.untyped_storage().data_ptr() == head.packed.untyped_storage().data_ptr())
    )
    same(extract_attentions(mllm, clip, QUERIES, settings), expected)
    assert len(places) > 20 and all(places), "also while the head is on the device"


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_no_more_layers_are_on_the_device_than_the_budget_holds(mllm_folder, share):
    """At every layer that computes: its weights and those of at most one other that does not stay are there, within the budget."""
    clip = clip_of(4)
    mllm = streamed(mllm_folder("qwen2_5_vl"), clip)
    streams = mllm.streaming
    needed = mllm.memory_budget - streams.least_bytes
    room = streams.least_bytes + int(share * (streams.most_bytes - streams.least_bytes))
    mllm.memory_budget = needed + room
    seen = []

    def check(layer):
        where = {tensor.untyped_storage().data_ptr() for tensor, _ in layer.tensors}
        assert layer.packed.untyped_storage().data_ptr() not in where, f"{layer.name} computes from host memory"
        passing = [one for one in streams.layers if one.name in streams.on_device and one.resident is None]
        assert len(passing) <= 2
        elsewhere = [one for one in streams.layers if one.name not in streams.on_device]
        for one in elsewhere:
            assert {tensor.untyped_storage().data_ptr() for tensor, _ in one.tensors} == {one.packed.untyped_storage().data_ptr()}
        assert streams.device_bytes <= room
        seen.append(layer.name)

    for layer in streams.layers:
        layer.module.register_forward_pre_hook(lambda *_, layer=layer: check(layer))
    extract_attentions(mllm, clip, QUERIES, SETTINGS)
    assert set(seen) == {layer.name for layer in streams.layers}
    staying = [layer for layer in streams.layers if layer.resident is not None]
    assert bool(staying) == (share > 0) and (len(staying) == len(streams.layers)) == (share == 1)


def test_each_pass_reads_each_layer_once(mllm_folder, monkeypatch):
    clip = clip_of(4)
    mllm = streamed(mllm_folder("qwen2_5_vl"), clip)
    copied, copy = [], streaming.Streaming._copy
    monkeypatch.setattr(streaming.Streaming, "_copy", lambda self, layer, beside: copied.append(layer.name) or copy(self, layer, beside))
    monkeypatch.setattr(Batches, "of", lambda self, frames, *_: iter([slice(0, frames)]))
    extract_attentions(mllm, clip, QUERIES, SETTINGS)
    copied.clear()
    report = Report()
    extract_attentions(mllm, clip, QUERIES, SETTINGS, progress=report)
    passes = report.counts["forward_passes"]
    assert passes == 2
    text = [name for name in copied if "language" in name]
    # One may be sent for that does not come: whether the head follows the last layer is not known.
    assert len(set(text)) == mllm.layers and passes * mllm.layers <= len(text) <= passes * mllm.layers + 2


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["cancel", "out of memory"])
def test_a_broken_pass_leaves_the_model_usable(mllm_folder, kind):
    clip = clip_of(4)
    folder = mllm_folder("qwen2_5_vl")
    expected = extract_attentions(load_mllm(folder), clip, QUERIES, SETTINGS)
    mllm = streamed(folder, clip)
    layers = [layer.module for layer in mllm.streaming.layers if layer.name != "head"]
    for number in range(0, len(layers), 2):
        armed = [True]

        def fail(*_, armed=armed):
            if armed:
                armed.clear()
                if kind == "out of memory":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

        handle = layers[number].register_forward_hook(fail)
        if kind == "cancel":

            def progress(*_, armed=armed):
                if not armed:
                    raise Stop

            with pytest.raises(Stop):
                extract_attentions(mllm, clip, QUERIES, SETTINGS, progress=progress)
        else:  # tried again by itself, in smaller blocks of rows
            for pair, other in zip(extract_attentions(mllm, clip, QUERIES, SETTINGS), expected, strict=True):
                assert all(relative(one.video, two.video) < 1e-5 for one, two in zip(pair, other, strict=True))
        assert not armed
        handle.remove()
        same(extract_attentions(mllm, clip, QUERIES, SETTINGS), expected)


def test_no_room_for_what_would_stay(mllm_folder, monkeypatch):
    """Other programs may hold what the budget allows: then less stays, and it goes on."""
    clip = clip_of(3)
    folder = mllm_folder("qwen2_5_vl")
    expected = extract_attentions(load_mllm(folder), clip, QUERIES, SETTINGS)
    mllm = streamed(folder, clip, more=1 << 30)
    made, empty_like = [], torch.empty_like

    def limited(*args, **kwargs):
        if kwargs.get("dtype") is None and args[0].dtype == torch.uint8 and args[0].ndim == 1 and "device" in kwargs:
            made.append(1)
            if len(made) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return empty_like(*args, **kwargs)

    monkeypatch.setattr(torch, "empty_like", limited)
    same(extract_attentions(mllm, clip, QUERIES, SETTINGS), expected)
    assert len(made) > 2
    assert 0 < sum(layer.resident is not None for layer in mllm.streaming.layers) <= 2


def test_one_clip_after_the_other(mllm_folder):
    """What stays is decided anew: a clip of many tokens takes room that weights had."""
    folder = mllm_folder("qwen2_5_vl")
    small, large = clip_of(2), clip_of(16)
    mllm = streamed(folder, large, more=40_000)
    kept = []
    plain = load_mllm(folder)
    for clip in (small, large, small):
        same(extract_attentions(mllm, clip, QUERIES, SETTINGS), extract_attentions(plain, clip, QUERIES, SETTINGS))
        kept.append([layer.name for layer in mllm.streaming.layers if layer.resident is not None])
    assert len(kept[0]) > len(kept[1]) and kept[0] == kept[2]
    mllm.streaming.release()
    assert not mllm.streaming.on_device


def test_batches_respect_the_budget(mllm_folder, monkeypatch):
    clip = clip_of(6)
    mllm = streamed(mllm_folder("qwen2_5_vl"), clip)
    batches, encode = [], mllm.family.encode
    monkeypatch.setattr(mllm.family, "encode", lambda mllm, layout, pixels: batches.append(layout.batch) or encode(mllm, layout, pixels))
    monkeypatch.setattr("decaf.mllm.engine.free_memory", lambda device: 1 << 40)
    extract_attentions(mllm, clip, QUERIES, SETTINGS)
    few = max(batches)
    batches.clear()
    mllm.memory_budget = 1 << 40
    extract_attentions(mllm, clip, QUERIES, SETTINGS)
    assert few < max(batches) == 6


def test_a_budget_that_is_too_small_says_what_is_needed(mllm_folder):
    clip = clip_of(3)
    mllm = streamed(mllm_folder("qwen2_5_vl"), clip)
    mllm.memory_budget = mllm.streaming.least_bytes + 1000
    with pytest.raises(DecafError, match=r"memory budget of \d.*needed.*Raise the budget"):
        decaf.extract_attention(mllm, clip, "the cup", SETTINGS)


def test_budgets_that_cannot_be(mllm_folder, monkeypatch):
    with pytest.raises(DecafError, match="above 0"):
        load_mllm(mllm_folder("qwen2_5_vl"), memory_budget=0)
    monkeypatch.undo()
    with pytest.raises(DecafError, match="for a GPU with memory of its own"):
        load_mllm(mllm_folder("qwen2_5_vl"), memory_budget=1 << 30)
