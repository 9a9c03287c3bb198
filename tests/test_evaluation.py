"""`decaf evaluate` on copies of the benchmarks: its figures are those that another computation gives from the masks that it has written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import independent_scores as independent
import made_datasets as made
import numpy as np
import pytest
from PIL import Image

import decaf
from decaf.command import main as cli
from decaf.demo import MLLM_FOLDER, SAM2_FILE
from decaf.evaluation.evaluate import evaluate as evaluate_scenes
from decaf.folder_lock import FolderLocks
from decaf.mllm import load_mllm
from decaf.sam2 import load_sam2

FAST = ["--mllm", "bundled", "--sam2", "bundled", "--device", "cpu", "--tokens-per-frame", "49", "--detail", "fast", "--quiet"]


def command(dataset, root, out, *options):
    return ["evaluate", "--dataset", dataset, "--root", str(root), "--out", str(out), *FAST, *options]


def results(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(root, folder of results) of each set, asked in this process; not to be written to."""
    base = tmp_path_factory.mktemp("runs")
    made.ref_davis17(base / "ref-davis17", ("blackswan",), objects=2)
    made.mevis(base / "mevis", no_target=True)
    made.revos(base / "revos")
    made.reasonvos(base / "reasonvos", ("0000f77c",))
    made.ref_youtube_vos(base / "ref-youtube-vos", ("003234408d",))
    found = {}
    for root in sorted(base.iterdir()):
        out = base / f"{root.name} results"
        assert cli.main(command(root.name, root, out)) == 0
        found[root.name] = root, out
    return found


def scored(name, root, out):
    """Per item (J, F), and the same of the coarse masks, from the files."""
    truths = independent.truths_of(name, root)
    return (
        {item: independent.of_clip(out / "masks" / item, frames) for item, frames in truths.items()},
        {item: independent.of_clip(out / "coarse" / item, frames) for item, frames in truths.items()},
        truths,
    )


def mean(values):
    return float(np.mean(list(values), axis=0)) if np.ndim(next(iter(values))) == 0 else tuple(np.mean(list(values), axis=0))


@pytest.mark.parametrize("name", ["ref-davis17", "mevis", "revos", "reasonvos"])
def test_figures_are_those_of_the_written_masks(runs, name):
    root, out = runs[name]
    found, (tracked, coarse, truths) = results(out), scored(name, root, out)
    assert {item["name"] for item in found["items"]} == set(truths) and not found["missing"] and found["not_asked"] == 0
    for item in found["items"]:
        assert (item["j"], item["f"]) == pytest.approx(tracked[item["name"]], abs=1e-9)
        assert (item["coarse"]["j"], item["coarse"]["f"]) == pytest.approx(coarse[item["name"]], abs=1e-9)
    groups = {"overall": [*truths]}
    for item in found["items"]:
        for tag in item["tags"]:
            groups.setdefault(tag, []).append(item["name"])
    expected = {group: mean([tracked[item] for item in items]) for group, items in groups.items()}
    expected_coarse = {group: mean([coarse[item] for item in items]) for group, items in groups.items()}
    averaged = {"ref-davis17": [f"annotator {n}" for n in range(1, 5)], "revos": ["referring", "reasoning"]}.get(name)
    if averaged:
        expected["overall"], expected_coarse["overall"] = (mean([one[group] for group in averaged]) for one in (expected, expected_coarse))
    assert set(found["figures"]) == set(groups)
    for group, figures in found["figures"].items():
        assert (figures["j"], figures["f"]) == pytest.approx(expected[group], abs=1e-9)
        assert figures["jf"] == pytest.approx(sum(expected[group]) / 2, abs=1e-9)
        assert figures["coarse_jf"] == pytest.approx(sum(expected_coarse[group]) / 2, abs=1e-9)
    assert found["figures"]["overall"]["jf"] > 0.3, "the bundled models find something, or nothing would be compared"


def test_robustness_and_what_is_not_there(runs):
    root, out = runs["revos"]
    found, truths = results(out), independent.truths_of("revos", root)
    behind = json.loads((root / "mask_dict_foreground.json").read_text())
    r = {}
    for item in found["items"]:
        video = item["name"].rpartition("/")[0]
        masks = {name: independent.unpacked(one) for name, one in zip(truths[item["name"]], behind[video]["masks_rle"], strict=True)}
        r[item["name"]] = independent.robustness(out / "masks" / item["name"], truths[item["name"]], masks)
        assert item["r"] == pytest.approx(r[item["name"]], abs=1e-9)
    of = {group: mean([r[item["name"]] for item in found["items"] if group in item["tags"]]) for group in ("referring", "reasoning")}
    assert found["figures"]["overall"]["r"] == pytest.approx((of["referring"] + of["reasoning"]) / 2, abs=1e-9)

    root, out = runs["mevis"]
    found = results(out)
    masked = {item["name"]: any(independent.picture(file).any() for file in (out / "masks" / item["name"]).iterdir()) for item in found["items"]}
    without = [item["name"] for item in found["items"] if "no target" in item["tags"]]
    assert len(without) == 2
    assert found["figures"]["overall"]["n_acc"] == np.mean([not masked[name] for name in without])
    assert found["figures"]["overall"]["t_acc"] == np.mean([masked[name] for name in masked if name not in without])


def test_the_table_has_the_papers_figures_beside_ours(runs):
    text = (runs["revos"][1] / "results.md").read_text()
    assert "| overall |" in text and "| 54.2 |" in text and "| 58.7 |" in text and "| 49.7 |" in text and "Qwen2.5-VL-7B" in text
    assert "75.2" in (runs["ref-davis17"][1] / "results.md").read_text() and "25.3" in (runs["ref-davis17"][1] / "results.md").read_text()


def test_the_file_for_a_server(runs):
    root, out = runs["ref-youtube-vos"]
    assert not results(out)["figures"] and "not public" in (out / "results.md").read_text()
    with zipfile.ZipFile(out / "submission.zip") as archive:
        names = sorted(archive.namelist())
        assert names == sorted(f"Annotations/003234408d/{number}/{name}.png" for number in "01" for name in made.frame_names(made.LENGTH, step=5))
        for name in names:
            assert archive.read(name) == (out / "masks" / name.removeprefix("Annotations/")).read_bytes()
            with archive.open(name) as file:
                picture = Image.open(file)
                assert picture.mode == "L" and picture.size == made.SIZE[::-1] and {*picture.tobytes()} <= {0, 255}
    assert not (runs["revos"][1] / "submission.zip").exists()


def masks_of(out):
    return {file.relative_to(out).as_posix(): file.read_bytes() for folder in ("masks", "coarse") for file in sorted((out / folder).rglob("*.png"))}


def same_results(one, other):
    first, second = results(one), results(other)
    assert first["figures"] == second["figures"] and first["items"] == second["items"] and first["missing"] == second["missing"]
    assert masks_of(one) == masks_of(other) and len(masks_of(one)) > 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install comfyui-decaf[cluster]")
def test_two_workers_give_the_same(runs, tmp_path):
    root, out = runs["mevis"]
    assert cli.main(command("mevis", root, tmp_path / "out", "--workers", "2", "--gpus-per-worker", "0", "--threads", "1")) == 0
    same_results(out, tmp_path / "out")


def test_without_ray_one_process_does_it_and_says_so(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("decaf.bulk.run.is_installed", lambda: False)
    root, out = runs["mevis"]
    assert cli.main(command("mevis", root, tmp_path / "out", "--workers", "2", "--limit", "1")) == 0
    assert "Ray is not installed" in capsys.readouterr().err and len(results(tmp_path / "out")["items"]) == 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_and_gone_on(runs, tmp_path):
    """The killed run leaves one clip's record, and half of another's masks behind."""
    root, out = runs["revos"]
    own = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-m", "decaf", *command("revos", root, own)], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 240
    while not list((own / "records").glob("0*.json")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    assert child.wait() == -signal.SIGKILL, "it was killed in the middle"
    assert len(list((own / "records").glob("0*.json"))) == 1 and not (own / "results.json").exists()
    left = next((own / "records").glob("0*.json"))
    before = left.stat().st_mtime_ns
    assert cli.main(command("revos", root, own)) == 2, "without --resume it is not taken up"
    assert cli.main(command("revos", root, own, "--resume")) == 0
    assert left.stat().st_mtime_ns == before, "what was done is not done again"
    same_results(out, own)


def test_shards_and_limits_together_are_the_whole(runs, tmp_path, capsys):
    root, out = runs["revos"]
    for number in range(2):
        assert cli.main(command("revos", root, tmp_path / str(number), "--shard", f"{number}/2")) == 0
    assert results(tmp_path / "0")["not_asked"] == 4 and "4 items of the set are not in these figures" in (tmp_path / "0/results.md").read_text()
    merged = ["evaluate", "--dataset", "revos", "--root", str(root), "--out", str(tmp_path / "all"), "--quiet", "--merge", str(tmp_path / "0")]
    assert cli.main([*merged, str(tmp_path / "1")]) == 0
    same_results(out, tmp_path / "all")
    assert cli.main(command("revos", root, tmp_path / "0", "--resume")) == 0
    same_results(out, tmp_path / "0")
    assert cli.main(["evaluate", "--dataset", "mevis", "--root", str(runs["mevis"][0]), "--out", str(tmp_path / "x"), "--merge", str(out)]) == 2
    assert "of another set" in capsys.readouterr().err


def test_other_settings_do_not_mix(runs, tmp_path, capsys):
    root, out = runs["mevis"]
    own = shutil.copytree(out, tmp_path / "out")
    assert cli.main(command("mevis", root, own, "--resume", "--no-contrast")) == 2
    assert "other settings: fusion.contrast was true and is false" in capsys.readouterr().err
    with FolderLocks() as locks:
        locks.take(own)
        assert cli.main(command("mevis", root, own, "--resume")) == 2
    assert "Another run is writing" in capsys.readouterr().err
    assert cli.main(command("mevis", root, root / "out")) == 2
    assert "lies in --root" in capsys.readouterr().err


def test_what_is_damaged_is_listed_and_counted(runs, tmp_path, capsys):
    """MeViS counts it as 0, ReasonVOS leaves it out; neither stops."""
    root = shutil.copytree(runs["mevis"][0], tmp_path / "mevis")
    out = shutil.copytree(runs["mevis"][1], tmp_path / "out")
    (root / "valid_u/JPEGImages/0fea0cb75a25/00001.jpg").write_bytes(b"\xff\xd8 cut off")
    for record in (out / "records").glob("00001*"):
        record.unlink()
    whole = results(out)
    assert cli.main(command("mevis", root, out, "--resume")) == 0
    found, told = results(out), capsys.readouterr().err
    assert len(found["missing"]) == 3 and "0fea0cb75a25/0" in told and "count as 0" in told and "00001.jpg" in told
    kept = [item["j"] for item in whole["items"] if not item["name"].startswith("0fea")]
    assert found["figures"]["overall"]["j"] == pytest.approx(sum(kept) / 6, abs=1e-9) and found["figures"]["overall"]["missing"] == 3

    root = shutil.copytree(runs["reasonvos"][0], tmp_path / "reasonvos")
    out = shutil.copytree(runs["reasonvos"][1], tmp_path / "reason out")
    whole = results(out)
    shutil.rmtree(next((root / "Annotations").glob("*_1")))
    record = next((out / "records").glob("*.json"))
    asks = json.loads(record.read_text())
    gone = [item["name"] for item in whole["items"] if "no" not in item["name"]][2:]
    asks["asks"] = {key: one for key, one in asks["asks"].items() if whole["items"][int(key)]["name"] not in gone}
    record.write_text(json.dumps(asks))
    assert cli.main(command("reasonvos", root, out, "--resume")) == 0
    found = results(out)
    assert {item["name"] for item in found["missing"]} == set(gone) and "are left out" in capsys.readouterr().err
    left = [item["j"] for item in whole["items"] if item["name"] not in gone]
    assert found["figures"]["overall"]["j"] == pytest.approx(np.mean(left), abs=1e-9)


def test_nothing_to_ask(runs, tmp_path, capsys):
    root = shutil.copytree(runs["mevis"][0], tmp_path / "mevis")
    shutil.rmtree(root / "valid_u/JPEGImages")
    assert cli.main(command("mevis", root, tmp_path / "out")) == 2
    assert "None of the 6 queries can be asked. 0ab4afe7fb46/0: There is no folder" in capsys.readouterr().err


def test_a_full_disk(runs, tmp_path, capsys, monkeypatch):
    def full(self, *arguments, **options):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        assert cli.main(command("mevis", runs["mevis"][0], tmp_path / "out")) == 2
    assert "The disk is full" in capsys.readouterr().err and not list((tmp_path / "out/records").glob("0*"))
    assert cli.main(command("mevis", runs["mevis"][0], tmp_path / "out", "--resume", "--limit", "2")) == 0
    assert len(results(tmp_path / "out")["items"]) == 2


@pytest.mark.parametrize(
    "options, says",
    [
        (["--dataset", "mevis"], "--root is missing"),
        (["--dataset", "scenes", "--root", "x"], "--root has no meaning"),
        (["--dataset", "scenes"], "--out is missing"),
        (["--dataset", "scenes", "--clips", "0"], "--clips 0"),
        (["--dataset", "mevis", "--root", "x", "--limit", "0"], "--limit 0"),
        (["--dataset", "mevis", "--root", "x", "--out", "y"], "--mllm is missing"),
        (["--dataset", "mevis", "--root", "x", "--out", "y", "--mllm", "bundled"], "--sam2 is missing"),
        (["--dataset", "scenes", "--out", "y", "--as-published", "--questions", "x"], "questions of their own"),
    ],
)
def test_options_that_cannot_be(options, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b"])
def test_parts_that_cannot_be(shard, capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--dataset", "scenes", "--out", "x", "--shard", shard])
    assert "such as 0/4" in capsys.readouterr().err


@pytest.fixture(scope="module")
def models():
    return load_mllm(MLLM_FOLDER), load_sam2(SAM2_FILE)


def test_made_up_scenes_have_the_figures_of_the_demo(models, tmp_path, capsys):
    options = ["evaluate", "--dataset", "scenes", "--clips", "1", "--seed", "5", "--frames", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.main(options) == 0
    output = capsys.readouterr().out
    demo = evaluate_scenes(*models, 1, 5, settings=("expression",), length=2)
    found = results(tmp_path / "out")
    for row, item in zip(demo["queries"], found["items"], strict=True):
        assert (row["query"], row["j"], row["f"], row["presence"]) == (item["query"], item["j"], item["f"], item["presence"])
        assert row["published"] == item["published"]
    for kind, table in demo["settings"]["expression"].items():
        if kind in found["figures"]:
            assert table["jf"] == pytest.approx(found["figures"][kind]["jf"], abs=1e-4)
    for name, value in demo["summary"].items():
        assert f"{name}: {'-' if value is None else value}" in output


def test_ablations_reach_the_run(tmp_path):
    out = tmp_path / "out"
    options = ["--no-contrast", "--maps", "frames", "--no-v-max", "--no-consistency", "--as-published", "--start-layer", "1", "--no-tracking"]
    small = ["evaluate", "--dataset", "scenes", "--clips", "1", "--frames", "2", "--device", "cpu", "--out", str(out), "--quiet", "--limit", "1"]
    assert cli.main([*small, *options, "--point-threshold", "0.9", "--score-threshold", "0.7"]) == 0
    settings = json.loads((out / "run.json").read_text())
    assert settings["fusion"] == {"contrast": False, "maps": "frames"} and settings["sam2"] is None
    assert (settings["attention"]["v_max"], settings["attention"]["start_layer"], settings["attention"]["setting"]) == (False, 1, "class name")
    assert settings["tracking"]["consistency"] is False and settings["tracking"]["method"] == "as published"
    assert (settings["points"]["point_threshold"], settings["points"]["presence_threshold"], settings["tracking"]["score_threshold"]) == (0.9, 0, 0.7)
    assert "main object" in settings["templates"]["object"] and "{object}" in settings["templates"]["class_background"]
    figures = results(out)["figures"]["overall"]
    assert figures["jf"] is None and figures["coarse_jf"] > 0 and not (out / "masks").exists()


def test_anyones_own_set(models, tmp_path):
    """Arrays and folders, with and without truth; a sample that fails is told and left out."""
    scene = made.scene(3)
    folder = tmp_path / "clip"
    made.write_frames(folder, scene.frames, ["a1", "a2", "a10"], ".png")
    for name, mask in (("a1", scene.masks[0, 0]), ("a10", scene.masks[0, 2])):
        (tmp_path / "truth").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "truth" / f"{name}.png")
    query = made.sentence(scene, 0)
    samples = [
        decaf.Sample(scene.frames, query, truth=scene.masks[0], tags=["held", "first"], name="held"),
        decaf.Sample(folder, f"note: {query}", truth=tmp_path / "truth", tags="files"),
        decaf.Sample(str(folder), "anything"),
        decaf.Sample(folder, query, truth=scene.masks[0][:2]),
    ]
    found = decaf.evaluate(samples, *models, out=tmp_path / "out", tokens_per_frame=49, detail="fast")
    assert [row.name for row in found.rows] == ["00000/held", "00001-clip/1", "00001-clip/2", "00001-clip/3"]
    assert set(found.figures) == {"overall", "held", "first", "files"} and found.figures["overall"]["missing"] == 1
    j, f = independent.of_clip(tmp_path / "out/masks/00000/held", {f"0000{n}": mask for n, mask in enumerate(scene.masks[0])})
    assert (found.figures["held"]["j"], found.figures["held"]["f"]) == pytest.approx((j, f), abs=1e-9)
    j, f = independent.of_clip(tmp_path / "out/masks/00001-clip/1", {"a1": scene.masks[0, 0], "a10": scene.masks[0, 2]})
    assert (found.figures["files"]["j"], found.figures["files"]["f"]) == pytest.approx((j, f), abs=1e-9)
    assert len(list((tmp_path / "out/masks/00001-clip/2").iterdir())) == 3
    assert "shape (2, 84, 112)" in found.table() and "count as 0" not in found.table()
    assert found.rows[1].query.startswith("note: ")

    with pytest.raises(decaf.DecafError, match="no samples"):
        decaf.evaluate([], *models)
    with pytest.raises(decaf.DecafError, match='called "00000-clip/a"'):
        decaf.evaluate([decaf.Sample(folder, "x", name="a"), decaf.Sample(folder, "y", name="a")], *models)
    with pytest.raises(decaf.DecafError, match="Workers load models themselves"):
        decaf.evaluate(samples, *models, workers=2)


def test_the_example_of_the_documentation(tmp_path, monkeypatch, capsys):
    scene = made.scene(3)
    made.write_frames(tmp_path / "clips/kitchen", scene.frames[:2], ["00000", "00001"], ".png")
    for name, masks in (("kitchen", scene.masks[0]), ("kitchen-person", scene.masks[1])):
        made.write_palette(tmp_path / "masks" / name, masks[None, :2], ["00000", "00001"])
    decaf.clips.write_video(tmp_path / "clips/street.mp4", iter(decaf.clips.open_clip(tmp_path / "clips/kitchen")), 24, made.SIZE)
    page = (Path(__file__).parents[1] / "docs/developers.md").read_text(encoding="utf-8")
    example = re.search(r"## Anyone's own set.*?```python\n(.*?)```", page, re.S)[1]
    assert len(example.strip().splitlines()) <= 11
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/developers.md", "exec"), {})
    assert "motion" in capsys.readouterr().out and (tmp_path / "figures/results.json").is_file()
