"""Two sweeps for all objects against SAM 2's own video predictor, object by object."""

import functools
import threading

import pytest
import sam2_oracle
import tiny_sam2
import torch
from moving_shapes import moving_shapes
from PIL import Image

from decaf.errors import DecafError
from decaf.masks import pack_bits
from decaf.sam2 import load_sam2
from decaf.sam2.encoder import Features, normalised
from decaf.sam2.fast_steps import FastSteps
from decaf.sam2.memory_attention import BankGroup, BatchedMemoryAttention
from decaf.sam2.package import sam2_package
from decaf.sam2.package_steps import PackageSteps
from decaf.tracking.frames import FeatureCache, FrameEncoder, resized
from decaf.tracking.memory_plan import MemoryPlan, Step, TrackedObject
from decaf.tracking.segmenter import MemoryReach
from decaf.tracking.sweep import FixedPrompts, Sweep

CASES = [
    # model's seed, version and image size; length, height, width, prompt frames
    (1, "2.1", 128, 1, 96, 128, [0]),
    (1, "2", 128, 2, 128, 128, [0, 1, 1]),
    (3, "2.1", 128, 5, 70, 110, [0, 1, 4]),
    (3, "2", 64, 18, 90, 60, [0, 1, 9, 17]),
    (1, "2.1", 64, 18, 64, 64, [8, 8, 16]),
    (1, "bare", 64, 9, 70, 110, [0, 4]),
    (2, "2.1, two heads", 64, 9, 70, 110, [0, 4]),
    (2, "2, often unseen", 64, 12, 70, 110, [0, 4, 4]),
    (2, "2.1, often unseen", 64, 12, 70, 110, [0, 4, 4]),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(seed, version, image size) -> our model and the package's predictor with the same weights."""

    @functools.cache
    def get(seed, version, size):
        path = tiny_sam2.make_sam2(tmp_path_factory.mktemp("sam2") / "tiny.safetensors", seed, size, version)
        predictor = tiny_sam2.build(sam2_oracle.predictor_class(), size, version).eval()
        ours = load_sam2(path)
        predictor.load_state_dict(ours.model.state_dict())
        return ours, predictor

    return get


def random_masks(count, height, width, seed):
    """Blobs with holes and ragged borders."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.nn.functional.interpolate(torch.rand(count, 1, 9, 9, generator=random), size=(height, width), mode="bicubic")[:, 0]
    return noise > 0.55


def packed(prompts):
    return FixedPrompts([(frame, pack_bits(mask)) for frame, mask in prompts])


def sweep_logits(sam2, clip, prompts, *, steps=FastSteps, batch=8, budget=0):
    """(n, T, H, W) logits, and how many images were encoded."""
    encoded, segmenter = [], steps(sam2.model)
    encoder = FrameEncoder(segmenter, clip, FeatureCache(budget), lambda: encoded.append(1))
    out = torch.full((len(prompts), len(clip), *clip.frame_size), float("nan"))
    for swept in Sweep(segmenter, encoder, clip.frame_size[1], batch=batch).run(packed(prompts)):
        assert out[swept.ids, swept.frame].isnan().all(), "an object came twice on one frame"
        out[swept.ids, swept.frame] = torch.nn.functional.interpolate(
            swept.logits, size=clip.frame_size, mode="bilinear", align_corners=False
        )[:, 0]
    assert not out.isnan().any()
    return out, len(encoded)


def oracle_logits(predictor, clip, prompts, folder):
    state = sam2_oracle.start(predictor, clip, folder)
    return torch.cat([sam2_oracle.propagate(predictor, state, frame, [mask]) for frame, mask in prompts])


def agreement(ours, theirs):
    """Largest difference of logits, and the lowest IoU of a frame's mask; where both are empty it is 1."""
    a, b = ours > 0, theirs > 0
    union = (a | b).sum((-1, -2))
    return float((ours - theirs).abs().max()), float(torch.where(union > 0, (a & b).sum((-1, -2)) / union.clamp(min=1), 1.0).min())


@pytest.mark.parametrize("seed, version, size, length, height, width, frames", CASES)
def test_equals_predictor(models, tmp_path, seed, version, size, length, height, width, frames):
    ours, predictor = models(seed, version, size)
    clip = moving_shapes(length, height, width, seed)
    prompts = list(zip(frames, random_masks(len(frames), height, width, seed), strict=True))
    theirs = oracle_logits(predictor, clip, prompts, tmp_path)
    assert 0.02 < (theirs > 0).float().mean() < 0.98, "masks that are all empty or all full compare nothing"

    if "unseen" in version:
        unseen = (theirs < -1000).flatten(2).all(-1)
        assert 0.05 < unseen.float().mean() < 0.9, "objects must be there and not be there"
    one_by_one, _ = sweep_logits(ours, clip, prompts, steps=PackageSteps, batch=3)
    assert torch.equal(one_by_one, theirs)

    batched, _ = sweep_logits(ours, clip, prompts)
    difference, iou = agreement(batched, theirs)
    assert difference <= 2e-2 and iou >= 0.999


def test_batches_of_any_size(models):
    ours, _ = models(3, "2.1", 64)
    clip = moving_shapes(6, 64, 64)
    prompts = list(zip([0, 2, 2, 3, 5], random_masks(5, 64, 64, 0), strict=True))
    whole, _ = sweep_logits(ours, clip, prompts, batch=8)
    for batch in (1, 2, 3):
        difference, iou = agreement(sweep_logits(ours, clip, prompts, batch=batch)[0], whole)
        assert difference <= 2e-2 and iou >= 0.999


def test_feature_cache_saves_encodings_and_changes_nothing(models):
    ours, _ = models(1, "2.1", 64)
    clip = moving_shapes(12, 64, 64)
    prompts = list(zip([2, 5, 9], random_masks(3, 64, 64, 0), strict=True))
    without, encoded = sweep_logits(ours, clip, prompts, budget=0)
    assert encoded == (12 - 2) + 9
    one_frame = FrameEncoder(FastSteps(ours.model), clip, FeatureCache(0), lambda: None).encode(0).nbytes
    for room, saved in ((3, 3), (100, 7)):
        cached, fewer = sweep_logits(ours, clip, prompts, budget=room * one_frame)
        assert fewer == encoded - saved
        assert torch.equal(cached, without)


class Watched:
    """A clip that notes who reads which frame, and cannot read one of them."""

    def __init__(self, clip, broken=None):
        self.clip, self.broken, self.frame_size, self.reads = clip, broken, clip.frame_size, []

    def __len__(self):
        return len(self.clip)

    def __getitem__(self, index):
        self.reads.append((index, threading.current_thread() is threading.main_thread()))
        if index == self.broken:
            raise DecafError(f"Frame {index} cannot be read.")
        return self.clip[index]


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_frames_are_read_ahead_and_once_per_encoding(models, budget):
    ours, _ = models(1, "2.1", 64)
    clip = Watched(moving_shapes(9, 64, 64))
    prompts = list(zip([2, 5], random_masks(2, 64, 64, 0), strict=True))
    _, encoded = sweep_logits(ours, clip, prompts, budget=budget)
    assert [index for index, _ in clip.reads] == [*range(2, 9), *([4, 3, 2] if budget == 0 else []), 1, 0]
    assert encoded == len(clip.reads)
    assert [index for index, here in clip.reads if here] == ([2, 4] if budget == 0 else [2]), "nothing is at work before the first frame"


@pytest.mark.parametrize("broken", [0, 2, 6])
def test_a_frame_that_cannot_be_read_ahead_is_an_error_where_it_is_needed(models, broken):
    ours, _ = models(1, "2.1", 64)
    seen, segmenter = [], FastSteps(ours.model)
    encoder = FrameEncoder(segmenter, Watched(moving_shapes(9, 64, 64), broken), FeatureCache(0), lambda: None)
    with pytest.raises(DecafError, match=f"Frame {broken} cannot"):
        for swept in Sweep(segmenter, encoder, 64, batch=8).run(packed([(2, random_masks(1, 64, 64, 0)[0])])):
            seen.append(swept.frame)
    assert seen == {0: [*range(2, 9), 1], 2: [], 6: [2, 3, 4, 5]}[broken]


@pytest.mark.parametrize("version, size", [("2", 64), ("2.1", 128), ("bare", 64)])
def test_image_features_equal_the_package(models, version, size):
    ours, _ = models(1, version, size)
    pictures = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fast, exact = FastSteps(ours.model), PackageSteps(ours.model)
    for picture in pictures:
        found, expected = fast.encode(picture), exact.encode(picture)
        assert found.sizes == expected.sizes and torch.equal(found.pos_enc, expected.pos_enc)
        for a, b in zip(found.levels, expected.levels, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_objects_of_interleaved_groups_keep_their_order(models):
    """The groups of a sweep follow one another; the attention does not rely on it."""
    ours, _ = models(3, "2.1", 64)
    model, random = ours.model, torch.Generator().manual_seed(0)
    image = torch.randn(1, 16, model.hidden_dim, generator=random)
    memories = [[(age, torch.randn(16, model.mem_dim, generator=random).bfloat16()) for age in range(count)] for count in (1, 3, 1)]
    pointers = torch.randn(3, 2, model.mem_dim, generator=random)

    def run(groups, objects):
        """`groups`: indices in the batch; `objects`: which object has each index."""
        banks = []
        for group in groups:
            chosen = [objects[i] for i in group]
            banks.append(BankGroup(group, [memories[i] for i in chosen], pointers[chosen], torch.zeros_like(pointers[chosen])))
        with torch.inference_mode():
            return BatchedMemoryAttention(model, torch.ones(1, model.mem_dim, 4, 4))(image, torch.zeros_like(image), banks)

    alone = torch.cat([run([[0]], [i]) for i in range(3)])
    assert not torch.allclose(alone[0], alone[1], atol=1e-2) and not torch.allclose(alone[0], alone[2], atol=1e-2)
    torch.testing.assert_close(run([[0, 2], [1]], [0, 1, 2]), alone, rtol=1e-4, atol=1e-4)


def test_what_lasts_in_the_cache_and_what_does_not():
    def features(size):
        return Features((torch.zeros(size, 1, 1),), torch.zeros(1), ((1, size),))

    cache = FeatureCache(80, lasting=60)
    for index in range(6):
        cache.put(index, features(10), keep=index >= 3)  # 40 bytes each
    assert [index for index in range(6) if index in cache] == [0, 3, 4], "one lasts, two wait to be needed once more"
    cache.put(0, features(5), keep=True)
    assert cache.take(0) is cache.take(0) and cache.take(0).nbytes == 40, "what is there already is not replaced"
    assert cache.take(3).nbytes == 40 and cache.take(3) is None
    cache.put(5, features(10), keep=True)
    cache.put(6, features(10), keep=True)
    assert [index for index in range(7) if index in cache] == [0, 4, 5]
    cache.let_go()
    cache.put(7, features(20), keep=True)
    assert [index for index in range(8) if index in cache] == [0, 7]
    cache.clear()
    cache.put(8, features(1), keep=True)
    assert not any(index in cache for index in range(9))


@pytest.mark.parametrize("length, prompt", [(1, 0), (2, 0), (2, 1), (17, 5), (60, 0), (60, 59), (60, 20)])
def test_a_memory_lives_exactly_as_long_as_it_is_looked_at(length, prompt):
    plan = MemoryPlan(prompt, length, MemoryReach(memories=7, pointers=16))
    steps = [Step(t, False) for t in range(prompt + 1, length)] + [Step(t, True) for t in range(prompt - 1, -1, -1)]
    one = TrackedObject(0, plan, {prompt: None}, {prompt: None})
    looked_at = {frame: i for i, step in enumerate(steps) for _, frame in plan.memories(step)}
    for i, step in enumerate(steps):
        assert {frame for _, frame in plan.memories(step)} <= one.memories.keys()
        assert {frame for _, frame in plan.pointers(step)} <= one.pointers.keys()
        if plan.needs_memory(step.frame):
            one.memories[step.frame] = None
        if plan.needs_pointer(step.frame):
            one.pointers[step.frame] = None
        one.release(step)
        assert all(frame == prompt or looked_at[frame] > i for frame in one.memories)
        # Six memories and fifteen pointers of the last frames, and of the first ones after the prompt for the way back.
        assert len(one.memories) <= 1 + 6 + 5 and len(one.pointers) <= 1 + 15 + 14
    assert one.memories.keys() == one.pointers.keys() == {prompt}


def test_pictures_equal_the_package(tmp_path):
    sam2_package()
    from sam2.utils.misc import load_video_frames

    clip = moving_shapes(2, 90, 61)
    for t in range(2):
        Image.fromarray(clip[t].numpy()).save(tmp_path / f"{t}.jpg", format="PNG")
    theirs, height, width = load_video_frames(str(tmp_path), 128, offload_video_to_cpu=True, compute_device=torch.device("cpu"))
    assert (height, width) == clip.frame_size
    assert torch.equal(torch.stack([normalised(resized(clip[t], 128)) for t in range(2)]), theirs)


def test_every_value_of_a_picture_equals_the_package(tmp_path):
    sam2_package()
    from sam2.utils.misc import _load_img_as_tensor

    values = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    Image.fromarray(values.numpy()).save(tmp_path / "values.jpg", format="PNG")
    theirs, _, _ = _load_img_as_tensor(str(tmp_path / "values.jpg"), 16)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.equal(normalised(resized(values, 16)), ((theirs.float() - mean) / std).float())
