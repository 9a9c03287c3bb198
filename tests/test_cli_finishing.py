"""--refine and --cut-out: the command's files hold what the library makes of the same tracks."""

import json

import numpy as np
import pytest
from short_runs import FRAMES, SIZE, masks, read
from sounding_clips import heard, times_of, write_clip

from decaf.command import main as cli
from decaf.finishing import read_with_alpha
from decaf.finishing.edges import feathered, grown


def test_masks_are_refined(line, tmp_path):
    assert cli.main(line("--score-threshold", "0")) == 0
    plain = masks(tmp_path / "out" / "masks")
    assert cli.main(line("--score-threshold", "0", "--resume", "--refine", "grow=3,feather=2", "--objects")) == 0
    result, refined = read(tmp_path / "out"), masks(tmp_path / "out" / "masks")
    assert result["attention_from_earlier_run"] and result["settings"]["refine"]["grow"] == 3
    assert np.any(plain) and len(np.unique(refined)) > 4
    for before, after in zip(plain, refined, strict=True):
        mask = grown(before > 0, 3)
        assert np.array_equal(after >= 128, mask)
        assert np.abs(after.astype(int) - feathered(mask, 2)).max() < 70, "the soft edge knows the contour more exactly than the mask does"
    assert len(result["tracks"]) == len(list((tmp_path / "out" / "objects").iterdir()))


@pytest.mark.parametrize("kind", ["mov", "webm", "png"])
def test_a_cut_out(line, tmp_path, kind):
    out = tmp_path / "out"
    clip = write_clip(tmp_path / "loud.mp4", 10, size=(96, 128))
    assert cli.main(line("--score-threshold", "0", "--cut-out", kind, "--refine", "feather=2", clip=clip)) == 0
    path = out / ("cut-out" if kind == "png" else f"cut-out.{kind}")
    pictures = [next(read_with_alpha(file)) for file in sorted(path.iterdir())] if kind == "png" else list(read_with_alpha(path))
    wanted = masks(out / "masks")
    assert len(pictures) == len(wanted) == 10
    for picture, mask in zip(pictures, wanted, strict=True):
        alpha = picture[..., 3].astype(int)
        if kind == "webm":  # VP9 loses a little, at the edges
            assert np.abs(alpha - mask).mean() < 3 and np.abs(alpha - mask).max() < 40
        else:
            assert np.abs(alpha - mask).max() <= (kind == "mov")
    if kind != "mov":
        return
    assert times_of(path)[0] == times_of(clip)[0] and np.array_equal(heard(path)[1], heard(clip)[1])
    changed = (out / "result.json").stat().st_mtime_ns
    assert cli.main(line("--score-threshold", "0", "--cut-out", kind, "--refine", "feather=2", "--resume", clip=clip)) == 0
    assert (out / "result.json").stat().st_mtime_ns == changed, "finished, and nothing to do"
    assert cli.main(line("--score-threshold", "0", clip=clip)) == 0
    assert not path.exists(), "what is in --out is of the last run"


def test_again_into_the_same_folder(line, tmp_path):
    for _ in range(2):
        assert cli.main(line("--cut-out", "png", "--no-overlay")) == 0
    assert len(list((tmp_path / "out" / "cut-out").iterdir())) == FRAMES
    first = next(read_with_alpha(tmp_path / "out" / "cut-out" / "00000.png"))
    assert first.shape == (*SIZE, 4)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["settings"]["cut_out"] == "png"


@pytest.mark.parametrize(
    ("refine", "told"),
    [
        ("grow", "--refine grow needs a whole number"),
        ("grow=1.5", "--refine grow=1.5 needs a whole number"),
        ("glow=2", "'glow'; known are border, holes"),
        ("grow=500", "'grow' is 500, which is not between -128 and 128"),
        ("feather=nan", "'feather' is nan"),
    ],
)
def test_what_cannot_be_refined(line, capsys, refine, told):
    assert cli.main(line("--refine", refine)) == 2
    assert told in capsys.readouterr().err


def test_a_folder_in_the_place_of_the_cut_out(line, tmp_path, capsys):
    (tmp_path / "out" / "cut-out.mov").mkdir(parents=True)
    assert cli.main(line("--cut-out", "mov")) == 2
    assert "has a folder cut-out.mov, where a file belongs" in capsys.readouterr().err
