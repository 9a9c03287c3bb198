"""Every long step that the library takes before it computes: it reports, and can be stopped within it."""

import shutil
import threading
from fractions import Fraction

import av
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from short_runs import SIZE, picture
from slow import EACH_FAMILY
from tiny_models import make_mllm

from decaf.clips import open_clip, write_video
from decaf.errors import DecafError
from decaf.mllm import load_mllm


class Stop(Exception):
    """What a caller cancels with may be any exception."""


class Watch:
    """Keeps what is reported, and cancels at the report of that number."""

    def __init__(self, stop_at=None, kind=Stop):
        self.reports, self.stop_at, self.kind = [], stop_at, kind

    def __call__(self, done, total, what):
        self.reports.append((done, total, what))
        if len(self.reports) == self.stop_at:
            raise self.kind


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "long.mp4"
    write_video(path, (picture(index % 9) for index in range(60)), Fraction(25), SIZE)
    return path


def test_opening_a_video_reports_and_stops(video, tmp_path, monkeypatch):
    watch = Watch()
    assert len(open_clip(video, progress=watch)) == 60
    assert [done for done, _, _ in watch.reports] == list(range(60))
    assert {total for _, total, _ in watch.reports} == {60}
    opened, open_file = [], av.open
    monkeypatch.setattr(av, "open", lambda *args, **more: opened.append(open_file(*args, **more)) or opened[-1])
    with pytest.raises(Stop):
        open_clip(video, progress=Watch(20))
    # A file that stays open cannot be moved or deleted on Windows.
    assert len(opened) == 1
    with pytest.raises(Exception):  # noqa: B017 (whatever the library says of a closed file)
        next(opened[0].demux())


def test_opening_a_folder_reports_and_stops(tmp_path):
    for index in range(6):
        Image.fromarray(picture(index).numpy()).save(tmp_path / f"{index}.png")
    watch = Watch()
    assert len(open_clip(tmp_path, progress=watch)) == 6
    assert watch.reports == [(index, 6, "Opening the clip") for index in range(1, 6)]
    with pytest.raises(KeyboardInterrupt):
        open_clip(tmp_path, progress=Watch(3, KeyboardInterrupt))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of many weights, which take a while to load."""
    return make_mllm(tmp_path_factory.mktemp("deep") / "deep", "qwen2_vl", layers=40)


def by_weight():
    from transformers.utils import logging

    return hasattr(logging, "set_tqdm_hook")


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt, ImportError])
def test_loading_weights_reports_and_stops(deep, monkeypatch, kind):
    if by_weight():  # report each, however fast they are
        monkeypatch.setattr("tqdm.tqdm.__init__", _each(monkeypatch))
    watch = Watch()
    mllm = load_mllm(deep, progress=watch)
    assert watch.reports[0] == (0, 1, "Loading deep") and watch.reports[-1] == (1, 1, "Loading deep")
    if not by_weight():
        return
    weights = len(load_file(deep / "model.safetensors"))
    assert max(total for _, total, _ in watch.reports) == weights
    within = [number for number, (done, total, _) in enumerate(watch.reports, 1) if total == weights and 0 < done < weights]
    assert len(within) > 10
    for number in (within[0], within[-1]):
        with pytest.raises(kind):
            load_mllm(deep, progress=Watch(number, kind))
    # What was stopped leaves nothing behind: the next time the same comes out.
    again = load_mllm(deep)
    assert all(torch.equal(one, two) for one, two in zip(mllm.model.parameters(), again.model.parameters(), strict=True))


def _each(monkeypatch):
    from tqdm import tqdm

    original = tqdm.__init__

    def each(self, *args, **kwargs):
        original(self, *args, **{**kwargs, "mininterval": 0, "miniters": 1})

    return each


def test_other_threads_keep_their_bars(deep):
    """The place where transformers lets one watch is the whole process's; other packs load models too."""
    if not by_weight():
        pytest.skip("needs transformers 5")
    from transformers.utils import logging

    seen = []

    def look(done, total, what):
        def other():
            seen.append(type(logging.tqdm(range(2), disable=True)).__name__)

        if not seen:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    before = logging.set_tqdm_hook(None)
    load_mllm(deep, progress=look)
    assert "Reported" not in seen[0]
    assert logging.set_tqdm_hook(before) is None


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_an_error_is_still_explained(mllm_folder, tmp_path, family):
    folder = tmp_path / "model"
    shutil.copytree(mllm_folder(family), folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DecafError, match="Download (it|the model) again"):
        load_mllm(folder, progress=Watch())
