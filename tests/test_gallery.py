"""`decaf gallery`: the page tells what a run of the library finds, and lists that cannot be used are refused before a model is loaded."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image, ImageSequence

import decaf
from decaf.clips import clip_from_images
from decaf.command import main as cli
from decaf.command.gallery_entries import MADE_UP, read_list
from decaf.demo import MLLM_FOLDER, SAM2_FILE
from decaf.demo.scenes import make_scene
from decaf.errors import DecafError

FRAMES = 5


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    scene = make_scene(101, length=FRAMES, count=(3, 3), lively=False)
    (folder / "shapes").mkdir()
    for index, frame in enumerate(scene.frames):
        Image.fromarray(frame).save(folder / "shapes" / f"{index}.png")
    return folder, scene


def write_list(folder, rows):
    path = folder / "clips.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return path


def test_the_page_tells_what_the_library_finds(clip, tmp_path):
    folder, scene = clip
    query = next(one for one in scene.queries if one.kind == "colour").text
    rows = [
        {"clip": "shapes", "query": query, "effect": "cut out", "title": "One | of them"},
        {"clip": "shapes", "query": "the purple star"},
    ]
    out = tmp_path / "page"
    assert cli.main(["gallery", "--clips", str(write_list(folder, rows)), "--out", str(out), "--device", "cpu", "--quiet"]) == 0

    mllm, sam2 = decaf.load_mllm(MLLM_FOLDER), decaf.load_sam2(SAM2_FILE)
    tracks = decaf.segment_clip(mllm, sam2, clip_from_images(torch.from_numpy(scene.frames)), query).tracks
    page = (out / "README.md").read_text(encoding="utf-8")
    first, second = page.split("## ")[1:]
    assert f"| found | {len(tracks.tracks)} object" in first and f"| query | {query} |" in first and "J&F" not in page
    assert "is not in this clip" in second and "| found | 0 objects |" in second
    assert str(tmp_path) not in page, "a page that is shared names no folder of the machine"
    picture = Image.open(out / "01-one-of-them.webp")
    shown = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
    assert len(shown) == FRAMES
    # The third panel: the checkerboard is grey wherever nothing is masked, and a masked object keeps its colour.
    panel = torch.frombuffer(bytearray(shown[0].crop((632, 56, 936, 289)).tobytes()), dtype=torch.uint8).view(233, 304, 3).int()
    coloured = (panel.amax(-1) - panel.amin(-1) > 60).float().mean()
    assert abs(coloured - tracks.union()[0].float().mean()) < 0.05


def test_made_up_entries_are_clips_that_hold_what_is_asked_for():
    for entry in MADE_UP:
        known = {one.text: one.targets for one in make_scene(entry.seed, length=entry.frames).queries}
        assert known.get(entry.query, ()) or entry.title == "Nothing to be found", entry


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([], "no list of entries"),
        ({"clip": "shapes"}, "no list of entries"),
        (["shapes"], "entry 1, is no object of texts"),
        ([{"clip": "shapes", "query": 3}], "entry 1, is no object of texts"),
        ([{"clip": "shapes"}], "has no query"),
        ([{"clip": "shapes", "query": "  "}], "has no query"),
        ([{"clip": "shapes", "query": "it", "colour": "red"}], "has 'colour'"),
        ([{"clip": "shapes", "query": "it", "effect": "sparkle"}], "has the effect 'sparkle'"),
        ([{"clip": "gone.mp4", "query": "it"}], "gone.mp4, which does not exist"),
        ([{"clip": "shapes", "query": "it", "background": "gone.png"}], "gone.png, which does not exist"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(clip, rows, told):
    with pytest.raises(DecafError, match=told):
        read_list(write_list(clip[0], rows))


def test_a_list_that_is_not_there_is_told_by_the_command(tmp_path, capsys):
    assert cli.main(["gallery", "--clips", str(tmp_path / "no.json"), "--out", str(tmp_path / "out")]) == 2
    assert "is no file" in capsys.readouterr().err
