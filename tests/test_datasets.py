"""Readers of the public benchmarks: their layouts with the variants that there are, and files that are missing, damaged or of another set."""

import json
import shutil

import made_datasets as made
import numpy as np
import pytest
from independent_scores import truths_of, unpacked
from PIL import Image

from decaf.command import main as cli
from decaf.errors import DecafError
from decaf.evaluation import run_lengths
from decaf.evaluation.datasets import READERS, part, read_dataset
from decaf.evaluation.truth import palette_indices

COPIES = {
    "ref-davis17": made.ref_davis17,
    "mevis": made.mevis,
    "revos": made.revos,
    "reasonvos": made.reasonvos,
    "ref-youtube-vos": made.ref_youtube_vos,
}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A copy of each benchmark; not to be written to."""
    base = tmp_path_factory.mktemp("copies")
    for name, write in COPIES.items():
        write(base / name)
    return base


def own_copy(copies, tmp_path, name):
    return shutil.copytree(copies / name, tmp_path / name)


def truth(item, length=made.LENGTH):
    frames, masks = item.truth.read(length, made.SIZE)
    return dict(zip([item.clip.names[index] for index in frames], masks.numpy(), strict=True))


def same(found, expected):
    assert {item.name for item in found} == set(expected)
    for item in found:
        frames = truth(item)
        assert frames.keys() == expected[item.name].keys()
        assert all((frames[name] == expected[item.name][name]).all() for name in frames), item.name


@pytest.mark.parametrize("name", [name for name in COPIES if name != "ref-youtube-vos"])
def test_the_truth_is_what_the_files_say(copies, name):
    found = read_dataset(name, copies / name)
    assert not found.problems and not found.hidden
    same(found.items, truths_of(name, copies / name))
    assert any(mask.any() for item in found.items for mask in truth(item).values())


def test_hidden_truth(copies):
    found = read_dataset("ref-youtube-vos", copies / "ref-youtube-vos")
    assert found.hidden and len(found.items) == 4 and all(item.truth is None for item in found.items)
    assert any("split test" in note for note in found.notes)
    assert found.submission(found.items[0], "00005") == f"Annotations/{found.items[0].name}/00005.png"


def test_groups(copies):
    davis = read_dataset("ref-davis17", copies / "ref-davis17")
    assert [item.tags[0][-1] for item in davis.items[:8]] == list("12341234")
    revos = read_dataset("revos", copies / "revos")
    assert [item.tags for item in revos.items[:4]] == [("referring",), ("reasoning",), ("referring",), ("hallucination",)]
    assert revos.averaged == ("referring", "reasoning")
    reason = read_dataset("reasonvos", copies / "reasonvos")
    assert {tag for item in reason.items for tag in item.tags} == {"from MeViS", "from BURST", "phrase", "sentence"}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("other", COPIES)
def test_a_root_of_another_set_is_told_by_its_name(copies, name, other):
    if name == other:
        assert read_dataset(name, copies / other).items
    else:
        with pytest.raises(DecafError, match=f"looks like {READERS[other].TITLE}: give --dataset {other}"):
            read_dataset(name, copies / other)


def test_variants_of_the_layouts(copies, tmp_path):
    made.ref_davis17(tmp_path / "raw", as_they_come=True)
    raw, converted = read_dataset("ref-davis17", tmp_path / "raw"), read_dataset("ref-davis17", copies / "ref-davis17")
    assert [(item.name, item.query, item.tags) for item in raw.items] == [(item.name, item.query, item.tags) for item in converted.items]
    same(raw.items, truths_of("ref-davis17", copies / "ref-davis17"))

    made.mevis(tmp_path / "nested", nested_meta=True, encode=made.plain_runs)
    same(read_dataset("mevis", tmp_path / "nested").items, truths_of("mevis", copies / "mevis"))
    # The folder of a split by itself, and a folder around everything.
    same(read_dataset("mevis", copies / "mevis" / "valid_u").items, truths_of("mevis", copies / "mevis"))
    same(read_dataset("revos", own_copy(copies, tmp_path / "around", "revos").parent).items, truths_of("revos", copies / "revos"))

    flat = own_copy(copies, tmp_path, "revos")
    for folder in list((flat / "JPEGImages").iterdir()):
        folder.rename(flat / folder.name)
    (flat / "JPEGImages").rmdir()
    (flat / "meta_expressions_valid_.json").rename(flat / "meta_expressions_valid.json")
    same(read_dataset("revos", flat).items, truths_of("revos", copies / "revos"))

    made.ref_youtube_vos_train(tmp_path / "ytvos")
    train = read_dataset("ref-youtube-vos", tmp_path / "ytvos", "train")
    scene = made.scene(10)
    assert not train.hidden and (truth(train.items[1])["00005"] == scene.masks[1, 1]).all()


def test_numbers_of_any_form(copies, tmp_path):
    """Ids as numbers, texts or lists; frames as numbers, or with an ending; pictures as PNG."""
    root = own_copy(copies, tmp_path, "mevis")
    path = root / "valid_u/meta_expressions.json"
    meta = json.loads(path.read_text())
    for video, one in meta["videos"].items():
        first, second = one["expressions"]["0"], one["expressions"]["1"]
        first["anno_id"], second["anno_id"] = str(first["anno_id"][0]), [str(one) for one in second["anno_id"]]
        one["frames"] = [int(name) if video.endswith("46") else f"{name}.png" for name in one["frames"]]
        for file in list((root / "valid_u/JPEGImages" / video).iterdir()):
            Image.open(file).save(file.with_suffix(".png"))
            file.unlink()
    path.write_text(json.dumps(meta))
    found = read_dataset("mevis", root)
    assert not found.problems
    same(found.items, truths_of("mevis", copies / "mevis"))


def test_coloured_masks_and_void(tmp_path):
    numbers = np.array([[0, 1, 2, 3], [7, 8, 38, 255]], np.uint8)
    image = Image.fromarray(numbers, "P")
    image.putpalette(made.voc_palette())
    image.convert("RGB").save(tmp_path / "colours.png")
    assert (palette_indices(tmp_path / "colours.png") == numbers).all()


def test_run_lengths_of_both_kinds():
    random = np.random.default_rng(0)
    for shape in ((1, 1), (3, 5), (40, 7), (64, 64)):
        for share in (0, 0.05, 0.5, 1):
            mask = random.random(shape) < share
            for stored in (made.packed(mask), made.plain_runs(mask)):
                assert (run_lengths.decode(stored) == mask).all() and (unpacked(stored) == mask).all()
    long = np.zeros((700, 900), bool)
    long[300:, 500:] = True
    assert (run_lengths.decode(made.packed(long)) == long).all()
    assert (run_lengths.decode([made.packed(long), made.packed(~long)])).all()


@pytest.mark.parametrize(
    "stored, says",
    [
        ({"size": [3, 5], "counts": [0, 4]}, "cover 4 of 15"),
        ({"size": [3, 5], "counts": [20, -5]}, "damaged"),
        ({"size": [3, 5], "counts": "o"}, "cut off"),
        ({"size": [3, 5], "counts": "\x7f\x7f"}, "letters"),
        ({"size": [3], "counts": [15]}, "not written as"),
        ({"size": [3, 5]}, "not written as"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, "not written as"),
        ([[1, 2]], "not written as"),
    ],
)
def test_damaged_run_lengths(stored, says):
    with pytest.raises(DecafError, match=says):
        run_lengths.decode(stored)


def damaged(copies, tmp_path):
    """A copy of MeViS with something wrong in one clip: a name -> how it is told."""
    root = own_copy(copies, tmp_path, "mevis") / "valid_u"
    return root, root / "JPEGImages/0fea0cb75a25", root / "meta_expressions.json", root / "mask_dict.json"


def problems(root, capsys):
    """What --dry-run says, and that it is not well."""
    assert cli.main(["evaluate", "--dataset", "mevis", "--root", str(root), "--dry-run"]) == 2
    return capsys.readouterr().out


def test_frames_missing_in_the_middle(copies, tmp_path, capsys):
    root, frames, *_ = damaged(copies, tmp_path)
    (frames / "00001.jpg").unlink()
    told = problems(root, capsys)
    assert told.count("1 of its 3 frames are missing") == 2 and "00001" in told and "0ab4afe7fb46/0:" not in told
    assert "2 queries cannot be asked or scored, and count as 0" in told


def test_half_unpacked(copies, tmp_path, capsys):
    root, frames, *_ = damaged(copies, tmp_path)
    shutil.rmtree(frames)
    assert problems(root, capsys).count("There is no folder 0fea0cb75a25") == 2
    (root / "mask_dict.json").write_text((copies / "mevis/valid_u/mask_dict.json").read_text()[:-40])
    assert cli.main(["evaluate", "--dataset", "mevis", "--root", str(root), "--dry-run"]) == 2
    assert "mask_dict.json is not whole JSON" in capsys.readouterr().err


def test_damaged_and_other_sized_pictures(copies, tmp_path, capsys):
    root, frames, *_ = damaged(copies, tmp_path)
    (frames / "00002.jpg").write_bytes(b"")
    assert "empty files: 00002.jpg" in problems(root, capsys)
    (frames / "00002.jpg").write_bytes(b"no picture")
    assert "cannot be read" in problems(root, capsys)
    Image.new("RGB", (20, 20)).save(frames / "00002.jpg")
    assert "different sizes: 00000.jpg is 112x84, 00002.jpg 20x20" in problems(root, capsys)


def test_masks_that_do_not_fit(copies, tmp_path, capsys):
    root, _, _, path = damaged(copies, tmp_path)
    masks = json.loads(path.read_text())
    first, second = list(masks)[:2]
    del masks[second]
    masks[first][1] = made.packed(np.ones((8, 9), bool))
    path.write_text(json.dumps(masks))
    told = problems(root, capsys)
    assert "0ab4afe7fb46/0: The true mask of frame 1 has 9x8 pixels, the clip's frames 112x84" in told
    assert f"0ab4afe7fb46/1: mask_dict.json has no {second}" in told


def test_odd_expressions(copies, tmp_path, capsys):
    """Ids twice, no sentence, no object, and names that lead out of the folder."""
    root, _, path, _ = damaged(copies, tmp_path)
    meta = json.loads(path.read_text())
    video = meta["videos"]["0ab4afe7fb46"]
    video["expressions"]["2"] = {"exp": "  ", "anno_id": [0]}
    video["expressions"]["3"] = {"exp": "nothing at all", "anno_id": []}
    video["expressions"]["../4"] = {"exp": "the thing", "anno_id": [0]}
    meta["videos"]["../../secret"] = {"expressions": {"0": {"exp": "the thing", "anno_id": [0]}}, "frames": ["00000"]}
    text = json.dumps(meta).replace('"3": {', '"0": {"exp": "the last one", "anno_id": [1]}, "3": {', 1)
    path.write_text(text)
    told = problems(root, capsys)
    assert "has 0 twice" in told and "0ab4afe7fb46/2: It has no sentence." in told
    assert "Its id is no name of a folder" in told and "Its name is no path in the dataset" in told
    found = {item.name: item for item in read_dataset("mevis", root).items}
    assert found["0ab4afe7fb46/0"].query == "the last one"
    assert found["0ab4afe7fb46/3"].tags == ("no target",) and not any(mask.any() for mask in truth(found["0ab4afe7fb46/3"]).values())


def test_a_pickle_is_not_read(copies, tmp_path):
    root = own_copy(copies, tmp_path, "ref-davis17")
    shutil.rmtree(root / "valid/Annotations")
    (root / "valid/mask_dict.pkl").write_bytes(b"cos\nsystem\n")
    found = read_dataset("ref-davis17", root)
    assert len(found.problems) == len(found.items) and any("pickle" in note for note in found.notes)


def test_nothing_there(tmp_path, capsys):
    for root, says in ((tmp_path / "none", "does not exist"), (tmp_path, "docs/evaluation.md says what has to be in it")):
        assert cli.main(["evaluate", "--dataset", "revos", "--root", str(root), "--dry-run"]) == 2
        assert says in capsys.readouterr().err


def test_parts_are_whole_clips_and_together_everything(copies):
    items = read_dataset("ref-davis17", copies / "ref-davis17").items
    parts = [part(items, None, (number, 2)) for number in range(2)]
    assert sorted(item.name for one in parts for item in one) == sorted(item.name for item in items)
    assert [len({item.video for item in one}) for one in parts] == [1, 1]
    assert [item.name for item in part(items, 3, (1, 2))] == [item.name for item in parts[1][:3]]
