"""Families, prompts and passes with tiny random models in the hub's format, held against plain forward passes of the whole model."""

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from dense_rollout import dense_row, relative
from random_clips import clip_of
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES

from decaf.attention import extract_attention, key_frames
from decaf.errors import DecafError
from decaf.mllm import load_mllm
from decaf.mllm.base import fit_grid
from decaf.mllm.families.internvl import choose_tiles
from decaf.mllm.prefill import lay_out
from decaf.questions import Templates, clean_query

QUERY = "the dog that gets the ball first"


@pytest.fixture(params=FAMILIES)
def mllm(request, mllm_folder):
    return load_mllm(mllm_folder(request.param))


# -- key frames, queries, questions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32, 100, 289, 3000])
def test_key_frames(length):
    keys = key_frames(length)
    assert list(keys) == np.linspace(0, length - 1, min(length, 16)).astype(int).tolist()
    assert keys[0] == 0 and len(set(keys)) == len(keys) and (length == 1 or keys[-1] == length - 1)


def test_key_frames_of_nothing():
    with pytest.raises(DecafError, match="no frames"):
        key_frames(0)
    with pytest.raises(DecafError, match="at least one"):
        key_frames(5, 0)


def test_query_is_cleaned():
    assert clean_query("  the Red\n one ") == "the Red one."
    assert clean_query("which one wins?") == "which one wins?"
    assert clean_query("左から二番目の犬") == "左から二番目の犬."
    with pytest.raises(DecafError, match="empty"):
        clean_query(" \n ")
    with pytest.raises(DecafError, match="10,000"):
        clean_query("x" * 10_000)


def test_object_question_is_lower_case():
    assert Templates().ask_object("The Red One.").startswith("the red one.")
    assert "The Red One." in Templates().ask_background("The Red One.")


def test_templates_must_hold_their_fields():
    assert Templates(object="{query} {}?").ask_object("It.") == "it. {}?"
    with pytest.raises(DecafError, match="{query}"):
        Templates(object="what is it?")
    with pytest.raises(DecafError, match="{object}"):
        Templates(class_background="no {query}")


# -- grids ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, expected", [((720, 1280), (14, 26)), ((280, 280), (12, 12)), ((448, 448), (16, 16)), ((1, 1), (12, 12)), ((16, 4000), (1, 143))]
)
def test_grid(size, expected):
    assert fit_grid(*size, 28, 128, 400) == expected


@pytest.mark.parametrize("seed", range(40))
def test_grid_keeps_within_limits(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(2 ** rng.uniform(0, 13)) for _ in "hw")
    most = int(rng.integers(1, 900))
    rows, cols = fit_grid(height, width, 28, min(128, most), most)
    assert rows >= 1 and cols >= 1 and rows * cols <= most
    if most >= 64 and 0.25 < height / width < 4:
        assert 0.5 < (rows / cols) / (height / width) < 2


def test_tiles():
    assert choose_tiles(448, 448, 448) == (1, 1)
    assert choose_tiles(1344, 896, 448) == (3, 2)
    assert choose_tiles(720, 1280, 448) == (2, 4)  # as near to its shape as (1, 2), and filled more than half
    assert choose_tiles(360, 640, 448) == (1, 2)
    assert choose_tiles(2000, 2000, 448) == (3, 3)
    assert choose_tiles(16, 4000, 448) == (1, 12)


@pytest.mark.parametrize("kind", ["video", "images"])
def test_tokens_lie_where_the_picture_is(mllm, kind):
    """A light spot moves the visual token of its own place most: grid, order of tiles and order of tokens are right."""
    dark = torch.full((112 * 2, 112 * 3, 3), 90, dtype=torch.uint8)
    visual = getattr(mllm.family, kind)(mllm, [dark], 150)
    _, rows, cols = visual.grid
    assert rows > 1 and cols > 1
    # One layer deep: random deeper layers would mix all places, which says nothing about the order.
    tower = mllm.model.model.visual if hasattr(mllm.model.model, "visual") else mllm.model.model.vision_tower
    for block in [one for group in tower.modules() if isinstance(group, torch.nn.ModuleList) for one in group]:
        for weights in block.parameters():
            weights.data.zero_()
    with torch.inference_mode():
        plain = mllm.family.encode(mllm, visual)
        assert plain.shape[:2] == (visual.prompts, visual.tokens)
        assert visual.order is None or sorted(visual.order.tolist()) == list(range(visual.tokens)), "every token once"
        corners = {(0, 0), (0, cols - 1), (rows - 1, 0), (rows // 2, cols // 2), (rows - 1, cols - 2)}
        others = random.Random(0).sample([(row, col) for row in range(rows) for col in range(cols)], 6)
        for row, col in sorted(corners | {*others}):
            lit = dark.clone()
            top, left = (int((place + 0.5) * size / count) for place, size, count in ((row, 224, rows), (col, 336, cols)))
            reach = max(2, 224 // rows // 4)
            lit[max(0, top - reach) : top + reach, max(0, left - reach) : left + reach] = 255
            moved = (mllm.family.encode(mllm, getattr(mllm.family, kind)(mllm, [lit], 150)) - plain).norm(dim=-1)
            place = visual.to_grid(moved)[0, 0].flatten().argmax()
            assert divmod(int(place), cols) == (row, col)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_pictures_are_encoded_as_by_the_untouched_model(mllm_folder, family):
    """Loading puts a product in the place of the first convolution."""
    from transformers import AutoModelForImageTextToText

    mllm = load_mllm(mllm_folder(family))
    plain = AutoModelForImageTextToText.from_pretrained(mllm_folder(family), dtype=torch.float32).eval()
    kinds = [sum(isinstance(module, torch.nn.Conv3d) for module in model.modules()) for model in (mllm.model, plain)]
    assert kinds == [0, 1] and mllm.model.state_dict().keys() == plain.state_dict().keys()
    with torch.inference_mode():
        for visual in (mllm.family.video(mllm, list(clip_of(4)), 40), mllm.family.images(mllm, list(clip_of(2)), 40)):
            found = mllm.family.encode(mllm, visual)
            expected = mllm.family.encode(replace(mllm, model=plain), visual)
            assert relative(found, expected) < 1e-5


# -- the whole stage against plain passes ------------------------------------------------------------------------------------------------------


def plain_map(mllm, visual, question, start):
    """One whole prompt through the model's own forward with eager attention in float64, then the dense formula."""
    (ids,), mask, shared = lay_out(mllm, visual, [question])
    model = mllm.model
    whole = torch.cat([mask, torch.zeros(len(ids) - len(mask), dtype=torch.bool)])
    places = mllm.family.positions(mllm, whole, visual)
    pixels = {k: v.double() if v.is_floating_point() else v for k, v in visual.pixels.items()}
    batch = visual.prompts
    features = mllm.family.encode(mllm, type(visual)(visual.kind, pixels, *list(vars(visual).values())[2:]))
    embeds = model.get_input_embeddings()(ids.expand(batch, -1))
    embeds[whole.expand(batch, -1)] = features.flatten(0, 1)
    out = mllm.text_tower(
        inputs_embeds=embeds, position_ids=places.expand(*places.shape[:-2], batch, -1), output_attentions=True, use_cache=False
    )
    row = dense_row(out.attentions, whole, start)
    return visual.to_grid(row[:, whole])


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_maps_equal_plain_passes(mllm, mllm_folder, frames):
    clip = clip_of(frames)
    found = extract_attention(mllm, clip, QUERY, tokens_per_frame=40)
    start = mllm.layers // 2
    mllm.model.double()
    mllm.text_tower.set_attn_implementation("eager")
    with torch.inference_mode():
        shown = [clip[i] for i in range(frames)]
        video, images = mllm.family.video(mllm, shown, 40), mllm.family.images(mllm, shown, 40)
        for attention in found:
            assert relative(attention.video, plain_map(mllm, video, attention.question, start)[0]) < 1e-4
            assert relative(attention.frame, plain_map(mllm, images, attention.question, start)[:, 0]) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_output_weights_that_are_those_of_the_input(tmp_path, mllm_folder, family):
    """The smaller models of each family have no output weights in their files: that is no damage."""
    for file in mllm_folder(family).iterdir():
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "lm_head" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_mllm(tmp_path).model
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.25), (torch.float16, 0.03)])  # 8 and 11 bits
def test_low_precision_models(mllm_folder, dtype, tolerance):
    for family in FAMILIES:
        folder = mllm_folder(family)
        exact, _ = extract_attention(load_mllm(folder), clip_of(3), QUERY, tokens_per_frame=40)
        rough, _ = extract_attention(load_mllm(folder, dtype=dtype), clip_of(3), QUERY, tokens_per_frame=40)
        assert rough.video.dtype == rough.frame.dtype == torch.float32
        assert relative(rough.video, exact.video) < tolerance and relative(rough.frame, exact.frame) < tolerance


def test_counts_of_the_expression_setting(mllm):
    counts = {}
    first, second = extract_attention(mllm, clip_of(9), QUERY, max_key_frames=6, tokens_per_frame=40, counts=counts)
    assert first.kind == "object" and second.kind == "background" and first.answers == ()
    assert counts["key_frames"] == counts["frames_encoded_video"] == counts["frames_encoded_image"] == 6
    assert counts["tokens_generated"] == 0
    tokens = first.video.numel() + first.frame.numel()
    assert counts["visual_tokens_encoded"] == counts["visual_tokens_prefilled"] == tokens
    assert first.clip.key_frames == key_frames(9, 6) and first.clip.length == 9


def test_class_name_setting(mllm):
    counts = {}
    obj, back = extract_attention(mllm, clip_of(4), QUERY, setting="class name", tokens_per_frame=40, counts=counts)
    assert len(obj.answers) == 5 and counts["tokens_generated"] > 0
    assert counts["visual_tokens_encoded"] == counts["visual_tokens_prefilled"] == obj.video.numel() + obj.frame.numel()
    assert "leaving out any" in back.question
    plain, _ = extract_attention(mllm, clip_of(4), QUERY, tokens_per_frame=40)
    assert relative(obj.video, plain.video) < 1e-5 and relative(obj.frame, plain.frame) < 1e-5
    assert back.video.shape == obj.video.shape and relative(back.video, obj.video) > 1e-4


@pytest.mark.parametrize(
    "setting, short",
    [
        ("expression", 2 + 2 * 2),  # the pictures as a video and as images; two questions of each
        ("class name", 2 + 2 + 1),  # the same, but object questions are answered; all but the last token of the choice of a name
    ],
)
def test_the_last_block_is_for_the_next_token_alone(mllm, setting, short):
    """The rollout wants its queries and keys; what it makes of them only answers and the question of presence do."""
    first, last = [], []
    for layer, passes in ((0, first), (-1, last)):
        mllm.text_tower.layers[layer].mlp.register_forward_pre_hook(lambda module, args, passes=passes: passes.append(args[0].shape[1]))
    extract_attention(mllm, clip_of(2), QUERY, tokens_per_frame=40, setting=setting)
    assert len(last) >= 1 and len(first) == len(last) + short


def test_another_query_gives_other_maps(mllm):
    one, _ = extract_attention(mllm, clip_of(3), "the red one", tokens_per_frame=40)
    two, _ = extract_attention(mllm, clip_of(3), "a very small kettle behind the house", tokens_per_frame=40)
    assert relative(one.frame, two.frame) > 1e-4


def test_cancel(mllm):
    class Stop(BaseException):
        pass

    calls = 0

    def progress(done, total, what):
        nonlocal calls
        calls += 1
        if calls == 12:
            raise Stop

    with pytest.raises(Stop):
        extract_attention(mllm, clip_of(4), QUERY, tokens_per_frame=40, progress=progress)
    extract_attention(mllm, clip_of(1), QUERY, tokens_per_frame=40)  # the model is fit for use


def test_control_tokens_in_the_query(mllm):
    token = mllm.family.placeholder(mllm, "video")
    with pytest.raises(DecafError, match="control token"):
        extract_attention(mllm, clip_of(1), f"the {token} one")


def test_layers_and_settings_are_checked(mllm):
    with pytest.raises(DecafError, match="layers 0 to"):
        extract_attention(mllm, clip_of(1), QUERY, start_layer=mllm.layers)
    with pytest.raises(DecafError, match="no setting"):
        extract_attention(mllm, clip_of(1), QUERY, setting="both")
