"""SmolVLM2's pictures, held against its processor: all but the shrunk whole picture, which stands behind an image's tiles there."""

import json
import shutil

import numpy as np
import pytest
import torch
from dense_rollout import dense_row, relative
from PIL import Image
from plain_passes import whole_prompt
from random_clips import clip_of
from tiny_models import make_mllm
from transformers import AutoProcessor

from decaf.attention.extract import extract_attention
from decaf.errors import DecafError
from decaf.mllm import load_mllm
from decaf.mllm.families.smolvlm import choose_tiles, in_words

QUESTION = "Which object is 最大的 thing here?"
SIZES = [(56, 56), (60, 90), (213, 120), (120, 213), (9, 200), (300, 310)]


@pytest.fixture(scope="module", params=[56, 90])
def folder(request, tmp_path_factory):
    """Tiles of 90 px hold 6 x 6 patches and 6 px that are not seen, as those of 384 px in the largest published model."""
    return make_mllm(tmp_path_factory.mktemp(f"tiles_{request.param}"), "smolvlm", tile=request.param)


@pytest.fixture
def mllm(folder):
    return load_mllm(folder)


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def pictures(count, height, width):
    """Smooth ones, that any code resizes alike."""
    small = np.random.default_rng(height).integers(0, 256, (count, 5, 7, 3), dtype=np.uint8)
    return [torch.from_numpy(np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)).copy()) for one in small]


def layout_of(mllm, kind, frames, per_second=24):
    size = tuple(frames[0].shape[:2])
    if kind == "video":
        return mllm.family.video_layout(mllm.vision, size, [index / per_second for index in range(len(frames))], 16)
    return mllm.family.image_layout(mllm.vision, size, len(frames), 16)


def published(processor, kind, frames, per_second=24):
    messages = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(messages, processor.chat_template, add_generation_prompt=True, tokenize=False)
    if kind == "image":
        return processor(text=[text], images=[[Image.fromarray(frames[0].numpy())]], return_tensors="pt")
    duration = (len(frames) - 1) / per_second  # as far as the frames tell
    metadata = {"fps": per_second, "total_num_frames": len(frames), "duration": duration, "frames_indices": list(range(len(frames)))}
    video = torch.stack(frames).permute(0, 3, 1, 2)
    return processor(text=[text], videos=[[video]], do_sample_frames=False, video_metadata=[[metadata]], return_tensors="pt")


def published_ids(processor, kind, theirs):
    """Without the whole picture behind the tiles of an image."""
    ids = theirs["input_ids"][0].tolist()
    if kind == "image":
        fake, whole, token = processor.tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<global-img>", "<image>"])
        first = ids.index(whole) - 1
        assert ids[first : first + 2 + processor.image_seq_len] == [fake, whole] + [token] * processor.image_seq_len
        del ids[first : first + 2 + processor.image_seq_len]
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind, count, per_second", [("image", 1, 24), ("video", 1, 24), ("video", 4, 24), ("video", 5, 0.05), ("video", 23, 1)])
def test_prompt_and_pixels_are_the_published_ones(mllm, processor, kind, count, per_second, size):
    frames = pictures(count, *size)
    layout = layout_of(mllm, kind, frames, per_second)
    ids, visual = mllm.picture_ids(layout)
    ids = torch.cat([ids, mllm.question_ids(layout, QUESTION)])
    theirs = published(processor, kind, frames, per_second)
    assert ids.tolist() == published_ids(processor, kind, theirs)
    assert int(visual.sum()) == layout.tokens == int((ids == mllm.visual_token_id(kind)).sum())
    pixels = mllm.family.pixels(mllm, layout, frames)["pixel_values"]
    expected = theirs["pixel_values"][:, :-1] if kind == "image" else theirs["pixel_values"]
    assert pixels.shape == expected.shape
    # Other code for the same filter. A frame is enlarged before it is squeezed there, which shows in pictures of few rows.
    if kind == "image" or min(size) > 9:
        assert (pixels - expected).abs().max() <= 8 / 127.5


def test_a_prompt_without_pictures(mllm, processor):
    text = processor.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False)
    assert mllm.question_ids(None, QUESTION).tolist() == processor.tokenizer(text)["input_ids"]


def test_numbers_in_words():
    num2words = pytest.importorskip("num2words").num2words
    assert [in_words(number) for number in range(1000)] == [num2words(number) for number in range(1000)]
    assert in_words(1000) == "1000"


@pytest.mark.parametrize("size, tiles", [((512, 512), (4, 4)), ((720, 1280), (3, 4)), ((1280, 720), (4, 3)), ((10, 1000), (1, 4)), ((1, 1), (4, 4))])
def test_tiles_of_a_picture(size, tiles):
    assert choose_tiles(*size, 512) == tiles


@pytest.mark.parametrize("size", [(120, 213), (213, 120), (100, 100)])
def test_a_patch_moves_its_own_cell_alone(mllm, size):
    for block in mllm.model.model.vision_model.modules():
        if isinstance(block, torch.nn.ModuleList):  # what mixes places
            for weights in block.parameters():
                weights.data.zero_()
    tile, side = mllm.vision.tile, mllm.vision.tile // 28
    layout = layout_of(mllm, "image", [torch.zeros(*size, 3, dtype=torch.uint8)])
    _, rows, cols = layout.grid
    tiles = torch.full((rows // side, cols // side, 3, tile, tile), -0.3)

    def tokens(tiles):
        return mllm.family.encode(mllm, layout, {"pixel_values": tiles.flatten(0, 1)[None]}).tokens

    with torch.inference_mode():
        plain = tokens(tiles)
        for row, col in {(0, 0), (rows - 1, cols - 1), (side - 1, side), (side, 0), (rows - 1, 1)}:
            lit, (y, x) = tiles.clone(), (index % side * 28 for index in (row, col))
            lit[row // side, col // side, :, y : y + 28, x : x + 28] = 1
            moved = layout.to_grid((tokens(lit) - plain).norm(dim=-1))[0, 0]
            assert (moved > 1e-6).nonzero().tolist() == [[row, col]]


@pytest.mark.parametrize("frames, size", [(1, (120, 213)), (3, (213, 120)), (5, (60, 90))])
def test_maps_equal_plain_passes(mllm, frames, size):
    """The model's own mask and positions in float64, then the dense formula."""
    clip = clip_of(frames, *size)
    found = extract_attention(mllm, clip, "the dog", tokens_per_frame=16)
    start, shown = mllm.layers // 2, [clip[index] for index in range(frames)]
    mllm.model.double()
    mllm.engine.text_tower.set_attn_implementation("eager")
    with torch.inference_mode():
        for kind in ("video", "image"):
            layout = layout_of(mllm, kind, shown)
            pixels = mllm.family.pixels(mllm, layout, shown)["pixel_values"].double()
            for attention in found:
                ids, mask, _ = whole_prompt(mllm, layout, attention.question)
                # The whole model on ids and pixels, as its processor would give them.
                out = mllm.model(input_ids=ids.expand(layout.batch, -1), pixel_values=pixels, use_cache=False, output_attentions=True)
                expected = layout.to_grid(dense_row(out.attentions, mask, start)[:, mask])
                assert relative(attention.video if kind == "video" else attention.frame, expected[0] if kind == "video" else expected[:, 0]) < 1e-4


@pytest.mark.parametrize(
    "entries, word",
    [
        ({"scale_factor": 0}, "scale_factor"),
        ({"scale_factor": 3}, "scale_factor"),
        ({"scale_factor": None}, "ownload"),
        ({"vision_config": {"patch_size": 0}}, "patch_size"),
        ({"vision_config": {"patch_size": 57}}, "patch_size"),
        ({"vision_config": {"image_size": 57}}, "57"),
        ({"vision_config": {"image_size": 4096, "patch_size": 1}, "scale_factor": 1}, "fit together"),
        ({"vision_config": {"image_size": 10**6}}, "image_size"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "tower"),
        ({"text_config": {"model_type": "mistral"}}, "tower"),
    ],
)
def test_configurations_that_cannot_be(mllm_folder, tmp_path, entries, word):
    model = tmp_path / "model"
    shutil.copytree(mllm_folder("smolvlm"), model)
    config = json.loads((model / "config.json").read_text())
    for name, value in entries.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(DecafError) as caught:
        load_mllm(model)
    told = str(caught.value)
    assert str(model) in told and word in told and ("ownload" in told or "Choose" in told) and len(told) < 600 and "\n" not in told, told
