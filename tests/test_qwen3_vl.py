"""Qwen3-VL: times in words, positions slot by slot and deepstack, held against the whole model's own forward pass."""

import inspect
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers
from dense_rollout import dense_row, relative
from plain_passes import in_float64, whole_prompt
from random_clips import clip_of
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES
from transformers import AutoProcessor

from decaf.attention.extract import extract_attentions
from decaf.errors import DecafError
from decaf.mllm import load_mllm
from decaf.mllm.base import Encoded

QUERIES = ["the dog that gets the ball first", "Who is it, the one at <0.2 seconds>?"]


@pytest.fixture(params=[name for name in FAMILIES if name.startswith("qwen3_vl")])
def mllm(request, mllm_folder):
    return load_mllm(mllm_folder(request.param))


def layouts(mllm, size, frames, most=20):
    video = mllm.family.video_layout(mllm.vision, size, [index / 24 for index in range(frames)], most)
    return {"video": video, "image": mllm.family.image_layout(mllm.vision, size, frames, most)}


def model_inputs(model, layout, ids, mask, pixels):
    """Arguments of the model's forward, as its processor gives them."""
    inputs = {"input_ids": ids.repeat(layout.batch, 1), "attention_mask": torch.ones(layout.batch, len(ids), dtype=torch.long), **pixels}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # since transformers 5
        inputs["mm_token_type_ids"] = (mask.long() * {"image": 1, "video": 2}[layout.kind]).repeat(layout.batch, 1)
    return inputs


@contextmanager
def attention_maps(mllm):
    """Softmax attention (B, H, L, L) of every decoder layer that runs, in a list."""
    maps = []
    hooks = [layer.self_attn.register_forward_hook(lambda *args: maps.append(args[2][1])) for layer in mllm.engine.text_tower.layers]
    yield maps
    for hook in hooks:
        hook.remove()


def own_map(mllm, layout, frames, question):
    """The model is given ids and pixels alone: its positions, its places of visual tokens and its deepstack."""
    ids, mask, _ = whole_prompt(mllm, layout, question)
    pixels = {name: one.double() if one.is_floating_point() else one for name, one in mllm.family.pixels(mllm, layout, frames).items()}
    with attention_maps(mllm) as maps:
        mllm.model.model(**model_inputs(mllm.model.model, layout, ids, mask, pixels))
    assert len(maps) == mllm.layers
    return layout.to_grid(dense_row(maps, mask, mllm.layers // 2)[:, mask])


@pytest.mark.parametrize("frames, height, width", [(1, 60, 90), (4, 90, 60), (5, 60, 200), (3, 64, 64)])
@torch.inference_mode()
def test_maps_are_those_of_the_models_own_forward(mllm, frames, height, width):
    """Several queries in one packed pass, against a whole prompt of its own for each. Portrait and landscape, even and odd numbers of frames."""
    clip = clip_of(frames, height, width)
    found = extract_attentions(mllm, clip, QUERIES, tokens_per_frame=20)
    in_float64(mllm)
    shown = [clip[index] for index in range(frames)]
    both = layouts(mllm, (height, width), frames)
    assert both["video"].grid[0] == -(-frames // 2) and both["image"].grid[1:] == tuple(2 * side for side in both["video"].grid[1:])
    assert (both["video"].grid[1] < both["video"].grid[2]) == (height < width)
    for pair in found:
        for attention in pair:
            assert relative(attention.video, own_map(mllm, both["video"], shown, attention.question)[0]) < 1e-4
            assert relative(attention.frame, own_map(mllm, both["image"], shown, attention.question)[:, 0]) < 1e-4


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("frames, size", [(1, (60, 90)), (2, (200, 50)), (3, (90, 60)), (9, (60, 90))])
def test_positions_are_the_models_own(mllm, kind, frames, size):
    layout = layouts(mllm, size, frames)[kind]
    ids, mask, positions = whole_prompt(mllm, layout, "What is it?")
    pixels = mllm.family.pixels(mllm, layout, [torch.zeros(*size, 3, dtype=torch.uint8)] * frames)
    inputs = model_inputs(mllm.model.model, layout, ids, mask, pixels)
    inputs = {name: one for name, one in inputs.items() if not name.startswith("pixel_values")}
    expected, _ = mllm.model.model.get_rope_index(**inputs)
    assert torch.equal(positions[:, None].expand(-1, layout.batch, -1), expected)
    assert positions.shape == (3, len(ids)) and int(mask.sum()) == layout.tokens


def test_positions_without_pictures(mllm):
    _, _, positions = whole_prompt(mllm, None, "What is it?")
    assert torch.equal(positions, torch.arange(positions.shape[1]).expand(3, -1))


@pytest.mark.parametrize("seconds", [[0.0], [0.0, 0.4], [0, 1.26, 2.5, 61.3, 1999.96], [index * 37 / 25 for index in range(16)]])
def test_the_times_are_the_processors(mllm, mllm_folder, seconds):
    processor = AutoProcessor.from_pretrained(mllm_folder("qwen3_vl"), local_files_only=True, trust_remote_code=False)
    expected = [f"<{time:.1f} seconds>" for time in processor._calculate_timestamps(np.array(seconds), 1.0)]
    layout = mllm.family.video_layout(mllm.vision, (60, 90), seconds, 20)
    ids, mask = mllm.picture_ids(layout)
    text = mllm.tokenizer.decode(ids[~mask])
    assert text == "<|im_start|>user\n" + "".join(f"{time}<|vision_start|><|vision_end|>" for time in expected)


def test_colours_are_normalised_as_by_the_processor_of_its_own(mllm):
    """Where the model's folder does not say how."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor as Processor

    assert (list(mllm.family.mean), list(mllm.family.std)) == (list(Processor.image_mean), list(Processor.image_std))


def test_the_times_are_those_of_the_key_frames(mllm, monkeypatch):
    """As they are spread over the clip, at the clip's own rate."""
    given, made = [], mllm.family.video_layout
    monkeypatch.setattr(mllm.family, "video_layout", lambda shape, size, seconds, most: given.append(seconds) or made(shape, size, seconds, most))
    clip = clip_of(30)
    clip.fps = Fraction(10)
    extract_attentions(mllm, clip, ["it"], max_key_frames=3, tokens_per_frame=20)
    assert given[-1] == [0.0, 1.4, 2.9]  # the estimate of memory asks before, without times


@torch.inference_mode()
def test_every_deepstack_level_matters(mllm, monkeypatch):
    """Maps without one level, or with two changed about, are others: none of them could be lost on the way without a test that fails."""
    encode = mllm.family.encode

    def maps(change):
        def changed(*args):
            encoded = encode(*args)
            assert len(encoded.deepstack) == 2 and all(level.shape == encoded.tokens.shape for level in encoded.deepstack)
            return replace(encoded, deepstack=change(*encoded.deepstack))

        monkeypatch.setattr(mllm.family, "encode", changed)
        ((found, _),) = extract_attentions(mllm, clip_of(4), ["it"], start_layer=0, tokens_per_frame=20)
        return found

    whole = maps(lambda first, second: (first, second))
    for change in (
        lambda first, second: (first, torch.zeros_like(second)),
        lambda first, second: (torch.zeros_like(first), second),
        lambda first, second: (second, first),
        lambda first, second: (),
    ):
        other = maps(change)
        assert relative(other.video, whole.video) > 0.02 and relative(other.frame, whole.frame) > 0.02


@torch.inference_mode()
def test_deepstack_of_a_batch_goes_to_its_own_prompt(mllm):
    """Images that are run together give what each gives alone."""
    frames = list(clip_of(3))
    layout = mllm.family.image_layout(mllm.vision, (60, 90), 3, 20)
    together = mllm.family.encode(mllm, layout, mllm.family.pixels(mllm, layout, frames))
    for index, frame in enumerate(frames):
        one = replace(layout, batch=1, frames=1)
        alone = mllm.family.encode(mllm, one, mllm.family.pixels(mllm, one, [frame]))
        assert isinstance(alone, Encoded)
        for whole, part in zip((together.tokens, *together.deepstack), (alone.tokens, *alone.deepstack), strict=True):
            torch.testing.assert_close(whole[index], part[0], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 loads experts as they are published alone")
@torch.inference_mode()
def test_experts_load_in_either_order_of_their_axes(mllm_folder, tmp_path):
    """As published, and as models that were saved without the library's own way back."""
    shutil.copytree(mllm_folder("qwen3_vl_moe"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    exchanged = {name: one.transpose(1, 2).contiguous() if ".experts." in name else one for name, one in weights.items()}
    assert any(one.shape != weights[name].shape for name, one in exchanged.items())
    save_file(exchanged, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    published, other = (load_mllm(folder).model.state_dict() for folder in (mllm_folder("qwen3_vl_moe"), tmp_path / "model"))
    assert all(torch.equal(one, other[name]) for name, one in published.items())


@torch.inference_mode()
def test_the_layers_of_experts_are_what_the_published_weights_say(mllm_folder):
    """One layer in float64 from the file: softmax over experts, the best two, their weights scaled to one."""
    mllm = load_mllm(mllm_folder("qwen3_vl_moe"))
    weights = load_file(mllm_folder("qwen3_vl_moe") / "model.safetensors")
    gate, gate_up, down = (
        weights[f"model.language_model.layers.1.mlp.{name}"].double() for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    )
    hidden = torch.randn(1, 9, 64)
    shares, chosen = (hidden[0].double() @ gate.T).softmax(-1).topk(2)
    expected = torch.zeros(9, 64, dtype=torch.float64)
    for token in range(9):
        for share, expert in zip(shares[token] / shares[token].sum(), chosen[token], strict=True):
            inner, up = (hidden[0, token].double() @ gate_up[expert]).chunk(2)
            expected[token] += share * ((torch.nn.functional.silu(inner) * up) @ down[expert])
    found = mllm.engine.text_tower.layers[1].mlp(hidden)
    found = found[0] if isinstance(found, tuple) else found  # transformers 4 gives the router's logits too
    assert relative(found[0].double(), expected) < 1e-5


@pytest.mark.parametrize("levels", [[0, 3], [-1], [0, 0], 5, None, ["0"], [0.5], [0, 1, 2]])
def test_levels_that_the_model_would_leave_out_are_refused(mllm_folder, tmp_path, levels):
    shutil.copytree(mllm_folder("qwen3_vl"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["deepstack_visual_indexes"] = levels
    config["text_config"]["num_hidden_layers"] = 2  # too few for three levels
    path.write_text(json.dumps(config))
    with pytest.raises(DecafError, match="deepstack_visual_indexes.*ownload"):
        load_mllm(tmp_path / "model")
