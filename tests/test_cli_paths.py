"""Paths and files on the command line that cannot be used: each is told in a sentence, before anything is loaded, and nothing is waited
for."""

import json
import os
import shutil
import signal
import socket
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from short_runs import FRAMES, masks, read

from decaf.command import main as cli
from decaf.command import segment as command
from decaf.command.options import layer_count
from decaf.demo import MLLM_FOLDER

unix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such files here")


@pytest.fixture
def unloaded(monkeypatch):
    """Nothing may be loaded."""
    for name in ("load_mllm", "load_segmenter", "open_clip"):
        monkeypatch.setattr(command, name, lambda *args, **kwargs: pytest.fail("something was loaded"))


@pytest.fixture(autouse=True)
def in_time():
    """What waits for the other end of a pipe waits for ever: this ends it."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def told(capsys, *parts):
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("decaf: ") and "Traceback" not in shown and "\n" not in shown
    assert 30 < len(shown) < 500 and all(part in shown for part in parts), shown
    return shown


def strange_path(kind, folder):
    """A path of this kind, and what is said of it."""
    folder.mkdir(exist_ok=True)
    path = folder / "strange"
    if kind == "nul":
        return f"{folder}/a\0b", "null"
    if kind == "long name":
        return str(folder / ("n" * 300)), "too long"
    if kind == "long path":
        return str(folder) + "/n" * 3000, "too long"
    if kind == "circle":
        path.symlink_to(path)
        return str(path), "links"
    if kind == "circle above":
        path.symlink_to(folder / "other")
        (folder / "other").symlink_to(path)
        return str(path / "in" / "it"), "links"
    if kind == "no text":
        return f"{folder}/\ud800", "encode"
    if kind == "pipe":
        os.mkfifo(path)
        return str(path), "named pipe"
    if kind == "link to a pipe":
        os.mkfifo(folder / "pipe")
        path.symlink_to(folder / "pipe")
        return str(path), "named pipe"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))
        return str(path), "socket"
    assert kind == "device"
    return "/dev/zero", "device"


NAMES = ["nul", "long name", "long path", "circle", "circle above", "no text"]
SPECIAL = ["pipe", "link to a pipe", "socket", "device"]


@unix
@pytest.mark.parametrize("option", ["CLIP", "--sam2", "--mllm", "--questions", "--out"])
@pytest.mark.parametrize("kind", NAMES + SPECIAL)
def test_segment(line, tmp_path, unloaded, capsys, monkeypatch, kind, option):
    monkeypatch.chdir(tmp_path)
    path, why = strange_path(kind, tmp_path / "made")
    assert cli.main(line(clip=path) if option == "CLIP" else line(option, path)) == 2
    told(capsys, option, why)
    assert not (tmp_path / "out").exists()


@unix
@pytest.mark.parametrize("option", ["--sam2", "--mllm", "--out", "--json"])
@pytest.mark.parametrize("kind", NAMES + SPECIAL)
def test_demo(tmp_path, unloaded, capsys, monkeypatch, kind, option):
    monkeypatch.chdir(tmp_path)
    path, why = strange_path(kind, tmp_path / "made")
    assert cli.main(["demo", *(["--evaluate", "2"] if option == "--json" else []), option, path]) == 2
    told(capsys, option, why)
    assert not (tmp_path / "decaf-demo").exists()


@unix
@pytest.mark.parametrize("kind", ["circle", *SPECIAL])
def test_among_the_images_of_a_clip(line, tmp_path, capsys, monkeypatch, kind):
    """Left out, it would shift all frames after it."""
    monkeypatch.chdir(tmp_path)
    clip = tmp_path / "clip"
    clip.mkdir()
    for index in (0, 2):
        Image.new("RGB", (64, 48)).save(clip / f"{index}.png")
    path, why = strange_path(kind, tmp_path / "made")
    (clip / "1.png").symlink_to(path)
    assert cli.main(line(clip=clip)) == 2
    told(capsys, "1.png", why)
    (clip / "1.png").unlink()
    (clip / "1.png").symlink_to("nothing")
    assert cli.main(line(clip=clip)) == 2
    told(capsys, "1.png", "link to a file that is not there")


@unix
@pytest.mark.parametrize("name", ["masks", "objects", "query-1", "query-2/masks"])
def test_a_circle_where_results_belong(line, tmp_path, capsys, name):
    place = tmp_path / "out" / name
    place.parent.mkdir(parents=True)
    place.symlink_to(place)
    code = cli.main(line("--no-overlay", *(["--query", "the blue slope"] if "query" in name else [])))
    assert code == 2
    told(capsys, "--out")


@unix
@pytest.mark.parametrize("name", ["result.json", "attention.safetensors"])
def test_a_pipe_where_an_earlier_result_belongs(line, tmp_path, name):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / name)
    assert cli.main(line("--resume", "--no-overlay")) == 0
    assert (tmp_path / "out" / name).is_file()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_folders_that_are_closed(line, tmp_path, capsys):
    closed = tmp_path / "closed"
    (closed / "in").mkdir(parents=True)
    closed.chmod(0)
    try:
        for more in (["--out", str(closed)], ["--out", str(closed / "in")], ["--mllm", str(closed)], ["--sam2", str(closed / "in")]):
            assert cli.main(line(*more)) == 2
            told(capsys, str(closed))
    finally:
        closed.chmod(0o755)


# -- files of questions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"object":' * 100_000, "nested too deeply"),
        (b" " * (1 << 21), "larger than 1 MB"),
        (b"\xff\xfe{\0}\0", "not JSON"),
        (b'{"object": 5}', "one JSON object of texts"),
        (json.dumps({f"name {index}": "x" for index in range(5000)}).encode(), "known are"),
        (json.dumps({"n" * 5000: "x"}).encode(), "known are"),
    ],
)
def test_files_of_questions(line, tmp_path, unloaded, capsys, content, why):
    (tmp_path / "q.json").write_bytes(content)
    assert cli.main(line("--questions", str(tmp_path / "q.json"))) == 2
    told(capsys, "q.json", why)


def test_a_file_of_questions_by_a_windows_editor(line, tmp_path):
    (tmp_path / "q.json").write_text(json.dumps({"object": "What: {query}"}), encoding="utf-8-sig")
    assert cli.main(line("--no-overlay", "--questions", str(tmp_path / "q.json"))) == 0
    assert read(tmp_path / "out")["questions"]["object"] == "What: the red square."


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--max-key-frames", value) for value in ("0", "-1", "257", "1" + "0" * 30)),
        *(("--tokens-per-frame", value) for value in ("0", "-5", "16385", "1" + "0" * 30)),
        *(("--start-layer", value) for value in ("-1", "4", "1" + "0" * 30)),
        *(("--point-threshold", value) for value in ("nan", "0", "-inf")),
        *(("--score-threshold", value) for value in ("1.01", "nan")),
        *(("--max-tracks", value) for value in ("0", "-3")),
    ],
)
def test_numbers_are_told_before_anything_is_loaded(line, unloaded, capsys, option, value):
    assert cli.main(line(f"{option}={value}")) == 2
    told(capsys, option, value if option != "--score-threshold" else "")


def test_the_last_layer_is_a_layer(line, tmp_path):
    assert layer_count(MLLM_FOLDER) > 0
    assert cli.main(line("--start-layer", "3", "--no-overlay")) == 0


@pytest.mark.parametrize(
    "option", ["--frames=0", "--frames=-3", "--frames=1000000000", "--seed=-1", "--presence-threshold=2", "--evaluate=0"]
)
def test_numbers_of_the_demo(tmp_path, unloaded, capsys, option):
    assert cli.main(["demo", "--out", str(tmp_path / "out"), option]) == 2
    told(capsys, option.split("=")[0])
    assert not (tmp_path / "out").exists()


# -- what an earlier run left ------------------------------------------------------------------------------------------


RECORDS = {
    "no list of files": lambda result: result.pop("files"),
    "a number for the files": lambda result: result.update(files=5),
    "numbers among the files": lambda result: result.update(files=[5]),
    "a NUL among the files": lambda result: result.update(files=["\0"]),
    "no clip": lambda result: result.pop("clip"),
    "a text for the clip": lambda result: result.update(clip="x"),
    "no message": lambda result: result.pop("message"),
}


@pytest.fixture(scope="module")
def earlier():
    """Where the first run of the module is kept."""
    return []


@pytest.fixture
def out(line, tmp_path, tmp_path_factory, earlier):
    """The folder of a finished run of line("--no-overlay")."""
    folder = tmp_path / "out"
    if not earlier:
        assert cli.main(line("--no-overlay")) == 0
        earlier.append(tmp_path_factory.mktemp("earlier") / "out")
        shutil.copytree(folder, earlier[0])
    else:
        shutil.copytree(earlier[0], folder)
    return folder


def test_what_is_kept_is_taken_up(line, out, monkeypatch, capsys):
    """So that the next ones show something."""
    for name in ("load_mllm", "load_segmenter"):
        monkeypatch.setattr(command, name, lambda *args, **kwargs: pytest.fail("something was loaded"))
    assert cli.main(line("--no-overlay", "--resume")) == 0
    assert "Already finished" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS)
def test_records_that_are_not_ours(line, out, change):
    """Of the right clip, models and settings, and otherwise not what a run writes: as if they were not there."""
    expected, result, changed = masks(out / "masks"), read(out), read(out)
    change(changed)
    (out / "result.json").write_text(json.dumps(changed))
    assert cli.main(line("--no-overlay", "--resume")) == 0
    assert set(read(out)) == set(result) and np.array_equal(masks(out / "masks"), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b'{"made_from":' * 100_000, b'{"made_from": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"]
)
def test_a_record_without_end(line, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_bytes(content)
    assert cli.main(line("--no-overlay", "--resume")) == 0
    assert read(tmp_path / "out")["clip"]["frames"] == FRAMES


DEEP = "[" * 100_000 + "]" * 100_000

ATTENTIONS = {
    "no clip": lambda texts, maps: texts.pop("clip"),
    "clip is no object": lambda texts, maps: texts.update(clip="5"),
    "deep clip": lambda texts, maps: texts.update(clip=DEEP),
    "deep texts": lambda texts, maps: texts.update(texts=DEEP),
    "no JSON": lambda texts, maps: texts.update(record="{"),
    "another record": lambda texts, maps: texts.update(record="[]"),
    "record of texts": lambda texts, maps: texts.update(record='{"seconds": {"attention": "x"}, "counts": {}, "queries_at_once": 1}'),
    "another query": lambda texts, maps: texts.update(texts=texts["texts"].replace("red square", "blue slope")),
    "no background": lambda texts, maps: texts.update(texts=json.dumps({"object": json.loads(texts["texts"])["object"]})),
    "presence of 7": lambda texts, maps: texts.update(texts=json.dumps({k: v | {"presence": 7.0} for k, v in json.loads(texts["texts"]).items()})),
    "key frames of another": lambda texts, maps: texts.update(clip=json.dumps(json.loads(texts["clip"]) | {"key_frames": [0, 2, 5, 99]})),
    "another length": lambda texts, maps: texts.update(clip=json.dumps(json.loads(texts["clip"]) | {"length": 50})),
    "empty frames": lambda texts, maps: texts.update(clip=json.dumps(json.loads(texts["clip"]) | {"frame_size": [0, 0]})),
    "no thumbnails": lambda texts, maps: maps.pop("thumbnails"),
    "thumbnails of another size": lambda texts, maps: maps.update(thumbnails=maps["thumbnails"][:, :4].contiguous()),
    "other pictures": lambda texts, maps: maps.update(thumbnails=torch.randint_like(maps["thumbnails"], 255)),
    "no maps": lambda texts, maps: maps.pop("object.video"),
    "flat maps": lambda texts, maps: maps.update({"object.video": maps["object.video"].flatten()}),
    "empty maps": lambda texts, maps: maps.update({"object.frame": maps["object.frame"][:, :0].contiguous()}),
    "whole numbers": lambda texts, maps: maps.update({"object.frame": maps["object.frame"].int()}),
    "not finite": lambda texts, maps: maps.update({"background.frame": maps["background.frame"] * float("nan")}),
    "fewer slots": lambda texts, maps: maps.update({f"{kind}.video": maps[f"{kind}.video"][:1].contiguous() for kind in ("object", "background")}),
    "two grids": lambda texts, maps: maps.update({"background.video": maps["background.video"][:, :, :1].contiguous()}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_that_is_not_ours(line, out, change):
    """It says that it was made from this clip, model and query, and holds something else: as if it were not there."""
    expected = masks(out / "masks")
    path = out / "attention.safetensors"
    maps = load_file(path)
    with safe_open(path, "pt") as file:
        texts = file.metadata()
    change(texts, maps)
    path.unlink()
    save_file(maps, path, texts)
    assert cli.main(line("--no-overlay", "--resume", "--score-threshold", "0.7")) == 0
    assert not read(out)["attention_from_earlier_run"] and np.array_equal(masks(out / "masks"), expected)


# -- what is told ------------------------------------------------------------------------------------------------------


def test_what_is_absent_is_told_even_quietly(line, tmp_path, capsys):
    more = ["--presence-threshold", "1", "--no-overlay", "--quiet"]
    assert cli.main(line(*more)) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == f"decaf: {read(tmp_path / 'out')['message']}\n" and "the red square" in shown.err
    assert cli.main(line(*more, "--resume")) == 0
    assert capsys.readouterr().err == shown.err
    assert cli.main(line(*more, "--query", "the blue slope")) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "the red square" in lines[0] and "the blue slope" in lines[1]
    assert cli.main(line("--presence-threshold", "0", "--score-threshold", "0", "--method", "as-published", "--no-overlay", "--quiet")) == 0
    assert capsys.readouterr().err == ""


def test_a_message_commands_no_terminal(line, tmp_path, capsys):
    assert cli.main(line(clip=tmp_path / "\x1b]0;title\x07\x9b2J.mp4")) == 2
    shown = told(capsys, "does not exist")
    assert not any(letter in shown for letter in "\x1b\x07\x9b")


def test_a_clone_that_is_not_installed(line, tmp_path, monkeypatch):
    """As it lies in a host's folder of nodes: no metadata of the package, and perhaps none of SAM 2's."""
    from importlib.metadata import PackageNotFoundError

    from decaf import __version__
    from decaf.results import files as outputs

    real = outputs.version

    def version(name):
        if name in ("comfyui-decaf", "sam2"):
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(outputs, "version", version)
    monkeypatch.setattr("importlib.metadata.version", version)
    assert cli.main(line("--no-overlay")) == 0
    versions = read(tmp_path / "out")["versions"]
    assert versions["comfyui-decaf"] == __version__ and "sam2" in versions and versions["torch"] == real("torch")


def test_from_a_worker_thread(line, tmp_path):
    """Signals are the main thread's."""
    codes = []
    worker = threading.Thread(target=lambda: codes.append(cli.main(line("--no-overlay"))))
    worker.start()
    worker.join()
    assert codes == [0] and read(tmp_path / "out")["clip"]["frames"] == FRAMES
