"""A list of clips and queries for `decaf batch`, small enough for the bundled models to do in seconds."""

import json

from PIL import Image

from decaf.demo.scenes import make_scene

OPTIONS = [
    "--mllm",
    "bundled",
    "--sam2",
    "bundled",
    "--device",
    "cpu",
    "--tokens-per-frame",
    "16",
    "--presence-threshold",
    "0",
    "--threads",
    "1",
]
"""So few tokens that the model sees next to nothing: whatever it finds best is tracked all the same."""


def write_clips(folder, clips: int, length: int = 2, size=(56, 56)) -> list[list[str]]:
    """`clips` folders of pictures in `folder`/clips; returns what can be asked about each."""
    asked = []
    for number in range(clips):
        scene = make_scene(number, length=length)
        place = folder / "clips" / f"scene{number}"
        place.mkdir(parents=True)
        for index, frame in enumerate(scene.frames):
            Image.fromarray(frame).resize(size).save(place / f"{index:05d}.png")
        asked.append([query.text for query in scene.queries])
    return asked


def write_manifest(folder, clips: int, queries: int):
    """JSON lines with `queries` rows about each of the clips; the rows of a clip do not stand together. Returns the path."""
    asked = write_clips(folder, clips)
    rows = [
        {"id": f"c{clip}-q{number}", "clip": f"clips/scene{clip}", "query": asked[clip][number % len(asked[clip])]}
        for number in range(queries)
        for clip in range(clips)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def results(out) -> dict[str, bytes]:
    """Every file of a batch but its report, by its path."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    files.pop("report.json", None)
    return files
