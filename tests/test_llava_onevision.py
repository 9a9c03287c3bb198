"""LLaVA-OneVision's pictures lie as in the paper's reference: without the whole picture in front of the tiles and without tokens behind rows.

So its prompts and visual tokens are those of the published processor and of the model's own functions less these.
"""

import json
import math
import shutil
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dense_rollout import dense_row, relative
from PIL import Image
from plain_passes import whole_prompt
from random_clips import clip_of
from safetensors.torch import load_file
from tiny_models import make_mllm
from transformers import AutoConfig, AutoProcessor
from transformers.image_processing_utils import select_best_resolution

from decaf.attention.extract import extract_attention
from decaf.errors import DecafError
from decaf.mllm import load_mllm
from decaf.mllm.families import llava_onevision
from decaf.mllm.families.llava_onevision import FAMILY, TileShape, choose_tiling

QUESTION = "Which object is 最大的 thing here?"
PUBLISHED = TileShape(14, 1, tile=384, shapes=tuple((rows, cols) for rows in range(1, 7) for cols in range(1, 7)))

# Heights and widths that differ in kind: one tile, padded rows, padded columns, an odd rest of padding, shrunk, thin.
SIZES = [(76, 76), (120, 213), (213, 120), (60, 90), (220, 290), (304, 304), (300, 203), (9, 200)]


@pytest.fixture(scope="module", params=[76, 112])
def folder(request, tmp_path_factory):
    """76 px are 5 x 5 patches and 6 px that are not seen, in the way of the published 384; 112 px are 8 x 8."""
    return make_mllm(tmp_path_factory.mktemp(f"tiles_{request.param}"), "llava_onevision", tile=request.param)


@pytest.fixture
def mllm(folder):
    return load_mllm(folder)


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def pictures(count, height, width):
    """Smooth ones, that any bicubic code resizes alike."""
    small = np.random.default_rng(height).integers(0, 256, (count, 5, 7, 3), dtype=np.uint8)
    return [torch.from_numpy(np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)).copy()) for one in small]


def layout_of(mllm, kind, frames):
    size = tuple(frames[0].shape[:2])
    if kind == "video":
        return mllm.family.video_layout(mllm.vision, size, [0.5 * index for index in range(len(frames))], 16)
    return mllm.family.image_layout(mllm.vision, size, len(frames), 16)


def published(processor, kind, frames):
    """What the model's processor makes of one image or one video, and the question."""
    messages = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if kind == "image":
        return processor(text=[text], images=[Image.fromarray(frames[0].numpy())], return_tensors="pt")
    return processor(text=[text], videos=[torch.stack(frames).permute(0, 3, 1, 2)], do_sample_frames=False, return_tensors="pt")


# -- grids -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, grid",
    [((360, 640), (27, 48)), ((480, 854), (46, 81)), ((720, 1280), (54, 96)), ((1080, 1920), (60, 108)), ((1920, 1080), (108, 60))],
)
def test_grids_of_the_published_tower(size, grid):
    assert choose_tiling(PUBLISHED, *size).grid == grid
    assert FAMILY.image_layout(PUBLISHED, size, 3, 400).grid == (1, *grid)
    assert FAMILY.video_layout(PUBLISHED, size, [0.0, 1.0, 2.0], 400).grid == (3, 14, 14)


@pytest.mark.parametrize("seed", range(60))
def test_grid_is_that_of_the_published_processor(seed, processor):
    rng = np.random.default_rng(seed)
    height, width = (int(2 ** rng.uniform(5, 11)) for _ in "hw")
    tile = processor.image_processor.size["height"]
    shape = TileShape(14, 1, tile=tile, shapes=tuple((rows, cols) for rows in range(1, 5) for cols in range(1, 5)))
    found = choose_tiling(shape, height, width)
    assert [tile * count for count in found.tiles] == list(select_best_resolution((height, width), processor.image_processor.image_grid_pinpoints))
    rows, cols = found.grid
    theirs = processor._get_unpadded_features(height, width, shape.side, shape.side, *found.tiles)
    if theirs[0]:
        assert (rows * cols, rows) == theirs
    else:  # so thin that all is taken for padding there
        assert max(height, width) > 24 * min(height, width) and min(rows, cols) == 2


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (16, 4000), (3, 700), (5000, 7000)])
def test_every_picture_has_a_grid(size):
    for shape in (PUBLISHED, TileShape(14, 1, tile=112, shapes=((2, 2), (4, 4))), TileShape(14, 1, tile=112, shapes=((1, 64),), most_tiles=1)):
        tiling = choose_tiling(shape, *size)
        assert min(tiling.grid) >= 1
        assert all(count * shape.side - 2 * margin >= cells for count, margin, cells in zip(*vars(tiling).values(), strict=True))


# -- prompts and pixels -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, count", [("image", 1), ("video", 1), ("video", 4), ("video", 5)])
def test_prompt_is_the_published_one_but_for_the_number_of_visual_tokens(mllm, processor, kind, count):
    frames = pictures(count, 120, 213)
    layout = layout_of(mllm, kind, frames)
    ids, visual = mllm.picture_ids(layout)
    ids = torch.cat([ids, mllm.question_ids(layout, QUESTION)]).tolist()
    theirs = published(processor, kind, frames)["input_ids"][0].tolist()
    token = mllm.visual_token_id(kind)
    assert [id for id, _ in groupby(ids)] == [id for id, _ in groupby(theirs)]
    assert ids.count(token) == layout.tokens == int(visual.sum())
    if kind == "image":
        rows, _ = layout.grid[1:]
        assert theirs.count(token) == layout.tokens + mllm.vision.side**2 + rows
    else:
        assert theirs.count(token) == layout.tokens + 1


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_the_published_processor(mllm, processor, size):
    frames = pictures(2, *size)
    found = mllm.family.pixels(mllm, layout_of(mllm, "image", frames), frames)
    for index, frame in enumerate(frames):
        theirs = published(processor, "image", [frame])
        assert torch.equal(found["image_sizes"][index], theirs["image_sizes"][0])
        tiles = theirs["pixel_values"][0, 1:]
        assert tiles.shape == found["pixel_values"][index].shape
        assert (found["pixel_values"][index] - tiles).abs().max() <= 4 / 127.5
    video = mllm.family.pixels(mllm, layout_of(mllm, "video", frames), frames)["pixel_values_videos"]
    theirs = published(processor, "video", frames)["pixel_values_videos"]
    assert video.shape == theirs.shape and (video - theirs).abs().max() <= 4 / 127.5


@pytest.mark.parametrize("name", ["frame", "frame_reduced", "video"])
def test_tiles_are_those_of_the_reference(golden, name):
    data = load_file(golden / "llava_onevision" / f"{name}.safetensors")
    config = AutoConfig.from_pretrained(golden / "llava_onevision", trust_remote_code=False)
    mllm = SimpleNamespace(family=FAMILY, vision=FAMILY.vision_shape(config), mean=FAMILY.mean, std=FAMILY.std)
    frames = list(data["source.frames"])
    layout = layout_of(mllm, "video" if name == "video" else "image", frames)
    assert list(layout.grid) == data["expected.visual_grid_thw"][0].tolist()
    for key, found in mllm.family.pixels(mllm, layout, frames).items():
        expected = data[f"input.{key}"]
        assert found.shape == expected.shape
        # Rounded to float16 there; a few levels lie between one bicubic code and another.
        assert (found - expected.to(found)).abs().max() * (127.5 if found.is_floating_point() else 1) <= (2.1 if found.is_floating_point() else 0)


# -- visual tokens ------------------------------------------------------------------------------------------------------------------------


def own_tokens(mllm, kind, pixels, grid):
    """The model's own function for pictures, less the whole picture and the tokens behind rows: one (rows * cols, width) an image, or all frames'."""
    model = mllm.model.model
    if kind == "video":
        values = pixels["pixel_values_videos"]
        out = model.get_video_features(values, vision_feature_layer=-1, vision_feature_select_strategy="full")
        # transformers 5 has put the token behind the last frame here already.
        return getattr(out, "pooler_output", out).reshape(1, -1, mllm.engine.shape.width)[:, : values.shape[1] * math.prod(grid)]
    values = pixels["pixel_values"]
    with_whole = torch.cat([torch.zeros_like(values[:, :1]), values], 1)
    out = model.get_image_features(with_whole, pixels["image_sizes"], vision_aspect_ratio=f"anyres_max_{mllm.vision.most_tiles}")
    rows, cols = grid
    packed = [one[mllm.vision.side ** 2 :].view(rows, cols + 1, -1) for one in getattr(out, "pooler_output", out)]
    assert all(torch.equal(one[:, -1], model.image_newline.expand(rows, -1)) for one in packed)
    return torch.stack([one[:, :-1].flatten(0, 1) for one in packed])


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("size", [size for size in SIZES if min(size) > 9])
def test_visual_tokens_are_the_models_own(mllm, kind, size, monkeypatch):
    frames = pictures(3, *size)
    layout = layout_of(mllm, kind, frames)
    pixels = mllm.family.pixels(mllm, layout, frames)
    mllm.model.double()  # in float32 CPUs differ by more than the two ways do
    monkeypatch.setattr(mllm.engine, "dtype", torch.float64)
    pixels = {name: value.double() if value.is_floating_point() else value for name, value in pixels.items()}
    try:
        with torch.inference_mode():
            expected = own_tokens(mllm, kind, pixels, layout.grid[1:])
            found = mllm.family.encode(mllm, layout, pixels).tokens
            assert found.shape == (layout.batch, layout.tokens, mllm.engine.shape.width) == expected.shape
            assert relative(found, expected) < 1e-12
            monkeypatch.setattr(llava_onevision, "PATCHES_AT_ONCE", 1)
            assert relative(mllm.family.encode(mllm, layout, pixels).tokens, expected) < 1e-12
    finally:
        mllm.model.float()


def one_layer_deep(mllm):
    """Without what mixes places, so that a token is of its own pixels alone."""
    for block in mllm.model.model.vision_tower.modules():
        if isinstance(block, torch.nn.ModuleList):
            for weights in block.parameters():
                weights.data.zero_()


def moved(mllm, layout, plain, lit):
    """How far each cell's token is moved, (slots, rows, cols)."""

    def tokens(picture):
        return mllm.family.encode(mllm, layout, mllm.family.pixels(mllm, layout, [picture])).tokens

    with torch.inference_mode():
        return layout.to_grid((tokens(lit) - tokens(plain)).norm(dim=-1))[0]


@pytest.mark.parametrize("tiles", [(1, 1), (2, 3), (3, 2), (3, 3)])
def test_a_patch_moves_its_own_cell_alone(mllm, tiles):
    """Pictures that fill their tiles, so that nothing is resized. The last pixels of a tile, in which there is no whole patch, move nothing."""
    one_layer_deep(mllm)
    tile, side = mllm.vision.tile, mllm.vision.side
    dark = torch.full((tiles[0] * tile, tiles[1] * tile, 3), 90, dtype=torch.uint8)
    layout = layout_of(mllm, "image", [dark])
    assert layout.grid == (1, tiles[0] * side, tiles[1] * side)
    for row, col in {(0, 0), (side - 1, side), (layout.grid[1] - 1, layout.grid[2] - 1), (side // 2, layout.grid[2] - 2)}:
        if col >= layout.grid[2]:
            continue
        y, x = ((index // side) * tile + (index % side) * 14 for index in (row, col))
        lit = dark.clone()
        lit[y : y + 14, x : x + 14] = 255
        assert (moved(mllm, layout, dark, lit) > 0).nonzero().tolist() == [[0, row, col]]
    if tile % 14:
        lit = dark.clone()
        lit[side * 14 : tile] = 255
        assert not moved(mllm, layout, dark, lit).any()


@pytest.mark.parametrize("tall", [False, True])
def test_a_patch_of_a_padded_picture(mllm, tall):
    """As wide as its tiles and less high: the padding above, in whole tokens, is taken off again."""
    one_layer_deep(mllm)
    tile, side = mllm.vision.tile, mllm.vision.side
    height = 2 * tile - 2 * 14
    dark = torch.full((height, 3 * tile, 3), 90, dtype=torch.uint8)
    lit = dark.clone()
    lit[:14, :14] = 255  # 14 px of padding are above it
    dark, lit = (one.transpose(0, 1).contiguous() if tall else one for one in (dark, lit))
    layout = layout_of(mllm, "image", [dark])
    # Of 5 + 5 rows each 15.2 px on average, 124 px fill 8.2: one row at each end is padding.
    assert layout.grid == ((1, 3 * side, 2 * side - 2) if tall else (1, 2 * side - 2, 3 * side))
    assert (moved(mllm, layout, dark, lit) > 0).nonzero().tolist() == [[0, 0, 0]]


def footprint(size, smaller):
    """(smaller, size): which patches each pooled token is interpolated from, along one side, half-pixel centres."""
    centres = (np.arange(smaller) + 0.5) * size / smaller - 0.5
    return np.clip(1 - np.abs(centres[:, None] - np.arange(size)), 0, None)


def test_a_patch_of_a_video_moves_the_tokens_that_are_pooled_from_it(mllm):
    one_layer_deep(mllm)
    tile, side = mllm.vision.tile, mllm.vision.side
    dark = torch.full((tile, tile, 3), 90, dtype=torch.uint8)
    layout = layout_of(mllm, "video", [dark])
    weights = footprint(side, layout.grid[1])
    for row, col in ((0, 0), (side - 1, 1), (2, side - 2)):
        lit = dark.clone()
        lit[row * 14 : row * 14 + 14, col * 14 : col * 14 + 14] = 255
        found = moved(mllm, layout, dark, lit)[0] > 1e-6
        assert found.any() and np.array_equal(found.numpy(), np.outer(weights[:, row] > 1e-9, weights[:, col] > 1e-9))


# -- the whole stage against plain passes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, size", [(1, (120, 213)), (3, (213, 120)), (5, (60, 90)), (2, (300, 310))])
def test_maps_equal_plain_passes(mllm, frames, size):
    """The model's own functions, mask and positions in float64, then the dense formula; nothing of ours but the token ids and the pixels."""
    clip = clip_of(frames, *size)
    found = extract_attention(mllm, clip, "the dog", tokens_per_frame=16)
    start, shown = mllm.layers // 2, [clip[index] for index in range(frames)]
    mllm.model.double()
    mllm.engine.text_tower.set_attn_implementation("eager")
    with torch.inference_mode():
        for kind in ("video", "image"):
            layout = layout_of(mllm, kind, shown)
            pixels = {k: v.double() if v.is_floating_point() else v for k, v in mllm.family.pixels(mllm, layout, shown).items()}
            tokens = own_tokens(mllm, kind, pixels, layout.grid[1:])
            for attention in found:
                ids, mask, _ = whole_prompt(mllm, layout, attention.question)
                embeds = mllm.model.get_input_embeddings()(ids.expand(layout.batch, -1)).clone()
                embeds[:, mask] = tokens
                out = mllm.model(inputs_embeds=embeds, use_cache=False, output_attentions=True)
                expected = layout.to_grid(dense_row(out.attentions, mask, start)[:, mask])
                assert relative(attention.video if kind == "video" else attention.frame, expected[0] if kind == "video" else expected[:, 0]) < 1e-5


# -- configurations that cannot be ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries, word",
    [
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[112, 113]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[0, 112]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[112, -112]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[112, "112"]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [112]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[112 * 100, 112 * 100]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[112, 112]] * 10_000}, "image_grid_pinpoints"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "vision_aspect_ratio"),
        ({"vision_aspect_ratio": "anyres_max_" + "9" * 5000}, "vision_aspect_ratio"),
        ({"vision_aspect_ratio": "square"}, "vision_aspect_ratio"),
        ({"vision_feature_layer": -2}, "layer -2"),
        ({"vision_feature_layer": [-1, -2]}, "layer [-1, -2]"),
        ({"vision_feature_select_strategy": "default"}, "'default'"),
        ({"vision_config": {"patch_size": 0}}, "patch_size"),
        ({"vision_config": {"patch_size": 1}}, "tokens"),
        ({"vision_config": {"patch_size": 113}}, "patch_size"),
        ({"vision_config": {"image_size": 10**6}}, "image_size"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "tower"),
        ({"text_config": {"model_type": "llama"}}, "tower"),
    ],
)
def test_configurations_that_cannot_be(mllm_folder, tmp_path, entries, word):
    model = tmp_path / "model"
    shutil.copytree(mllm_folder("llava_onevision"), model)
    config = json.loads((model / "config.json").read_text())
    for name, value in entries.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(DecafError) as caught:
        load_mllm(model)
    told = str(caught.value)
    assert str(model) in told and word in told and ("ownload" in told or "Choose" in told) and len(told) < 600 and "\n" not in told, told
