"""An update of the package may change what the faster way relies on: then masks come from the package's own steps, with one warning."""

import dataclasses
import logging

import pytest
import sam2_oracle
import tiny_sam2
import torch
from as_published import segment
from moving_shapes import make_prompts, moving_shapes

from decaf.errors import DecafError
from decaf.sam2 import load_sam2
from decaf.sam2.fast_steps import FastSteps
from decaf.sam2.package import sam2_package
from decaf.sam2.package_steps import PackageSteps


@pytest.fixture
def fresh(tmp_path, caplog):
    """Loads a model that has had no trial. `caplog` then has the warnings."""
    caplog.set_level(logging.WARNING, "decaf")
    path = tiny_sam2.make_sam2(tmp_path / "tiny.safetensors", 3, 64)
    return lambda: load_sam2(path)


def steps_of(sam2):
    with sam2.segmenter() as segmenter:
        return type(segmenter)


@pytest.mark.parametrize(
    "version", ["2.1", "2", "bare", "2.1, two heads", "2, often unseen", "2.1, often unseen"], ids=lambda v: v.replace(" ", "_")
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_package_as_it_is_passes(tmp_path, caplog, version, seed):
    sam2 = load_sam2(tiny_sam2.make_sam2(tmp_path / "tiny.safetensors", seed, 64, version))
    assert steps_of(sam2) is FastSteps and steps_of(dataclasses.replace(sam2, dtype=torch.bfloat16)) is FastSteps
    assert not caplog.records


def renamed(patch, model):
    """A private method of the memory attention's layers that the faster way calls, and the package no more."""
    kind = type(model.memory_attention.layers[0])
    theirs = kind._forward_sa
    patch.delattr(kind, "_forward_sa")
    patch.setattr(kind, "_self_attention", theirs, raising=False)
    forward = kind.forward

    def newer(self, *args, **more):
        self.__dict__["_forward_sa"] = self._self_attention
        try:
            return forward(self, *args, **more)
        finally:
            del self.__dict__["_forward_sa"]

    patch.setattr(kind, "forward", newer)


def other_scale(patch, model):
    """Features of the image are weighted otherwise before memories are seen."""
    kind = type(model.memory_attention)
    forward = kind.forward

    def newer(self, curr, memory, curr_pos=None, **more):
        return forward(self, [1.1 * x for x in curr], memory, curr_pos, **more)

    patch.setattr(kind, "forward", newer)


def other_ages(patch, model):
    """A frame's memory gets another age code."""
    kind = type(model)
    prepare = kind._prepare_memory_conditioned_features

    def newer(self, *args, **more):
        before = self.maskmem_tpos_enc.clone()
        self.maskmem_tpos_enc.copy_(before.roll(1, 0))
        try:
            return prepare(self, *args, **more)
        finally:
            self.maskmem_tpos_enc.copy_(before)

    patch.setattr(kind, "_prepare_memory_conditioned_features", newer)


def other_pictures(patch, model):
    """The image encoder gives other features than its parts did."""
    kind = type(model.image_encoder)
    forward = kind.forward

    def newer(self, sample):
        out = forward(self, sample)
        return out | {"backbone_fpn": [1.1 * level for level in out["backbone_fpn"]]}

    patch.setattr(kind, "forward", newer)


CHANGES = [renamed, other_scale, other_ages, other_pictures]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_package_is_used_by_its_own_steps(fresh, tmp_path, monkeypatch, caplog, change):
    sam2 = fresh()
    clip = moving_shapes(6, 48, 64, 3)
    prompts = make_prompts(clip, 8, 3)
    change(monkeypatch, sam2.model)
    tracks = segment(sam2, clip, prompts, score_threshold=0.3)
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "sam2" in warning.getMessage() and "own steps" in warning.getMessage() and sam2.name in warning.getMessage()

    predictor = tiny_sam2.build(sam2_oracle.predictor_class(), 64).eval()
    predictor.load_state_dict(sam2.model.state_dict())
    kept, logits = sam2_oracle.segment(predictor, clip, prompts, tmp_path / "oracle", score_threshold=0.3)
    assert [t.xy for t in tracks.tracks] == [tuple(prompts.xy[t["point"]].tolist()) for t in kept] and kept
    for number in range(len(kept)):
        assert torch.equal(tracks.masks(number), logits[number] > 0)
    segment(sam2, clip, prompts, score_threshold=0.3)
    assert len(caplog.records) == 1, "told once"


def test_the_packages_own_steps_in_half_precision(fresh, monkeypatch):
    sam2 = dataclasses.replace(fresh(), dtype=torch.bfloat16)
    clip = moving_shapes(5, 48, 64, 3)
    prompts = make_prompts(clip, 8, 3)
    fast = segment(sam2, clip, prompts, max_tracks=1).union()
    monkeypatch.setattr("decaf.sam2.segmenter.fast_steps_agree", lambda *_: False)
    assert steps_of(sam2) is PackageSteps
    own = segment(sam2, clip, prompts, max_tracks=1).union()
    assert 0.7 < (own & fast).sum() / (own | fast).sum()  # random weights magnify the rounding


@pytest.mark.parametrize("step", ["point_masks", "remember_clicks"])
@pytest.mark.parametrize("error", [ValueError("not enough values to unpack"), AssertionError("shape"), RuntimeError("sizes")], ids=repr)
def test_a_package_whose_point_steps_have_changed(fresh, monkeypatch, step, error):
    def changed(*_):
        raise error

    monkeypatch.setattr(PackageSteps, step, changed)
    with pytest.raises(DecafError, match="does not work in the way .* Install another version"):
        segment(fresh(), moving_shapes(3, 48, 64), make_prompts(moving_shapes(3, 48, 64), 3))


def test_a_package_that_lacks_what_every_way_needs(fresh, monkeypatch):
    sam2 = fresh()
    monkeypatch.delattr(sam2_package().SAM2Base, "_encode_new_memory")
    with pytest.raises(DecafError, match="sam2 .* does not work in the way .*_encode_new_memory.* Install another version"):
        segment(sam2, moving_shapes(3, 48, 64), make_prompts(moving_shapes(3, 48, 64), 3))


@pytest.mark.parametrize("error", [RuntimeError("stopped"), AttributeError("stopped"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("stop", [0, 1, "last"])
def test_a_cancel_is_not_taken_for_a_changed_package(fresh, caplog, error, stop):
    """Whatever a progress callback raises, in the package's part of the trial or in ours."""
    counted = []
    with fresh().segmenter(lambda: counted.append(1)):
        last = len(counted) - 1
    sam2, calls = fresh(), []

    def check_cancelled():
        calls.append(1)
        if len(calls) - 1 == (last if stop == "last" else stop):
            raise error

    with pytest.raises(type(error)) as caught, sam2.segmenter(check_cancelled):
        pass
    assert caught.value is error and last > 10
    assert steps_of(sam2) is FastSteps and not caplog.records


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_what_breaks_a_trial_off_decides_nothing(fresh, monkeypatch, caplog, error):
    sam2 = fresh()
    with monkeypatch.context() as patch:
        patch.setattr(FastSteps, "track", lambda *args: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            steps_of(sam2)
    assert steps_of(sam2) is FastSteps and not caplog.records


def test_a_model_without_numbers_is_not_the_packages_fault(fresh, caplog):
    sam2 = fresh()
    sam2.model.sam_mask_decoder.iou_token.weight.fill_(float("nan"))
    clip = moving_shapes(3, 48, 64)
    with pytest.raises(DecafError, match="not finite"):
        segment(sam2, clip, make_prompts(clip, 3))
    assert not caplog.records


def test_a_trial_for_each_device_but_not_for_each_use(fresh, monkeypatch):
    sam2, tracked = fresh(), []
    track = PackageSteps._track_one
    monkeypatch.setattr(PackageSteps, "_track_one", lambda *args: tracked.append(1) or track(*args))
    for _ in range(3):
        steps_of(sam2)
    assert len(tracked) == 1
    steps_of(fresh())
    assert len(tracked) == 2, "another model"
