"""SAM 3's tracker as a segmenter: against transformers' own, and files of it by all the names that its weights go by."""

import functools

import pytest
import sam3_oracle
import short_runs
import tiny_sam3
import torch
from as_published import segment
from counted_memory import Alive
from live_memory import LiveMemory
from moving_shapes import make_prompts, moving_shapes
from safetensors.torch import load_file, save_file

import decaf
from decaf.command import main as cli
from decaf.errors import DecafError
from decaf.masks import pack_bits
from decaf.sam2.build import WithoutMemory
from decaf.sam3.build import build_sam3
from decaf.sam3.encoder import encoder_bytes, transformers_classes
from decaf.sam3.names import TRANSFORMERS, our_weights
from decaf.sam3.steps import MOST_PROMPTS, Sam3FastSteps, Sam3PackageSteps, nearest_prompts
from decaf.tracking.correction import sweep_prompted
from decaf.tracking.frames import FeatureCache, FrameEncoder, resized
from decaf.tracking.segmenter import Clicks, MemoryBank
from decaf.tracking.sweep import FixedPrompts, Sweep

pytest.importorskip("transformers.models.sam3_tracker_video", reason="SAM 3 is in transformers from 5 on")

SIZE = (70, 110)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(seed, seen) -> our model and transformers' with the same weights."""

    @functools.cache
    def get(seed=1, seen=4.0):
        theirs = tiny_sam3.make_tracker(seed, seen)
        return decaf.load_segmenter(tiny_sam3.write(theirs, tmp_path_factory.mktemp("sam3") / "tiny.safetensors")), theirs

    return get


def blobs(count, seed=1):
    random = torch.Generator().manual_seed(seed)
    noise = torch.nn.functional.interpolate(torch.rand(count, 1, 9, 9, generator=random), size=SIZE, mode="bicubic")[:, 0]
    return noise > 0.55


def frames_of(clip):
    return [clip[t] for t in range(len(clip))]


def at_size(logits):
    return torch.nn.functional.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False)[:, 0]


def check_equal(ours, theirs):
    """Within rounding: memories are kept in bfloat16, whose last bit may fall either way, and every frame builds on it."""
    assert 0.02 < (theirs > 0).float().mean() < 0.98, "masks that are all empty or all full compare nothing"
    a, b = ours > 0, theirs > 0
    union = (a | b).sum((-1, -2))
    assert float((ours - theirs).abs().max()) <= 2e-2
    assert float(torch.where(union > 0, (a & b).sum((-1, -2)) / union.clamp(min=1), 1.0).min()) >= 0.999


def swept(steps, model, clip, prompts):
    segmenter = steps(model)
    encoder = FrameEncoder(segmenter, clip, FeatureCache(0), lambda: None)
    out = torch.full((len(prompts), len(clip), *SIZE), float("nan"))
    for each in Sweep(segmenter, encoder, SIZE[1], batch=8).run(FixedPrompts([(frame, pack_bits(mask)) for frame, mask in prompts])):
        out[each.ids, each.frame] = at_size(each.logits)
    return out


@pytest.mark.parametrize("seed, seen, length, starts", [(1, 4.0, 9, [0, 4, 4]), (1, 0.0, 9, [0, 4]), (1, 4.0, 18, [8])])
def test_equals_transformers(models, seed, seen, length, starts):
    ours, model = models(seed, seen)
    clip = moving_shapes(length, *SIZE, 1)
    prompts = list(zip(starts, blobs(len(starts)), strict=True))
    theirs = torch.stack([sam3_oracle.propagate(model, frames_of(clip), [prompt]) for prompt in prompts])
    if not seen:
        unseen = (theirs < -1000).flatten(2).all(-1)
        assert 0.05 < unseen.float().mean() < 0.9, "objects must be there and not be there"
    for steps in (Sam3FastSteps, Sam3PackageSteps):
        check_equal(swept(steps, ours.model, clip, prompts), theirs)


def test_points(models):
    ours, model = models()
    clip, xy = moving_shapes(1, *SIZE, 1), torch.tensor([[0.3, 0.4], [0.7, 0.5], [0.5, 0.9]])
    with ours.segmenter() as segmenter:
        assert type(segmenter) is Sam3FastSteps, "the trial fell back to the package's own steps"
        logits, ious = segmenter.point_masks(segmenter.encode(resized(clip[0], ours.image_size)), xy)
    for mask, iou, point in zip(at_size(logits), ious, xy, strict=True):
        expected, predicted = sam3_oracle.point_mask(model, frames_of(clip), 0, point)
        assert (mask - expected).abs().max() < 1e-3 and abs(float(iou) - predicted) < 1e-5
    assert (logits[0] - logits[2]).abs().max() > 0.1, "the mask does not depend on the point"


CLICKS = [([(0.3, 0.4)], [1], None), ([(0.3, 0.4), (0.7, 0.2)], [1, 0], None), ([(0.4, 0.5)], [1], (0.2, 0.3, 0.6, 0.9))]


@pytest.mark.parametrize("points, labels, box", CLICKS)
def test_clicks_and_boxes(models, points, labels, box):
    """On the third frame, then forward and backward."""
    ours, model = models()
    clip, xy = moving_shapes(5, *SIZE, 1), torch.tensor(points)
    corners = torch.tensor(box or []).view(-1, 2)
    theirs = sam3_oracle.clicked(model, frames_of(clip), 2, torch.cat([corners, xy]), [2, 3][: len(corners)] + labels)
    segmenter = Sam3FastSteps(ours.model)
    encoder = FrameEncoder(segmenter, clip, FeatureCache(0), lambda: None)
    first, _ = segmenter.remember_clicks(encoder.encode(2), Clicks(xy, torch.tensor(labels) == 1, box), None)
    out = torch.empty_like(theirs)
    for frame, logits in sweep_prompted(segmenter, encoder, {2: first}):
        out[frame] = at_size(logits)[0]
    check_equal(out, theirs)


def test_an_object_that_is_marked_on_many_frames(models):
    """More frames than are looked at: the nearest of them."""
    ours, model = models()
    clip, frames = moving_shapes(14, *SIZE, 1), [1, 3, 5, 6, 10, 12]
    masks = dict(zip(frames, blobs(len(frames)), strict=True))
    theirs = sam3_oracle.propagate(model, frames_of(clip), list(masks.items()))
    segmenter = Sam3FastSteps(ours.model)
    encoder = FrameEncoder(segmenter, clip, FeatureCache(0), lambda: None)
    prompts = {frame: segmenter.remember(encoder.encode(frame), [mask]) for frame, mask in masks.items()}
    out = torch.empty_like(theirs)
    for frame, logits in sweep_prompted(segmenter, encoder, prompts):
        out[frame] = at_size(logits)[0]
    check_equal(out, theirs)


def test_the_nearest_prompts_are_looked_at():
    bank = MemoryBank([(9, "a"), (5, "b"), (4, "c"), (-2, "d"), (-8, "e"), (6, "f"), (1, "g")], [(9, "p")], prompts=5)
    found = nearest_prompts(bank, 4, 6)
    assert found.memories == [(5, "b"), (4, "c"), (-2, "d"), (-8, "e"), (6, "f"), (1, "g")] and found.prompts == 4
    assert nearest_prompts(bank, 3, 9).memories == [(5, "b"), (4, "c"), (-2, "d"), (9, "a"), (6, "f"), (1, "g")]
    assert nearest_prompts(bank, 5, 6) is bank and found.pointers is bank.pointers


def test_from_points_to_tracks(models):
    ours, _ = models()
    clip = moving_shapes(6, *SIZE, 1)
    tracks = segment(ours, clip, make_prompts(clip, 4, 1), score_threshold=-1.0, max_tracks=2)
    assert len(tracks.tracks) == 2 and tracks.masks(0).any() and tracks.masks(0).shape == (6, *SIZE)


def test_the_command_takes_its_file(models, line, tmp_path, capsys):
    file = tiny_sam3.write(models()[1], tmp_path / "sam3.safetensors", "Meta")
    assert cli.main(line("--sam2", str(file), "--presence-threshold", "0")) == 0, capsys.readouterr().err
    masks = short_runs.masks(tmp_path / "out" / "masks")
    assert len(masks) == short_runs.FRAMES and any(mask.any() for mask in masks) and not all(mask.all() for mask in masks)


@pytest.mark.parametrize("names", ["transformers", "alone", "Meta"])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_every_file_holds_the_same_model(models, tmp_path, names, ending):
    ours, theirs = models()
    path = tiny_sam3.write(theirs, tmp_path / f"nested.{ending}", names)
    told = []
    found = decaf.load_segmenter(path, progress=lambda *step: told.append(step))
    assert (found.title, found.name, found.image_size) == ("SAM 3", "SAM 3 reduced, width 64", tiny_sam3.IMAGE_SIZE)
    expected, weights = ours.model.state_dict(), found.model.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
    done = [step[0] for step in told]
    assert done == sorted(done) and len(set(done)) > 100 and told[-1][0] == told[-1][1]


def test_half_precision_files_are_computed_in_float32(models, tmp_path):
    _, theirs = models()
    found = decaf.load_segmenter(tiny_sam3.write(theirs, tmp_path / "half.safetensors", "Meta", torch.float16), dtype=torch.bfloat16)
    assert all(weight.dtype == torch.float32 for weight in found.model.parameters()) and found.dtype == torch.bfloat16
    with found.segmenter() as segmenter:
        block = found.model.image_encoder.trunk.blocks[0]
        assert block.attention.q_proj.weight.dtype == torch.bfloat16
        mask = blobs(1)[0]
        out = segmenter.remember(segmenter.encode(resized(moving_shapes(1, *SIZE, 1)[0], found.image_size)), [mask])
    assert ((at_size(out.logits)[0] > 0) == mask).float().mean() > 0.9


class Stop(BaseException):
    pass


def test_loading_can_be_cancelled(models, tmp_path):
    def stop(done, total, what):
        assert what == "Loading SAM 3"
        if done > total / 2:
            raise Stop

    with pytest.raises(Stop):
        decaf.load_segmenter(tiny_sam3.write(models()[1], tmp_path / "tiny.safetensors"), progress=stop)


REFUSED = {
    "SAM 3.1": (
        lambda w: {**w, "detector.backbone.vision_backbone.propagation_convs.0.conv_1x1.weight": torch.ones(1)},
        "is SAM 3.1",
        "sam3.pt",
    ),
    "no tracker": (lambda w: {name: x for name, x in w.items() if not name.startswith("tracker.")}, "without its tracker", "sam3.pt"),
    "a weight less": (lambda w: {name: x for name, x in w.items() if name != "tracker.no_obj_ptr"}, "'no_obj_ptr'", "facebook/sam3"),
    "a block less": (lambda w: {name: x for name, x in w.items() if "blocks.3." not in name}, "do not fit together", "facebook/sam3"),
    "another shape": (lambda w: {**w, "tracker.no_obj_ptr": torch.ones(1, 3)}, "in another shape", "facebook/sam3"),
    "whole numbers": (lambda w: {**w, "tracker.no_obj_ptr": torch.ones(1, 128, dtype=torch.int8)}, "quantised", "checkpoint"),
    "a narrower trunk": (
        lambda w: {**w, "detector.backbone.vision_backbone.trunk.pos_embed": torch.ones(1, 10, 60)},
        "in another shape",
        "facebook/sam3",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_files_are_refused_by_name(models, tmp_path, what):
    change, *said = REFUSED[what]
    path = tmp_path / "file.safetensors"
    save_file(change(load_file(tiny_sam3.write(models()[1], tmp_path / "whole.safetensors", "Meta"))), path)
    with pytest.raises(DecafError) as caught:
        decaf.load_segmenter(path)
    assert all(words in str(caught.value) for words in [str(path), *said])


def test_a_damaged_file_is_refused(models, tmp_path):
    path = tiny_sam3.write(models()[1], tmp_path / "tiny.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DecafError, match="damaged"):
        decaf.load_segmenter(path)


def test_an_older_transformers_is_named(models, tmp_path, monkeypatch):
    path = tiny_sam3.write(models()[1], tmp_path / "tiny.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "transformers.models.sam3.modeling_sam3", None)
    with pytest.raises(DecafError, match="transformers 5 or later.*SAM 2.1"):
        decaf.load_segmenter(path)


def test_sam2_is_still_told_apart(sam2_file):
    assert decaf.load_segmenter(sam2_file).title == "SAM 2"
    with pytest.raises(DecafError, match="does not hold SAM 3"):
        decaf.load_sam3(sam2_file)


def test_memory_is_told_beforehand(models):
    ours, _ = models()
    mask = blobs(1)
    with ours.segmenter() as segmenter:
        picture = resized(moving_shapes(1, *SIZE, 1)[0], ours.image_size)
        with LiveMemory() as memory:
            features = segmenter.encode(picture)
        assert memory.peak < ours.working_bytes(1, 1) and features.nbytes == ours.feature_bytes()
        with LiveMemory() as memory:
            segmenter.remember(features, list(mask))
        assert memory.peak < ours.working_bytes(1, 1)


def test_the_published_model_is_what_its_shapes_say():
    """All but its weights: transformers' default configuration is that of facebook/sam3."""
    from transformers import Sam3TrackerVideoConfig, Sam3TrackerVideoModel

    config = Sam3TrackerVideoConfig()
    with torch.device("meta"):
        theirs = Sam3TrackerVideoModel(config)
    weights = our_weights({tiny_sam3.whole_name(name): value for name, value in theirs.state_dict().items()}, TRANSFORMERS)
    with WithoutMemory():
        model = build_sam3(weights, transformers_classes())
    assert {name: x.shape for name, x in model.state_dict().items()} == {name: x.shape for name, x in weights.items()}
    ours, published = model.image_encoder.trunk.vit.config, config.vision_config.backbone_config
    told = (
        "num_attention_heads",
        "image_size",
        "window_size",
        "global_attn_indexes",
        "pretrain_image_size",
        "layer_norm_eps",
        "rope_parameters",
    )
    assert [getattr(ours, name) for name in told] == [getattr(published, name) for name in told]
    assert model.image_size == 1008 and model.sam_image_embedding_size == 72 and model.num_maskmem == config.num_maskmem
    assert model.max_obj_ptrs_in_encoder == config.max_object_pointers_in_encoder and MOST_PROMPTS == config.max_cond_frame_num
    attention = model.sam_mask_decoder.transformer.layers[0].self_attn
    assert attention.num_heads == config.mask_decoder_config.num_attention_heads
    assert model.memory_attention.layers[0].self_attn.num_heads == config.memory_attention_num_attention_heads


def test_memory_of_the_published_model_is_told_beforehand():
    """Tensors that have a size and no memory are counted."""
    from transformers import Sam3TrackerVideoConfig, Sam3TrackerVideoModel

    with torch.device("meta"):
        theirs = Sam3TrackerVideoModel(Sam3TrackerVideoConfig())
    weights = our_weights({tiny_sam3.whole_name(name): value for name, value in theirs.state_dict().items()}, TRANSFORMERS)
    with WithoutMemory():
        model = build_sam3(weights, transformers_classes()).eval().to("meta")
    image = torch.empty(1, 3, 1008, 1008, device="meta")
    with torch.inference_mode(), Alive() as alive:
        model.image_encoder(image)
    assert 0.75 * encoder_bytes(model) < alive.most < encoder_bytes(model)
