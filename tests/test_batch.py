"""`decaf batch` with the bundled models: the masks are those of the library, and a run that ends early is gone on from."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from short_runs import masks
from small_batch import OPTIONS, results, write_clips, write_manifest

import decaf
from decaf import files
from decaf.attention.fusion import coarse_masks, frame_fusion, object_background_fusion
from decaf.bulk import Job, run_jobs
from decaf.bulk.clip_worker import Ask, ClipJob, ClipWorker
from decaf.command import main as cli
from decaf.demo import MLLM_FOLDER, SAM2_FILE
from decaf.errors import DecafError
from decaf.settings import AttentionSettings, PointSettings

SETTINGS, EVERY = AttentionSettings(tokens_per_frame=16), PointSettings(presence_threshold=0)


@pytest.fixture(scope="module")
def models():
    return decaf.load_mllm(MLLM_FOLDER, device="cpu"), decaf.load_sam2(SAM2_FILE, device="cpu")


def batch(manifest, out, *more):
    return cli.main(["batch", str(manifest), *OPTIONS, "--out", str(out), *more])


def report(out):
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(manifest, finished batch) of 3 clips with 2 queries each. Not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    manifest = write_manifest(folder, clips=3, queries=2)
    assert batch(manifest, folder / "out", "--quiet") == 0
    return manifest, folder / "out"


def test_masks_are_those_of_the_library(whole, models):
    manifest, out = whole
    for line in manifest.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        clip = decaf.open_clip(manifest.parent / row["clip"])
        other = [one for one in map(json.loads, manifest.read_text(encoding="utf-8").splitlines()) if one["clip"] == row["clip"]]
        asked = decaf.extract_attentions(models[0], clip, [one["query"] for one in other], SETTINGS)
        attention = asked[other.index(row)]
        expected = decaf.segment_attention(models[1], clip, attention, points=EVERY).tracks
        assert len(expected.tracks) > 0
        written = np.stack(masks(out / row["id"] / "masks"))
        assert np.array_equal(written, expected.union().numpy() * 255)
        result = json.loads((out / row["id"] / "result.json").read_text(encoding="utf-8"))
        assert result["presence"] == attention[0].presence
        assert result["frames_with_mask"] == sum(bool(mask.any()) for mask in written)


def test_the_report_and_a_second_run_that_has_nothing_to_do(whole, capsys, monkeypatch):
    manifest, out = whole
    before = results(out)
    told = report(out)
    assert (told["rows"], told["done"], told["failed"], told["left"]) == (6, 6, 0, 0)
    assert told["rows_a_minute"] > 0 and set(told["seconds_by_stage"]) >= {"open clip", "attention", "segmentation", "write"}
    monkeypatch.setattr("decaf.bulk.clip_worker.load_mllm", None)  # it must not be loaded
    assert batch(manifest, out) == 0
    assert "0 of 6 rows done. 6 were done earlier." in capsys.readouterr().out
    assert results(out) == before


def test_a_rerun_does_what_is_missing_or_has_changed_and_the_same_comes_out(whole, tmp_path, monkeypatch):
    manifest, out = whole
    other = tmp_path / "out"
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["clip"] = str(manifest.parent / row["clip"])
    fewer = tmp_path / "rows.jsonl"
    fewer.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert batch(fewer, other, "--quiet") == 0
    full = results(other)
    os.unlink(other / "records" / "c1-q0.json")  # as a kill leaves it
    (other / "c1-q0" / "masks" / ".00001.01234567.part.png").write_bytes(b"half")
    (other / "records" / ".c1-q0.01234567.part.json").write_bytes(b"half")
    os.unlink(other / "c1-q0" / "result.json")
    assert batch(fewer, other, "--quiet") == 0
    assert report(other)["done_earlier"] == 5
    assert results(other) == full
    rows[0]["query"] = "something else"
    fewer.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert batch(fewer, other, "--quiet") == 0
    assert report(other)["done_earlier"] == 5
    assert json.loads((other / rows[0]["id"] / "result.json").read_text(encoding="utf-8"))["query"] == "something else."


def test_other_settings_into_the_folder_are_refused(whole, capsys):
    manifest, out = whole
    assert batch(manifest, out, "--max-key-frames", "1") == 2
    assert "attention.max_key_frames was 16 and is 1" in capsys.readouterr().err


def test_rows_that_fail_are_told_and_leave_the_others_alone(tmp_path, capsys):
    asked = write_clips(tmp_path, 1)[0]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    manifest = tmp_path / "rows.csv"
    manifest.write_text(f"clip,query,id\nnone.mp4,a,gone\nbroken.mp4,a,broken\nclips/scene0,{asked[0]},good\n", encoding="utf-8")
    assert batch(manifest, tmp_path / "out") == 2
    told = report(tmp_path / "out")
    assert (told["done"], told["failed"], told["left"]) == (1, 2, 0)
    assert [(row["id"], row["line"]) for row in told["failed_rows"]] == [("gone", 2), ("broken", 3)]
    assert "does not exist" in told["failed_rows"][0]["error"]
    shown = capsys.readouterr()
    assert "Line 2, gone: " in shown.err and "Line 3, broken: " in shown.err and "2 failed" in shown.out
    # Put right, they alone are done.
    for name in ("none.mp4", "broken.mp4"):
        (tmp_path / name).unlink(missing_ok=True)
        os.symlink(tmp_path / "clips" / "scene0", tmp_path / name)
    assert batch(manifest, tmp_path / "out") == 0
    assert report(tmp_path / "out")["done_earlier"] == 1


@pytest.mark.slow
def test_settings_of_a_row_count_for_it_alone(tmp_path, models):
    asked = write_clips(tmp_path, 1, length=4)[0]
    manifest = tmp_path / "rows.csv"
    manifest.write_text(f"clip,query,id,first,last\nclips/scene0,{asked[0]},all,,\nclips/scene0,{asked[0]},part,1,2\n", encoding="utf-8")
    assert batch(manifest, tmp_path / "out", "--quiet") == 0
    clip = decaf.open_clip(tmp_path / "clips" / "scene0")
    for name, settings in (("all", {}), ("part", {"first_frame": 1, "last_frame": 2})):
        expected = decaf.segment_clip(*models, clip, asked[0], tokens_per_frame=16, presence_threshold=0, **settings).tracks.union()
        assert np.array_equal(np.stack(masks(tmp_path / "out" / name / "masks")) > 0, expected.numpy())


def test_coarse_masks_alone(tmp_path, models):
    asked = write_clips(tmp_path, 1, length=4)[0]
    manifest = tmp_path / "rows.csv"
    manifest.write_text(f'clip,query,id,key-frames\nclips/scene0,{asked[0]},a,"0,2"\n', encoding="utf-8")
    assert batch(manifest, tmp_path / "out", "--quiet", "--no-tracking") == 0
    clip = decaf.open_clip(tmp_path / "clips" / "scene0")
    attention = decaf.extract_attention(models[0], clip, asked[0], SETTINGS, key_frames=(0, 2))
    expected = coarse_masks(frame_fusion(object_background_fusion(*attention)))
    folder = tmp_path / "out" / "a" / "masks"
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00002.png"]
    assert np.array_equal(np.stack(masks(folder)) > 0, expected.numpy())


def test_more_output(tmp_path):
    asked = write_clips(tmp_path, 1)[0]
    manifest = tmp_path / "rows.csv"
    manifest.write_text(f"clip,query,id\nclips/scene0,{asked[0]},a\n", encoding="utf-8")
    more = ["--objects", "--sheet", "--overlay", "--cut-out", "png", "--refine", "grow=2", "--quiet"]
    assert batch(manifest, tmp_path / "out", *more) == 0
    names = {path.name for path in (tmp_path / "out" / "a").iterdir()}
    assert names >= {"masks", "objects", "attention.png", "overlay.mp4", "cut-out", "result.json"}


def test_dry_run_writes_nothing(tmp_path, capsys):
    write_clips(tmp_path, 1)
    manifest = tmp_path / "rows.csv"
    manifest.write_text("clip,query\nclips/scene0,a\nclips/scene0,b\n", encoding="utf-8")
    assert batch(manifest, tmp_path / "out", "--dry-run") == 0
    assert "2 rows about 1 clips; 0 are done, 2 are left. Every clip is there." in capsys.readouterr().out
    manifest.write_text("clip,query\nclips/scene0,a\nclips/scene1,b\n", encoding="utf-8")
    assert batch(manifest, tmp_path / "out", "--dry-run") == 2
    assert "scene1 does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--workers", "0"], "--workers 0 is below 1"),
        (["--gpus-per-worker", "-1"], "no share of a GPU"),
        (["--threads", "0"], "--threads 0 is below 1"),
        (["--score-threshold", "2"], "--score-threshold 2 is not between"),
        (["--start-layer", "99"], "start layer 99 is no layer"),
        (["--sam2", "none.pt"], "--sam2 none.pt does not exist"),
        (["--out", "clips/scene0"], "--out clips/scene0 is one of the clips"),
        (["--out", "rows.csv"], "--out rows.csv is a file"),
    ],
)
def test_options_that_cannot_be(tmp_path, monkeypatch, capsys, more, match):
    write_clips(tmp_path, 1)
    (tmp_path / "rows.csv").write_text("clip,query\nclips/scene0,a\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert batch("rows.csv", "out", *more) == 2
    assert match in capsys.readouterr().err


def test_a_full_disk_stops_the_batch_and_it_is_gone_on_from(whole, tmp_path, monkeypatch, capsys):
    manifest, out = whole
    replace = os.replace

    def no_space(source, target):
        if "c1-q0" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", no_space)
    assert batch(manifest, tmp_path / "out") == 2
    assert "The disk is full" in capsys.readouterr().err
    told = report(tmp_path / "out")
    assert (told["done"], told["left"]) == (2, 4) and "The disk is full" in told["notes"][-1]
    monkeypatch.setattr(files.os, "replace", replace)
    assert batch(manifest, tmp_path / "out", "--quiet") == 0
    assert results(tmp_path / "out") == results(out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_batch_that_is_stopped_is_gone_on_from(whole, tmp_path, number):
    manifest, out = whole
    command = [sys.executable, "-m", "decaf", "batch", str(manifest), *OPTIONS, "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list((tmp_path / "out" / "records").glob("*.json")):
            time.sleep(0.01)
        process.send_signal(number)
        begin = time.monotonic()
        _, told = process.communicate(timeout=120)
        spent = time.monotonic() - begin
    if process.returncode != 0:  # on a fast machine it may have been through
        assert process.returncode == (130 if number == signal.SIGINT else -number)
    if process.returncode == 130:
        assert "Run the same command again to go on in" in told and "Traceback" not in told
        assert spent < 30  # a second and less, but for a busy machine
        assert report(tmp_path / "out")["notes"][-1] == "Stopped by hand."
    assert batch(manifest, tmp_path / "out", "--quiet") == 0
    assert results(tmp_path / "out") == results(out)


def record(ask, clip, masked, report):
    return {
        "presence": masked.attention[0].presence,
        "mask": int(masked.tracks.union().sum()) if masked.tracks else int(masked.coarse.sum()),
    }


def job(folder, queries, **more):
    return Job("clip", ClipJob(folder, tuple(Ask(str(number), query) for number, query in enumerate(queries)), SETTINGS, EVERY, **more))


def test_queries_of_a_clip_share_its_passes_and_features(tmp_path, models):
    asked = write_clips(tmp_path, 1)[0]
    worker = ClipWorker(*models, record)
    one = worker(job(tmp_path / "clips" / "scene0", asked[:1]))
    three = worker(job(tmp_path / "clips" / "scene0", [asked[0], asked[1], asked[0]]))
    for name in ("frames_encoded_video", "frames_encoded_image", "visual_tokens_encoded", "visual_tokens_prefilled"):
        assert three["counts"][name] == one["counts"][name] > 0
    assert three["counts"]["sam2_key_encodings"] == one["counts"]["sam2_key_encodings"] == 2
    assert list(three["asks"]) == ["0", "1", "2"] and three["asks"]["0"] == three["asks"]["2"]


def test_what_is_left_comes_out_as_in_an_unbroken_run(tmp_path, models):
    asked = write_clips(tmp_path, 1)[0]
    worker = ClipWorker(*models, record)
    whole = worker(job(tmp_path / "clips" / "scene0", asked[:3]))["asks"]
    assert worker(job(tmp_path / "clips" / "scene0", asked[:3], left=("1",)))["asks"] == {"1": whole["1"]}


def test_a_query_that_fails_leaves_its_clip_s_others_alone(tmp_path, models):
    asked = write_clips(tmp_path, 1)[0]

    def picky(ask, clip, masked, report):
        if ask.key == "1":
            raise DecafError("Not this one.")
        if ask.key == "2":
            raise ZeroDivisionError
        return record(ask, clip, masked, report)

    found = ClipWorker(*models, picky)(job(tmp_path / "clips" / "scene0", [*asked[:3], "x" * 5000, ""]))["asks"]
    assert list(found) == ["0", "1", "2", "3", "4"]
    assert "error" not in found["0"]
    assert found["1"] == {"error": "Not this one."}
    assert "Unexpected ZeroDivisionError" in found["2"]["error"]
    assert "5,000 characters" in found["3"]["error"] and "is empty" in found["4"]["error"]


def test_a_clip_that_cannot_be_opened_fails_as_a_whole(tmp_path, models):
    with pytest.raises(DecafError, match="no file or folder"):
        ClipWorker(*models, record)(job(tmp_path / "none", ["a"]))


def test_a_picture_among_others_of_another_size(tmp_path, models):
    write_clips(tmp_path, 1)
    Image.new("RGB", (60, 60)).save(tmp_path / "clips" / "scene0" / "00009.png")
    with pytest.raises(DecafError, match="different sizes"):
        ClipWorker(*models, record)(job(tmp_path / "clips" / "scene0", ["a"]))


def test_the_next_clip_is_opened_while_one_is_at_work(tmp_path, models):
    asked = write_clips(tmp_path, 3)
    jobs = [replace(job(tmp_path / "clips" / f"scene{number}", asked[number][:1]), key=f"clip{number}") for number in range(3)]
    opened = []

    def note(ask, clip, masked, report):
        for opening in worker._coming.values():
            opening._thread.join(60)  # it ends though nobody has asked for the clip yet
            assert len(opening._opened) == 2
        opened.append([*worker._coming])
        return record(ask, clip, masked, report)

    worker = ClipWorker(*models, note)
    together = [one.record["asks"] for one in run_jobs(jobs, lambda: worker)]
    assert opened == [["clip1"], ["clip2"], []]
    assert together == [ClipWorker(*models, record)(one)["asks"] for one in jobs]


def test_a_clip_opened_ahead_that_is_damaged_or_not_wanted(tmp_path, models):
    asked = write_clips(tmp_path, 2)
    good, other = (job(tmp_path / "clips" / f"scene{number}", asked[number][:1]) for number in range(2))
    worker = ClipWorker(*models, record)
    worker.ahead(replace(job(tmp_path / "none", ["a"]), key="bad"))
    worker.ahead(replace(other, key="other"))
    assert worker(replace(good, key="good"))["asks"]
    assert [*worker._coming] == ["other"]
    worker.ahead(replace(job(tmp_path / "none", ["a"]), key="bad"))
    with pytest.raises(DecafError, match="no file or folder"):
        worker(replace(job(tmp_path / "none", ["a"]), key="bad"))
