"""Memory that runs out, in whatever words it is said: known as such, tried again with less, counted once, and told with a remedy."""

import gc
import weakref

import pytest
import torch
from as_published import segment
from moving_shapes import make_prompts, moving_shapes
from random_clips import clip_of

import decaf.attention.passes
from decaf import devices
from decaf.attention.extract import extract_attention
from decaf.attention.rollout import BLOCK_BYTES
from decaf.clips import clip_from_images, open_clip
from decaf.devices import OutOfMemoryError, attempt, is_out_of_memory, out_of_memory
from decaf.errors import DecafError
from decaf.mllm import load_mllm
from decaf.report import Report
from decaf.sam2 import load_sam2

ACCELERATOR = getattr(torch, "AcceleratorError", RuntimeError)


def numbered(error, code):
    error.error_code = code
    return error


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB."),
    ACCELERATOR("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call."),
    ACCELERATOR("HIP error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: 9.07 GB)."),
    RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("Could not allocate tensor with 8 bytes. There is not enough GPU video memory available!"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    MemoryError(),
]
OTHER = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes may help."),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)"),
    ValueError("out of memory"),
    DecafError("The query is about a robot that ran out of memory."),
    KeyboardInterrupt("out of memory"),
]


def id_of(error):
    return f"{type(error).__name__} {str(error)[:40]}"


@pytest.mark.parametrize("error", FULL, ids=id_of)
def test_it_is_known_whoever_says_it(error):
    assert is_out_of_memory(error)
    told = out_of_memory(error, "the test", "Lower the number.")
    assert is_out_of_memory(told) and isinstance(told, torch.OutOfMemoryError) and isinstance(told, DecafError)
    host = isinstance(error, MemoryError) or "CPU" in str(error)
    assert ("computer" in str(told)) == host and ("Lower the number." in str(told)) != host


@pytest.mark.parametrize("error", OTHER, ids=id_of)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), attempt({}):
        raise error


def test_a_code_says_it_too():
    class Coded(RuntimeError):
        error_code = 2

    assert is_out_of_memory(Coded("CUDA error: see the documentation"))
    assert not is_out_of_memory(numbered(Coded("CUDA error: see the documentation"), 710))


def test_the_cpu_really_says_so():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value) and devices.of_the_host(caught.value)


def test_a_failed_attempt_leaves_nothing(monkeypatch):
    """Its counts, and its tensors, which are gone before the caches are emptied: those are what fills the memory."""
    alive, counts = [], {"kept": 1}

    def step(depth):
        tensor = torch.zeros(8)
        held = weakref.ref(tensor)
        alive.append(held)
        counts["kept"], counts["more"] = 5, 1
        if depth:
            return step(depth - 1)
        try:
            raise KeyError("inner")
        except KeyError:
            raise torch.OutOfMemoryError("full")  # noqa: B904 (as code of others does)

    gc.disable()
    monkeypatch.setattr(devices, "empty_caches", lambda: alive.append([one() for one in alive]))
    try:
        with attempt(counts):
            step(2)
    finally:
        gc.enable()
    assert counts == {"kept": 1} and alive[-1] == [None] * 3


def fail_at(monkeypatch, place, name, error, calls):
    """Makes the calls with these numbers, from 0, of a function fail."""
    original, made = getattr(place, name), []

    def failing(*args, **more):
        made.append(more)
        if len(made) - 1 in calls:
            raise error
        return original(*args, **more)

    monkeypatch.setattr(place, name, failing)
    return made


@pytest.fixture(params=[FULL[0], FULL[1], FULL[3], FULL[6], FULL[10], FULL[12]], ids=id_of)
def error(request):
    return request.param


def test_attention_is_tried_again(mllm_folder, monkeypatch, error):
    mllm, once, twice = load_mllm(mllm_folder("qwen2_5_vl")), Report(), Report()
    expected, _ = extract_attention(mllm, clip_of(3), "the dog", tokens_per_frame=40, progress=once)
    calls = fail_at(monkeypatch, decaf.attention.passes, "last_row_rollout", error, {0})
    found, _ = extract_attention(mllm, clip_of(3), "the dog", tokens_per_frame=40, progress=twice)
    assert len(calls) > 1 and twice.counts == once.counts
    assert torch.allclose(found.video, expected.video, rtol=1e-4) and torch.allclose(found.frame, expected.frame, rtol=1e-4)
    fail_at(monkeypatch, decaf.attention.passes, "last_row_rollout", error, range(9))
    with pytest.raises(OutOfMemoryError, match="tokens per frame|other programs"):
        extract_attention(mllm, clip_of(3), "the dog", tokens_per_frame=40)


def test_blocks_are_made_smaller_once(mllm_folder, monkeypatch):
    """Three passes that fail once each: the blocks of the last are as large as those of the first."""
    mllm = load_mllm(mllm_folder("qwen2_5_vl"))
    monkeypatch.setattr(decaf.attention.batches, "ENOUGH_TOKENS_ON_CPU", 1)
    monkeypatch.setattr(decaf.attention.batches.Batches, "q_budget_bytes", lambda *_: None)
    calls = fail_at(monkeypatch, decaf.attention.passes, "last_row_rollout", FULL[0], {0, 2, 4, 6})
    extract_attention(mllm, clip_of(3), "the dog", tokens_per_frame=16)
    sizes = [call["block_bytes"] for call in calls]
    assert sizes[0] is None and len(sizes) > 4 and set(sizes[1:]) == {BLOCK_BYTES["cuda"] // 16}


@pytest.mark.slow
def test_tracking_is_tried_again_and_counted_once(sam2_file, monkeypatch, error):
    sam2, clip = load_sam2(sam2_file), moving_shapes(5, 40, 50, 3)
    prompts, once = make_prompts(clip, 8, 3), Report()
    expected = segment(sam2, clip, prompts, score_threshold=0.3, progress=once)
    twice = Report()
    twice.count("sam2_key_encodings", 100)
    twice.count("other")
    calls = fail_at(monkeypatch, sam2.model, "_forward_sam_heads", error, {4})
    tracks = segment(sam2, clip, prompts, score_threshold=0.3, progress=twice)
    assert len(calls) > 5 and [track.xy for track in tracks.tracks] == [track.xy for track in expected.tracks]
    # Without a cache of features each frame of the second try is encoded anew, but nothing of the first is counted.
    assert twice.counts["other"] == 1 and 0 < twice.counts["sam2_key_encodings"] - 100 <= 2 * len(prompts.fused.clip.key_frames)
    assert once.counts["sam2_key_encodings"] <= twice.counts["sam2_key_encodings"] - 100
    fail_at(monkeypatch, sam2.model, "_forward_sam_heads", error, range(999))
    with pytest.raises(OutOfMemoryError, match="smaller SAM 2 model|other programs"):
        segment(sam2, clip, prompts)


def test_other_errors_are_not_tried_again(sam2_file, mllm_folder, monkeypatch):
    sam2, clip = load_sam2(sam2_file), moving_shapes(5, 40, 50, 3)
    calls = fail_at(monkeypatch, sam2.model, "_forward_sam_heads", OTHER[0], {0})
    with pytest.raises(RuntimeError, match="device-side assert"):
        segment(sam2, clip, make_prompts(clip, 8, 3))
    rolled = fail_at(monkeypatch, decaf.attention.passes, "last_row_rollout", OTHER[0], {0})
    with pytest.raises(RuntimeError, match="device-side assert"):
        extract_attention(load_mllm(mllm_folder("qwen2_5_vl")), clip_of(3), "the dog", tokens_per_frame=40)
    assert len(calls) == len(rolled) == 1


def test_a_computer_without_memory_for_a_frame(tmp_path, monkeypatch, clip_file):
    def full(*args, **more):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("decaf.clips.video_file.np.rot90", full)
        with pytest.raises(OutOfMemoryError, match=f"does not suffice to decode .*{clip_file.name}.*smaller"):
            open_clip(clip_file)
    clip = clip_from_images(torch.zeros(2, 4, 4, 3))
    monkeypatch.setattr(type(clip), "_read", full)
    with pytest.raises(OutOfMemoryError, match="decode frame 1 of images"):
        clip[1]


def test_no_memory_for_a_checkpoint(sam2_file, tmp_path, monkeypatch):
    torch.save({"model": {}}, tmp_path / "model.pt")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **more: torch.empty(1 << 60))
        with pytest.raises(DecafError, match="Memory ran out while .*model.pt was read"):
            load_sam2(tmp_path / "model.pt")
    monkeypatch.setattr(torch.nn.Module, "to", lambda *args: (_ for _ in ()).throw(FULL[3]))
    with pytest.raises(OutOfMemoryError, match="GPU's memory does not suffice to load"):
        load_sam2(sam2_file)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_caches_of_every_device_are_emptied(monkeypatch, kind):
    module, emptied = getattr(torch, kind, None), []
    if module is None or not hasattr(module, "empty_cache"):
        pytest.skip(f"this PyTorch has no torch.{kind}")
    for other in ("cuda", "xpu"):
        if hasattr(torch, other):
            monkeypatch.setattr(getattr(torch, other), "is_initialized", lambda other=other: other == kind)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")

    def failed():
        raise ACCELERATOR("CUDA error: out of memory")  # of the failed launch, told again

    monkeypatch.setattr(module, "synchronize", failed)
    monkeypatch.setattr(module, "empty_cache", lambda: emptied.append(kind))
    devices.empty_caches()
    assert emptied == [kind]
