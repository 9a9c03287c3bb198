"""A model is brought to its device when it has something to compute. Run by inside.py; each raises when something is wrong."""

import time

import comfy.model_management as mm
import torch
from kit import images, prompts, run, sam2


def loads(work) -> int:
    """How often ComfyUI is asked for a model while `work` runs."""
    asked, kept = [], mm.load_models_gpu

    def load(models, *args, **kwargs):
        asked.append(models)
        return kept(models, *args, **kwargs)

    mm.load_models_gpu = load
    try:
        work()
    finally:
        mm.load_models_gpu = kept
    return len(asked)


def case_another_threshold_does_not_load_sam2():
    clip, points, made = images(6), prompts(6, 0.6), {}

    def propagate(threshold, overlap=0.9):
        start = time.perf_counter()
        made[threshold] = run(
            "SAM2VideoPropagate", sam2=sam2(), frames=clip, prompts=points, score_threshold=threshold, nms_iou=overlap, method="as published"
        )
        made["seconds"] = time.perf_counter() - start

    assert loads(lambda: propagate(0.0)) == 1
    everything = len(made[0.0][1].tracks)
    assert everything > 1
    middle = sorted(track.score for track in made[0.0][1].tracks)[everything // 2]
    assert loads(lambda: propagate(middle)) == 0
    assert 0 < len(made[middle][1].tracks) < everything
    assert torch.equal(made[middle][0], made[middle][1].union().float())
    assert loads(lambda: propagate(0.1, overlap=0.5)) == 1, "other candidates have to be found"


def case_without_points_sam2_is_not_loaded():
    clip, points = images(4), prompts(4)
    nothing = type(points)(points.key[:0], points.xy[:0], points.value[:0], points.fused)
    made = []
    assert loads(lambda: made.append(run("SAM2VideoPropagate", sam2=sam2(), frames=clip, prompts=nothing))) == 0
    assert not made[0][0].any() and "Nothing found" in made[0][4]


def case_an_object_that_was_not_tracked_yet_loads_sam2():
    clip, points = images(5), prompts(5, 0.6)
    given = {"sam2": sam2(), "frames": clip, "prompts": points, "nms_iou": 0.9, "targets": "all"}
    best = run("SAM2VideoPropagate", **given, score_threshold=1.0)[1]
    more = []
    assert loads(lambda: more.append(run("SAM2VideoPropagate", **given, score_threshold=0.0)[1])) == 1
    assert len(more[0].tracks) > len(best.tracks)
