"""The command, end to end with tiny models: what it writes, what it counts, and how it is stopped and taken up again."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import FRAMES, KEYS, SIZE, Meter, check_whole, masks, picture, read

from decaf.clips import open_clip
from decaf.command import main as cli
from decaf.command import segment as command
from decaf.command.memory_log import resident_bytes
from decaf.folder_lock import NAME as LOCK


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "qwen3_vl"])  # each by its way of pictures; tests/test_mllm.py has all
def test_everything_is_written_and_counted(line, family, tmp_path, monkeypatch, capsys):
    meter = Meter(monkeypatch)
    assert cli.main(line("--objects", family=family)) == 0
    folder = tmp_path / "out"
    result = read(folder)

    found = masks(folder / "masks")
    assert len(found) == FRAMES
    assert all(mask.shape == SIZE and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255} for mask in found)
    assert result["frames_with_mask"] == sum(bool(mask.any()) for mask in found)

    assert len(result["tracks"]) >= 1
    objects = [masks(folder / "objects" / str(track["id"])) for track in result["tracks"]]
    assert all(np.array_equal(np.maximum.reduce(one), union) for *one, union in zip(*objects, found, strict=True))
    for track, own in zip(result["tracks"], objects, strict=True):
        assert track["score"] == pytest.approx((track["predicted_iou"] + track["attention"] + track["consistency"]) / 3)
        assert track["frames"] == sum(bool(mask.any()) for mask in own)
        assert track["area"] == pytest.approx(np.mean([mask > 0 for mask in own]))

    overlay = open_clip(folder / "overlay.mp4")
    assert (len(overlay), overlay.frame_size, overlay.fps) == (FRAMES, SIZE, 25)
    with Image.open(folder / "attention.png") as sheet:
        assert min(sheet.size) > 64

    counts = result["counts"]
    assert result["key_frames"] == [0, 2, 5, 8]
    assert counts["tokens_generated"] == 0
    assert counts["key_frames"] == counts["frames_encoded_video"] == KEYS
    assert counts["visual_tokens_encoded"] == counts["visual_tokens_prefilled"] > 0
    assert counts["visual_tokens_prefilled"] + counts["text_tokens_prefilled"] == meter.prefilled
    assert counts["sam2_clip_encodings"] + counts["sam2_key_encodings"] == meter.sam2
    assert 0 < counts["sam2_clip_encodings"] <= 2 * FRAMES
    assert 0 < counts["sam2_key_encodings"] <= 2 * KEYS

    assert result["clip"] == {"name": "square.mp4", "frames": FRAMES, "width": 128, "height": 96, "fps": 25.0}
    assert set(result["questions"]) == {"object", "background"}
    assert {"attention", "fusion", "segmentation", "write"} <= set(result["seconds"])
    if resident_bytes() is not None:
        asking = {"Asking about the video", "Asking about the key frames"}
        assert {"open clip", "load MLLM", *asking, "SAM 2: tracking through the clip", "write"} <= set(result["peak_resident_bytes"])
        assert 50e6 < min(result["peak_resident_bytes"].values()) <= max(result["peak_resident_bytes"].values()) < 20e9
    assert {"python", "comfyui-decaf", "torch", "transformers", "sam2"} == set(result["versions"])
    assert result["settings"]["score_threshold"] == 0.8
    assert sorted(path.name for path in folder.iterdir()) == [
        "attention.png", "attention.safetensors", "masks", "objects", "overlay.mp4", "result.json",
    ]  # fmt: skip
    assert f"of {FRAMES} frames. Results are in" in capsys.readouterr().out


def test_class_name_setting_generates(line, tmp_path):
    assert cli.main(line("--setting", "class-name", "--no-overlay")) == 0
    result = read(tmp_path / "out")
    assert 0 < result["counts"]["tokens_generated"]
    assert len(result["answers"]) == 1 + KEYS
    assert result["counts"]["visual_tokens_encoded"] == result["counts"]["visual_tokens_prefilled"]
    assert not (tmp_path / "out" / "overlay.mp4").exists()


def test_question_wording(line, tmp_path):
    wording = tmp_path / "questions.json"
    wording.write_text(json.dumps({"object": "File: {query}", "background": "Scene: {query}"}), encoding="utf-8")
    assert cli.main(line("--questions", str(wording), "--object-question", "Option: {query}", "--no-overlay")) == 0
    assert read(tmp_path / "out")["questions"] == {"object": "Option: the red square.", "background": "Scene: the red square."}


@pytest.mark.parametrize(
    ("options", "text", "told"),
    [
        (["--object-question", "Where?"], None, "does not contain {query}"),
        (["--setting", "class-name", "--background-question", "Scene without {query}?"], None, "does not contain {object}"),
        ([], "{", "is not JSON"),
        ([], "[1]", "must hold one JSON object"),
        ([], '{"objekt": "{query}"}', "has objekt; known are object, background"),
    ],
)
def test_bad_wording(line, tmp_path, capsys, options, text, told):
    if text is not None:
        (tmp_path / "questions.json").write_text(text)
        options = ["--questions", str(tmp_path / "questions.json")]
    assert cli.main(line(*options)) == 2
    assert told in capsys.readouterr().err


def test_nothing_found_is_an_answer(line, tmp_path, monkeypatch, capsys):
    """No point at all: masks of full length, all empty, and a sentence."""
    monkeypatch.setattr(command, "extract_attentions", flat(command.extract_attentions))
    assert cli.main(line("--objects")) == 0
    found = masks(tmp_path / "out" / "masks")
    assert len(found) == FRAMES and not np.any(found)
    result = read(tmp_path / "out")
    assert result["tracks"] == [] and result["frames_with_mask"] == 0
    assert result["message"].startswith("Nothing found")
    assert result["message"] in capsys.readouterr().out
    assert len(open_clip(tmp_path / "out" / "overlay.mp4")) == FRAMES


def flat(extract):
    """Attention that is the same for both questions, as of a model that does not understand them."""
    from dataclasses import replace

    def same(*args, **kwargs):
        return [(one, replace(other, video=one.video.clone(), frame=one.frame.clone())) for one, other in extract(*args, **kwargs)]

    return same


def test_sam2_computes_in_the_dtype_that_is_asked_for(line, tmp_path, monkeypatch):
    loaded = []
    load_segmenter = command.load_segmenter
    monkeypatch.setattr(command, "load_segmenter", lambda *args, **kwargs: loaded.append(load_segmenter(*args, **kwargs)) or loaded[-1])
    assert cli.main(line("--no-overlay")) == 0
    assert cli.main(line("--no-overlay", "--resume", "--sam2-dtype", "bfloat16")) == 0
    assert [one.dtype for one in loaded] == [torch.float32, torch.bfloat16]
    assert read(tmp_path / "out")["settings"]["sam2_dtype"] == "bfloat16"


# -- stopping and resuming --------------------------------------------------------------------------------------------


def no_model(*args, **kwargs):
    raise AssertionError("the language model was loaded again")


def test_resume_of_a_finished_run_does_nothing(line, tmp_path, monkeypatch, capsys):
    assert cli.main(line()) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr(command, "load_mllm", no_model)
    monkeypatch.setattr(command, "load_segmenter", no_model)
    assert cli.main(line("--resume")) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert "Already finished" in capsys.readouterr().out


def test_the_best_objects_alone(line, tmp_path):
    """Asked for too low a score, the run keeps all; with a limit, those of the highest scores."""
    given = ("--method", "as-published", "--score-threshold", "0", "--no-overlay")
    assert cli.main(line(*given)) == 0
    scores = sorted(track["score"] for track in read(tmp_path / "out")["tracks"])
    assert len(scores) > 2
    assert cli.main(line(*given, "--resume", "--max-tracks", "2")) == 0
    result = read(tmp_path / "out")
    assert sorted(track["score"] for track in result["tracks"]) == scores[-2:] and result["settings"]["max_tracks"] == 2
    assert (result["settings"]["method"], result["settings"]["targets"]) == ("as published", "auto")


@pytest.mark.slow
def test_resume_asks_again_only_if_the_attention_would_differ(line, tmp_path, monkeypatch, clip_file):
    own = tmp_path / "own.mp4"
    own.write_bytes(clip_file.read_bytes())
    assert cli.main(line(clip=own)) == 0
    counts = read(tmp_path / "out")["counts"]
    loaded = []
    load = command.load_mllm
    monkeypatch.setattr(command, "load_mllm", lambda *args, **kwargs: loaded.append(1) or load(*args, **kwargs))

    assert cli.main(line("--resume", "--score-threshold", "0.5", clip=own)) == 0
    assert not loaded
    result = read(tmp_path / "out")
    assert result["attention_from_earlier_run"] and result["settings"]["score_threshold"] == 0.5
    assert {key: result["counts"][key] for key in counts if "sam2" not in key} == {key: counts[key] for key in counts if "sam2" not in key}

    assert cli.main(line("--resume", "--score-threshold", "0.5", clip=own, query="the blue slope")) == 0
    assert len(loaded) == 1
    os.utime(own, ns=(1, 1))
    assert cli.main(line("--resume", "--score-threshold", "0.5", clip=own, query="the blue slope")) == 0
    assert len(loaded) == 2
    (tmp_path / "out" / "masks" / "00003.png").unlink()
    assert cli.main(line("--resume", "--score-threshold", "0.5", clip=own, query="the blue slope")) == 0
    assert len(loaded) == 2
    assert len(masks(tmp_path / "out" / "masks")) == FRAMES


def test_without_resume_everything_is_made_anew(line, tmp_path, mllm_folder):
    """A shorter clip leaves no mask of the longer one behind; files of other names stay."""
    assert cli.main(line("--objects")) == 0
    (tmp_path / "out" / "masks" / "notes.txt").write_text("mine")
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(2):
        Image.fromarray(picture(index).numpy()).save(frames / f"{index}.png")
    assert cli.main(line("--no-overlay", clip=frames)) == 0
    out = tmp_path / "out"
    assert [path.name for path in sorted((out / "masks").iterdir())] == ["00000.png", "00001.png", "notes.txt"]
    assert not (out / "overlay.mp4").exists()
    assert list((out / "objects").rglob("*.png")) == []
    assert read(out)["clip"]["fps"] is None


STOPS = {
    "attention": "import decaf.command.attention_file as m; m.atomic_write = stop",
    "mask": "import decaf.files as m; replace = os.replace; m.os.replace = lambda a, b: stop() if '00003' in str(b) else replace(a, b)",
    "overlay": "import decaf.results.write as m; m.show_objects = stop",
}

KILLER = """
import os, signal, sys
from decaf.command import main as cli
import transformers, decaf.command.segment  # once, before the children
def stop(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
code, *arguments = sys.argv[1:]
for case in code.split("||"):
    name, patch = case.split("::")
    child = os.fork()
    if not child:
        exec(patch)
        cli.main([argument.replace("WHERE", name) for argument in arguments])
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked and killed here")
def test_killed_run_leaves_nothing_half_written(line, tmp_path, monkeypatch):
    arguments = line()
    whole, place = tmp_path / "out", arguments.index("--out") + 1
    assert cli.main(arguments) == 0
    arguments[place] = str(tmp_path / "WHERE")
    cases = "||".join(f"{name}::{patch}" for name, patch in STOPS.items())
    killed = subprocess.run([sys.executable, "-c", KILLER, cases, *arguments], capture_output=True, text=True)
    assert killed.returncode == 0, killed.stderr
    for where in STOPS:
        out = tmp_path / where
        check_no_half_written(out)
        # The file that was being written when the process died keeps its temporary name, and what was locked is still there.
        left = {path.name for path in out.rglob(".*")}
        assert LOCK in left and bool(left - {LOCK}) == (where != "attention")
        assert (out / "attention.safetensors").exists() == (where != "attention")
        arguments[place] = str(out)
        with monkeypatch.context() as patched:
            if where != "attention":
                patched.setattr(command, "load_mllm", no_model)
            assert cli.main([*arguments, "--resume"]) == 0
        assert not list(out.rglob(".*"))
        assert np.array_equal(masks(out / "masks"), masks(whole / "masks"))


def check_no_half_written(out):
    """What is there is whole, and the record of a finished run is not."""
    assert not (out / "result.json").exists()
    check_whole(out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_a_polite_kill(line, number, code, tmp_path, monkeypatch, capfd):
    replace, calls = os.replace, []

    def stop_at_third(*args):
        calls.append(args)
        if len(calls) == 4:
            signal.raise_signal(number)
        replace(*args)

    monkeypatch.setattr("decaf.files.os.replace", stop_at_third)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has programs in the background ignore Ctrl-C
    try:
        assert cli.main(line()) == code
    finally:
        signal.signal(signal.SIGINT, ignored)
    monkeypatch.undo()
    told = capfd.readouterr().err.strip().splitlines()
    assert told[-1] == f"decaf: stopped. Run the same command with --resume to go on in {tmp_path / 'out'}."
    assert "Traceback" not in "".join(told)
    check_no_half_written(tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob(".*")]
    monkeypatch.setattr(command, "load_mllm", no_model)
    assert cli.main(line("--resume")) == 0


def test_clip_that_would_be_overwritten(line, tmp_path, capsys):
    assert cli.main(line()) == 0
    assert cli.main(line(clip=tmp_path / "out" / "masks")) == 2
    assert cli.main(line(clip=tmp_path / "out" / "overlay.mp4")) == 2
    assert capsys.readouterr().err.count("would be overwritten") == 2
    assert len(masks(tmp_path / "out" / "masks")) == FRAMES


# -- the command line itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [["-m", "decaf"], ["-c", "import sys; from decaf.command.main import main; sys.exit(main())"]])
def test_help(program):
    shown = subprocess.run(
        [sys.executable, *program, "segment", "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"}
    )
    assert shown.returncode == 0
    for option in ("--query", "--mllm", "--sam2", "--out", "--resume", "--max-key-frames", "examples:"):
        assert option in shown.stdout
    assert "(default: 16)" in shown.stdout
    assert "(default: None)" not in shown.stdout and "(default: False)" not in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 125


def test_errors_are_one_line(line, tmp_path, capsys):
    assert cli.main(line(clip=tmp_path / "none.mp4")) == 2
    assert capsys.readouterr().err == f"decaf: CLIP {tmp_path / 'none.mp4'} does not exist. Check the path.\n"


@pytest.mark.slow
def test_progress_is_drawn_on_a_terminal_only(line, monkeypatch, capsys, caplog):
    assert cli.main(line("--no-overlay")) == 0
    assert "%" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli.main(line("--no-overlay", "--quiet")) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and "Writing masks" not in shown.err
    assert cli.main(line("--no-overlay")) == 0
    shown = capsys.readouterr().err
    assert "Asking about the key frames: 100%" in shown and "Writing masks: 100%" in shown
    assert "MB held" not in caplog.text
    assert cli.main(line("--no-overlay", "--verbose")) == 0
    assert "%" not in capsys.readouterr().err
    assert ("MB held" in caplog.text) == (resident_bytes() is not None)
