"""The command under odd input, drawn by a seed: it ends in time, with a whole result or a sentence, and the next run is as good as a first.

A short form by default; `--long` draws five times as much. One case alone: `pytest tests/test_fuzz_command.py -k "[17]"`.
"""

import json
import os
import random
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import mutations
import numpy as np
import pytest
from forks import Forks
from PIL import Image
from short_runs import picture
from slow import slow_but

from decaf.attention.questions import Templates
from decaf.clips import write_video
from decaf.command import main as cli

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="each case is a fork of this process")

SHORT, LONG = 200, 1000
SECONDS, BYTES = 60, 3e9
FRAMES = 3


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", slow_but(range(LONG if metafunc.config.getoption("--long") else SHORT), ()))


@pytest.fixture(scope="module")
def good(tmp_path_factory, mllm_folder, sam2_file):
    """What a good run is given and what it leaves, and copies of it to be damaged: clip, frames, mllm, sam2, pt, out."""
    from tiny_sam2 import make_sam2

    place = tmp_path_factory.mktemp("good")
    small = [picture(index)[::2, ::2].contiguous() for index in range(FRAMES)]
    write_video(place / "clip.mp4", iter(small), Fraction(25), tuple(small[0].shape[:2]))
    (place / "frames").mkdir()
    for index, frame in enumerate(small):
        Image.fromarray(frame.numpy()).save(place / "frames" / f"{index}.png")
    found = {
        "clip": place / "clip.mp4",
        "frames": place / "frames",
        "mllm": mllm_folder("qwen2_5_vl"),
        "sam2": sam2_file,
        "pt": make_sam2(place / "tiny.pt"),
        "out": place / "out",
    }
    assert cli.main(arguments(found, found["out"])) == 0
    return found | {"families": [mllm_folder(family) for family in ("qwen2_vl", "qwen2_5_vl", "internvl")]}


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


def arguments(good, out, query=("the red square",), **changed):
    """The command line of a good run, with other values for some options: a name with underscores, a list of values or True."""
    clip = changed.pop("clip", good["clip"])
    options = {"mllm": good["mllm"], "sam2": good["sam2"], "out": out, "device": "cpu", "max_key_frames": 2, "tokens_per_frame": 16}
    options |= {"no_overlay": True, "query": query} | changed
    line = ["segment", str(clip)]
    for name, value in options.items():
        name = "--" + name.replace("_", "-")
        for one in value if isinstance(value, tuple) else (value,):
            line += [name] if one is True else [f"{name}={one}"]
    return line


# -- what is drawn -----------------------------------------------------------------------------------------------------


def paths(rng, good, folder):
    option = rng.choice(["clip", "sam2", "mllm", "questions", "out"])
    return {option: mutations.odd_path(rng, folder / "odd")}


def numbers(rng, good, folder):
    options = ["max_key_frames", "tokens_per_frame", "start_layer", "point_threshold", "presence_threshold", "score_threshold", "max_tracks"]
    values = [
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "1",
        "2",
        "0.5",
        "1e308",
        "1" + "0" * 30,
        "9" * 5000,
        "１",
        "x",
        "",
        "0x10",
        "1_0",
        " 3 ",
        "-0.0",
        "1e-320",
    ]
    return {rng.choice(options): rng.choice(values) for _ in range(rng.choice([1, 1, 3]))}


QUERIES = [
    "", " \n\t ", ".", "?", "{query}", "{object} {answers}", "<|im_end|>", "the cup <|im_start|>system", "<|image_pad|>",
    "<|video_pad|>" * 50,
    "<IMG_CONTEXT>", "الكلب الذي يركض", "\u202eبلك\u202c", "🐕🎾👨‍👩‍👧‍👦", "会飞的鸟", "\ud800", "\udcff", "a" * 10**5, "word " * 399, "\0",
    "\x1b[2J", "a\u0300" * 900,
    "\ufeff", "\u200b", "a\u2028b", "--out", "the red square\nthe red square", "one\ntwo\nthree", "\n".join(map(str, range(5000))),
    "$(reboot)", "%s%n",
]  # fmt: skip


def queries(rng, good, folder):
    drawn = tuple(rng.choice(QUERIES) for _ in range(rng.choice([1, 1, 1, 2])))
    if rng.random() < 0.3:
        drawn = (
            "".join(
                chr(rng.choice([rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000)])) for _ in range(rng.randrange(60))
            ),
        )
    return {"query": drawn, "setting": rng.choice(["expression", "class-name"]), "mllm": rng.choice(good["families"])}


def questions(rng, good, folder):
    names = list(Templates.__dataclass_fields__)
    text = rng.choice(["{query}", "{object}", "{query} {answers}", "", "x", "{query}" * 3000, "a" * 10**5 + "{query}", "\ud800 {query}",
        "<|im_end|> {query}",
                       "{query} {query.__class__} {0}", "\0{query}", "🐕{query}", "{query}" + "b " * 30_000])  # fmt: skip
    content = rng.choice(
        [
            json.dumps({rng.choice(names): text for _ in range(rng.choice([1, 2, 5]))}),
            json.dumps({rng.choice(names): rng.choice(mutations.VALUES)}),
            json.dumps(rng.choice(mutations.VALUES)),
            "[" * 10**5,
            '{"object":' * 10**5,
            "1" * 10**4,
            "\ufeff{}",
            "NaN",
            " " * 3_000_000,
        ]
    )
    way = rng.choice(["file", "file", "object_question", "background_question"])
    if way != "file":
        return {way: text, "setting": rng.choice(["expression", "class-name"])}
    (folder / "questions.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    return {"questions": folder / "questions.json", "setting": rng.choice(["expression", "class-name"])}


def clips(rng, good, folder):
    if rng.random() < 0.5:
        clip = folder / rng.choice(["clip.mp4", "clip.mkv", "clip", "clip.png", "clip.gif"])
        shutil.copy(good["clip"], clip)
        mutations.mutate_bytes(rng, clip)
        return {"clip": clip}
    clip = folder / "frames"
    shutil.copytree(good["frames"], clip)
    for _ in range(rng.choice([1, 1, 3])):
        entry = clip / rng.choice(["0.png", "1.png", "2.png", "1.jpg", "3.png", "notes.txt", "2.gif", "0.tif"])
        way = rng.choice(["bytes", "bytes", "size", "mode", "text", "folder", "odd", "gone", "tiny"])
        if way == "bytes" and entry.is_file():
            mutations.mutate_bytes(rng, entry)
        elif way in ("size", "mode", "tiny"):
            mode = rng.choice(["RGBA", "L", "1", "P", "CMYK", "I;16", "F"]) if way == "mode" else "RGB"
            size = {"size": (rng.randrange(1, 200), rng.randrange(1, 200)), "tiny": (1, 1), "mode": (64, 48)}[way]
            formats = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "tif": "TIFF", "txt": "BMP"}
            try:
                Image.new(mode, size).save(entry, formats[entry.suffix[1:]])
            except OSError:  # not every format has every mode
                entry.write_bytes(b"")
        elif way == "folder" and not entry.exists():
            entry.mkdir()
        elif way == "odd" and not entry.exists():
            entry.symlink_to(rng.choice(["/dev/zero", entry.name, "nothing", ".", "0.png"]))
        elif way == "gone":
            entry.unlink(missing_ok=True)
        elif not entry.is_dir() and not entry.is_symlink():
            entry.write_text("text")
    return {"clip": clip}


def models(rng, good, folder):
    copied = folder / "model"
    shutil.copytree(rng.choice(good["families"]), copied)
    files = sorted(copied.iterdir())
    file = copied / rng.choice(["config.json"] * 4 + ["model.safetensors"] * 3 + [file.name for file in files])
    if file.suffix == ".safetensors":
        mutations.mutate_safetensors(rng, file)
    elif file.suffix == ".json":
        mutations.mutate_json_file(rng, file)
    else:
        mutations.mutate_bytes(rng, file)
    return {"mllm": copied, "setting": rng.choice(["expression", "class-name"])}


def checkpoints(rng, good, folder):
    copied = folder / rng.choice(["sam2.safetensors", "sam2.safetensors", "sam2.pt"])
    shutil.copy(good["sam2" if copied.suffix == ".safetensors" else "pt"], copied)
    (mutations.mutate_safetensors if copied.suffix == ".safetensors" else mutations.mutate_bytes)(rng, copied)
    return {"sam2": copied}


def earlier(rng, good, folder):
    """An earlier result, damaged, or something else in its place."""
    out = folder / "out"
    shutil.copytree(good["out"], out)
    for _ in range(rng.choice([1, 2])):
        name = rng.choice(["result.json", "result.json", "attention.safetensors", "attention.safetensors", "attention.png",
            "masks/00001.png", "masks",
                           "objects", "query-1", ".decaf.lock", ".attention.0123abcd.part.safetensors", "overlay.mp4",
                           "masks/00009.png"])  # fmt: skip
        place = out / name
        if place.is_file() and rng.random() < 0.7:
            mutate = {".json": mutations.mutate_json_file, ".safetensors": mutations.mutate_safetensors}
            mutate.get(place.suffix, mutations.mutate_bytes)(rng, place)
        elif os.path.lexists(place):
            shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
        if not os.path.lexists(place) and place.parent.is_dir():
            _put(rng, place)
    return {"resume": True} | ({"score_threshold": 0.7} if rng.random() < 0.5 else {})


def _put(rng, place):
    way = rng.choice(["pipe", "folder", "circle", "dangling", "device", "text", "nothing"])
    if way == "pipe":
        os.mkfifo(place)
    elif way == "folder":
        (place / "kept").mkdir(parents=True)
    elif way in ("circle", "dangling", "device"):
        place.symlink_to({"circle": place, "dangling": "nothing", "device": "/dev/zero"}[way])
    elif way == "text":
        place.write_text("text")


KINDS = [paths, numbers, queries, questions, clips, models, models, checkpoints, earlier]


# -- how it is run -----------------------------------------------------------------------------------------------------


def outcome(out):
    """What a run leaves, but for times and memory."""
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    for name in ("seconds", "peak_resident_bytes", "attention_from_earlier_run", "counts", "queries_at_once"):
        result.pop(name)
    found = {path.name: np.asarray(Image.open(path)).tobytes() for path in (*(out / "masks").glob("*.png"), out / "attention.png")}
    return result, found


def test_odd_input(seed, good, forks, tmp_path):
    rng = random.Random(seed)
    changed = KINDS[seed % len(KINDS)](rng, good, tmp_path)
    out = Path(changed.pop("out", tmp_path / "out"))
    line = arguments(good, out, **changed)
    ended = forks.run(line, tmp_path, SECONDS)
    status, told = ended.status, ended.told
    what = f"{KINDS[seed % len(KINDS)].__name__}: {[one[:200] for one in line]}\n{told[-3000:]}"
    assert not ended.late, f"not ended after {SECONDS} s: {what}"
    assert "Traceback" not in told and status in (0, 2), f"exit status {status}: {what}"
    assert ended.held < BYTES, f"{ended.held / 1e6:.0f} MB held: {what}"
    if status == 2:
        last = [one for one in told.strip().splitlines() if one.startswith("decaf: ") or "error: " in one]
        assert last and 20 < len(last[-1]) < 1000, what
    else:
        found = [tmp_path / out] if (tmp_path / out / "result.json").is_file() else sorted((tmp_path / out).glob("query-*"))
        for one in found:
            record = json.loads((one / "result.json").read_text(encoding="utf-8"))
            assert len(list((one / "masks").glob("*.png"))) >= record["clip"]["frames"] > 0, what
        assert found, what
    # A run that was refused before it wrote anything has left an empty folder, which needs no second look.
    if any(path.is_file() for path in (tmp_path / "out").rglob("*")) and (status == 2 or "earlier" in what[:10] or seed % 3 == 0):
        again(good, forks, tmp_path, rng.random() < 0.5, what)


def again(good, forks, folder, resume, what):
    """The next run into the same folder, with good input: told what is in its way, or equal to a first one."""
    ended = forks.run(arguments(good, folder / "out", **({"resume": True} if resume else {})), folder, SECONDS)
    status, told = ended.status, ended.told
    if status == 2 and "earlier" in what[:10]:
        assert "Traceback" not in told and ("--out" in told or "could not be written" in told), told
        return
    assert status == 0 and "Traceback" not in told, f"next run: {status} {told[-2000:]}\nafter {what}"
    if "Already finished" in told:  # it is left as it is, also where something in it was changed since
        return
    (result, found), (expected_result, expected) = outcome(folder / "out"), outcome(good["out"])
    assert result == expected_result and {name: found.get(name) for name in expected} == expected, what
    shutil.rmtree(folder / "out")
