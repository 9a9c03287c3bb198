"""Families, prompts and passes with tiny random models in the hub's format, held against plain forward passes of the whole model."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from dense_rollout import dense_row, relative
from plain_passes import embedded, forward, in_float64, whole_prompt
from random_clips import clip_of
from safetensors.torch import load_file, save_file
from slow import EACH_FAMILY
from tiny_models import FAMILIES

from decaf.attention.extract import extract_attention, extract_attentions
from decaf.attention.frames import key_frames
from decaf.attention.questions import Templates, clean_query, split_queries
from decaf.errors import DecafError
from decaf.mllm import load_mllm
from decaf.mllm.engine import TransformersEngine
from decaf.mllm.families.internvl import choose_tiles
from decaf.mllm.pictures import fit_grid
from decaf.report import Report

QUERY = "the dog that gets the ball first"


@pytest.fixture(params=EACH_FAMILY)
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


def test_the_class_name_is_read_back_from_its_question():
    for templates in (Templates(), Templates(class_background="{object}"), Templates(class_background="no {object}, none: {object}s!")):
        for name in ("dog", "no dog, none", "a {object} dog", "", "an object, in a word"):
            assert templates.class_name(templates.ask_class_background(name)) == name
        assert templates.class_name(Templates().ask_background("It.")) in ("", Templates().ask_background("It."))
    assert Templates(class_background="no {object}, none: {object}s!").class_name("no dog, none: cats!") == ""


def test_templates_are_text_of_a_bounded_length():
    with pytest.raises(DecafError, match="UTF-8"):
        Templates(object="\ud800 {query}")
    with pytest.raises(DecafError, match="21,000 characters"):
        Templates(object="{query}" * 3000)
    templates = Templates(presence="{query} " * 900)
    templates.check([clean_query("short")], "expression")
    with pytest.raises(DecafError, match='"presence" for the query "a dog that'):
        templates.check(["a cup.", "a dog that gets the ball."], "expression")
    templates = Templates(background="{query} " * 900)
    templates.check(["a dog that gets the ball."], "class name")  # where it is not asked
    with pytest.raises(DecafError, match="at most 8,000"):
        templates.check(["a dog that gets the ball."], "expression")


def test_tokens_of_a_question_are_bounded(mllm):
    """Characters that are several tokens each: only the tokenizer knows."""
    with pytest.raises(DecafError, match="at most 4,096"):
        extract_attention(mllm, clip_of(1), "🐕" * 1900, tokens_per_frame=4)
    extract_attention(mllm, clip_of(1), "🐕" * 300, tokens_per_frame=4)


def test_names_to_choose_from_are_few_and_short():
    answers = [f"name {number}" for number in range(300)] + ["cup", "cup", "x" * 500, "x" * 500, "", ""]
    question = Templates().ask_choice("it.", answers)
    assert question.count(", ") == Templates().ask_choice("it.", ["a"]).count(", ") + 31
    assert "cup, " + "x" * 80 + ", name 0" in question and "x" * 81 not in question
    assert "none" in Templates().ask_choice("it.", ["", ""])


def test_questions_are_grouped_by_their_tokens(monkeypatch):
    from decaf.attention.passes import _groups

    monkeypatch.setattr("decaf.attention.passes.QUESTION_TOKENS_PER_PASS", 10)
    for lengths, groups in (
        ([4], [(0, 1)]),
        ([4, 6], [(0, 2)]),
        ([4, 7], [(0, 1), (1, 2)]),
        ([30, 1, 9, 1, 40], [(0, 1), (1, 3), (3, 4), (4, 5)]),
    ):
        assert list(_groups(lengths)) == groups


def test_there_are_not_too_many_queries():
    assert len(split_queries(["\n".join(f"cup {number}" for number in range(256))])) == 256
    with pytest.raises(DecafError, match="more than 256"):
        split_queries(["\n".join(f"cup {number}" for number in range(300))])


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


def layouts(mllm, size, frames, most):
    """The layout of so many frames as a video, 24 a second as clips of images are taken to have, and as images."""
    video = mllm.family.video_layout(mllm.vision, size, [index / 24 for index in range(frames)], most)
    return video, mllm.family.image_layout(mllm.vision, size, frames, most)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_tokens_lie_where_the_picture_is(mllm, kind):
    """Where a picture is changed within one cell of the grid, the visual token of that cell is moved most: the cells are numbered as the tower's
    tokens are, and tiles and windows are put back in order."""
    size = (112 * 2, 112 * 3)
    layout = next(one for one in layouts(mllm, size, 1, 150) if one.kind == kind)
    _, rows, cols = layout.grid
    assert rows > 1 and cols > 1
    # Where frames are squeezed to a tile, a cell is the tile's share; a token of a video may be pooled from several of an image.
    cell = mllm.vision.tile // rows if mllm.vision.tile and kind == "video" else mllm.vision.cell
    # One layer deep: random deeper layers would mix all places, which says nothing about the order.
    tower = next(getattr(mllm.model.model, name) for name in ("visual", "vision_tower", "vision_model") if hasattr(mllm.model.model, name))
    for block in [one for group in tower.modules() if isinstance(group, torch.nn.ModuleList) for one in group]:
        for weights in block.parameters():
            weights.data.zero_()

    def tokens(picture):
        return mllm.family.encode(mllm, layout, mllm.family.pixels(mllm, layout, [picture])).tokens

    # As large as what the tower sees, so that nothing is resized and a cell is exactly one token's pixels.
    dark = torch.full((rows * cell, cols * cell, 3), 90, dtype=torch.uint8)
    with torch.inference_mode():
        plain = tokens(dark)
        for index in {0, cols - 1, rows * cols - 1, *torch.randint(rows * cols, (8,)).tolist()}:
            row, col = divmod(index, cols)
            lit = dark.clone()
            lit[row * cell : (row + 1) * cell, col * cell : (col + 1) * cell] = 255
            moved = layout.to_grid((tokens(lit) - plain).norm(dim=-1))[0, 0]
            assert int(moved.argmax()) == index
            assert (moved > moved.max() / 1000).sum() == 1, "another token sees that cell too"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith(("qwen", "glm"))])
def test_pictures_are_encoded_as_by_the_untouched_model(mllm_folder, family):
    """Loading puts a product in the place of the first convolution."""
    from transformers import AutoModelForImageTextToText

    mllm = load_mllm(mllm_folder(family))
    plain = AutoModelForImageTextToText.from_pretrained(mllm_folder(family), dtype=torch.float32, trust_remote_code=False).eval()
    kinds = [sum(isinstance(module, torch.nn.Conv3d) for module in model.modules()) for model in (mllm.model, plain)]
    assert kinds == [0, 1] and mllm.model.state_dict().keys() == plain.state_dict().keys()
    untouched = replace(mllm, engine=TransformersEngine(plain))
    with torch.inference_mode():
        for layout in layouts(mllm, (48, 64), 3, 40):
            pixels = mllm.family.pixels(mllm, layout, list(clip_of(3)))
            found, expected = (mllm.family.encode(one, layout, pixels) for one in (mllm, untouched))
            assert relative(found.tokens, expected.tokens) < 1e-5
            for one, two in zip(found.deepstack, expected.deepstack, strict=True):
                assert relative(one, two) < 1e-5


# -- the whole stage against plain passes ------------------------------------------------------------------------------------------------------


def plain_map(mllm, layout, frames, question, start):
    """One whole prompt through the model's own forward with eager attention in float64, then the dense formula."""
    ids, mask, positions = whole_prompt(mllm, layout, question)
    embeds, deepstack = embedded(mllm, layout, frames, ids, mask)
    out = forward(mllm, embeds, positions, mask, deepstack, output_attentions=True)
    row = dense_row(out.attentions, mask, start)
    return layout.to_grid(row[:, mask])


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_maps_equal_plain_passes(mllm, mllm_folder, frames):
    clip = clip_of(frames)
    found = extract_attention(mllm, clip, QUERY, tokens_per_frame=40)
    start = mllm.layers // 2
    in_float64(mllm)
    with torch.inference_mode():
        shown = [clip[i] for i in range(frames)]
        video, images = layouts(mllm, clip.frame_size, frames, 40)
        for attention in found:
            assert relative(attention.video, plain_map(mllm, video, shown, attention.question, start)[0]) < 1e-4
            assert relative(attention.frame, plain_map(mllm, images, shown, attention.question, start)[:, 0]) < 1e-4


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


@pytest.mark.slow
def test_bfloat16_models(mllm_folder):
    for family in FAMILIES:
        folder = mllm_folder(family)
        if family == "smolvlm" and transformers.__version__.startswith("4."):
            with pytest.raises(DecafError, match="cannot be computed in bfloat16: transformers 4.*Update it"):
                load_mllm(folder, dtype=torch.bfloat16)
            continue
        exact, _ = extract_attention(load_mllm(folder), clip_of(3), QUERY, tokens_per_frame=40)
        rough, _ = extract_attention(load_mllm(folder, dtype=torch.bfloat16), clip_of(3), QUERY, tokens_per_frame=40)
        assert rough.video.dtype == rough.frame.dtype == torch.float32
        assert relative(rough.video, exact.video) < 0.25 and relative(rough.frame, exact.frame) < 0.25  # 8 bits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dtype_that_overflows_is_refused_before_weights_are_read(mllm_folder, family, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", None)
    with pytest.raises(DecafError, match="cannot be computed in float16.*Choose bfloat16 or float32"):
        load_mllm(mllm_folder(family), dtype=torch.float16)


def test_counts_of_the_expression_setting(mllm):
    report = Report()
    first, second = extract_attention(mllm, clip_of(9), QUERY, max_key_frames=6, tokens_per_frame=40, progress=report)
    counts = report.counts
    assert first.kind == "object" and second.kind == "background" and first.answers == ()
    assert counts["key_frames"] == counts["frames_encoded_video"] == counts["frames_encoded_image"] == 6
    assert counts["tokens_generated"] == 0
    tokens = first.video.numel() + first.frame.numel()
    assert counts["visual_tokens_encoded"] == counts["visual_tokens_prefilled"] == tokens
    assert first.clip.key_frames == key_frames(9, 6) and first.clip.length == 9


def test_class_name_setting(mllm):
    report = Report()
    obj, back = extract_attention(mllm, clip_of(4), QUERY, setting="class name", tokens_per_frame=40, progress=report)
    counts = report.counts
    assert len(obj.answers) == 5 and counts["tokens_generated"] > 0
    assert counts["visual_tokens_encoded"] == counts["visual_tokens_prefilled"] == obj.video.numel() + obj.frame.numel()
    assert "leaving out any" in back.question
    plain, _ = extract_attention(mllm, clip_of(4), QUERY, tokens_per_frame=40)
    assert relative(obj.video, plain.video) < 1e-5 and relative(obj.frame, plain.frame) < 1e-5
    assert back.video.shape == obj.video.shape and relative(back.video, obj.video) > 1e-4


@pytest.mark.parametrize("queries", [1, 3])
def test_one_pass_per_batch_of_pictures(mllm, queries):
    """With all questions of all queries in it, presence included."""
    passes, report = [], Report()
    mllm.engine.text_tower.layers[0].register_forward_pre_hook(lambda module, args: passes.append(args[0].shape))
    asked = [f"the thing number {number}" for number in range(queries)]
    extract_attentions(mllm, clip_of(2), asked, tokens_per_frame=40, progress=report)
    assert len(passes) == report.counts["forward_passes"] == 2  # the video, and the two frames as images
    assert [batch for batch, *_ in passes] == [1, 2]


def test_more_questions_than_fit_a_pass(mllm, monkeypatch):
    """They are asked on the keys and values of the pictures, which are not run again."""
    queries = ["the red one", "the blue one behind it", "a cup"]
    expected, report, together = extract_attentions(mllm, clip_of(3), queries, tokens_per_frame=40), Report(), Report()
    monkeypatch.setattr("decaf.attention.passes.QUESTION_TOKENS_PER_PASS", 1)
    found = extract_attentions(mllm, clip_of(3), queries, tokens_per_frame=40, progress=report)
    assert report.counts["forward_passes"] == 9 + 6  # each question of the video, and of the images, alone
    for pair, other in zip(found, expected, strict=True):
        assert pair[0].presence == pytest.approx(other[0].presence, abs=1e-5)
        for one, two in zip(pair, other, strict=True):
            assert relative(one.video, two.video) < 1e-5 and relative(one.frame, two.frame) < 1e-5
    monkeypatch.undo()
    extract_attentions(mllm, clip_of(3), queries, tokens_per_frame=40, progress=together)
    assert {**report.counts, "forward_passes": 2} == together.counts


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
    token = mllm.family.visual_tokens["video"]
    with pytest.raises(DecafError, match="control token"):
        extract_attention(mllm, clip_of(1), f"the {token} one")


def test_layers_and_settings_are_checked(mllm):
    with pytest.raises(DecafError, match="layers 0 to"):
        extract_attention(mllm, clip_of(1), QUERY, start_layer=mllm.layers)
    with pytest.raises(DecafError, match="no setting"):
        extract_attention(mllm, clip_of(1), QUERY, setting="both")
