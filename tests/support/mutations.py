"""Odd and damaged input, drawn by a random generator: the same draws give the same input."""

import json
import os
import random
import socket
import struct
from pathlib import Path

VALUES = [
    None, True, 0, -1, 1, 7, 10**6, 10**9, 10**30, 1e308, 0.5, "", "x", "A" * 5000, "\ud800", "../..", [], [1], [[]], {}, {"a": {"b": []}},
]  # fmt: skip


def mutate_json(rng: random.Random, value):
    """One entry deleted, replaced by something of another kind or size, or doubled under another name."""
    places = []

    def walk(table):
        for key in list(table) if isinstance(table, dict) else range(len(table)):
            places.append((table, key))
            if isinstance(table[key], dict | list):
                walk(table[key])

    if not isinstance(value, dict | list) or not value:
        return rng.choice(VALUES)
    walk(value)
    table, key = rng.choice(places)
    way = rng.choice(["delete", "replace", "replace", "replace", "shift", "rename"])
    if way == "delete":
        del table[key]
    elif way == "shift" and isinstance(table[key], int | float) and not isinstance(table[key], bool):
        table[key] = rng.choice([table[key] + 1, table[key] - 1, table[key] * 2, -table[key], table[key] * 10**6])
    elif way == "rename" and isinstance(table, dict):
        table[f"{key}_"] = table.pop(key)
    else:
        table[key] = rng.choice(VALUES)
    return value


def mutate_json_file(rng: random.Random, path: Path) -> str:
    way = rng.choice(["entry"] * 8 + ["bytes", "deep", "other"])
    if way == "entry":
        value = json.loads(path.read_text(encoding="utf-8"))
        for _ in range(rng.choice([1, 1, 1, 3])):
            value = mutate_json(rng, value)
        path.write_text(json.dumps(value))
    elif way == "bytes":
        return mutate_bytes(rng, path)
    elif way == "deep":
        path.write_text("[" * 100_000 + "]" * 100_000)
    else:
        path.write_text(json.dumps(rng.choice(VALUES)))
    return way


def mutate_bytes(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    way = rng.choice(["cut", "flip", "flip", "empty", "zeros", "grow"])
    if way == "cut":
        data = data[: rng.randrange(len(data) + 1)]
    elif way == "flip":
        for _ in range(min(rng.choice([1, 10, 100, 1000]), len(data))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif way == "empty":
        data = b""
    elif way == "zeros":
        start = rng.randrange(len(data) + 1)
        data[start : start + 500] = bytes(len(data[start : start + 500]))
    else:
        data += rng.randbytes(1000)
    path.write_bytes(data)
    return way


def mutate_safetensors(rng: random.Random, path: Path) -> str:
    """The header changed in an entry, or the file in its bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    way = rng.choice(["entry", "dtype", "shape", "swap", "length", "metadata"])
    name, other = rng.choice(names), rng.choice(names)
    if way == "entry":
        mutate_json(rng, header)
    elif way == "dtype":
        header[name]["dtype"] = rng.choice(["F64", "F32", "F16", "I8", "BOOL", "F8_E4M3", "X"])
    elif way == "shape":
        header[name]["shape"] = rng.choice([[], [0], [-1], header[name]["shape"][::-1], header[name]["shape"] + [1], [10**9, 10**9]])
    elif way == "swap":
        header[name], header[other] = header[other], header[name]
    elif way == "metadata":
        texts = header.setdefault("__metadata__", {})
        texts[rng.choice([*texts, "decaf.sam2", "format"])] = rng.choice(["", "{", "[" * 50_000, "{}", "[]", '{"image_size": -1}', "null"])
    text = json.dumps(header).encode()
    size = rng.choice([0, 1, 10**9, 2**63, 2**64 - 1]) if way == "length" else len(text)
    path.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])
    return way


def odd_path(rng: random.Random, folder: Path) -> str:
    """A path that leads to nothing, or to nothing that could be used. What is needed for it is made in `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / "odd"
    kind = rng.choice(["text"] * 3 + ["circle", "pipe", "socket", "folder", "empty", "text file", "dangling"])
    if kind == "text":
        return rng.choice(
            [
                "a\0b", f"{folder}/{'n' * 300}", f"{folder}{'/n' * 3000}", "\ud800", f"{folder}/\udcff", "", ".", "..", "/", "~", "~nobody-here/x",
                "/dev/zero", "/dev/null", "/dev/stdin", "file:x.mp4", "http://127.0.0.1:9/x.mp4", "x" * 10**5, " ", "a\nb", "\x1b[2J", "//", "*", "?",
                "%s", "{query}", "会飞的鸟", "\u202egpm", "CON", "a:b", "bundled", f"{folder}/none/none", "pipe:0", "concat:a|b",
            ]
        )  # fmt: skip
    if kind == "circle":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))
    elif kind == "folder":
        (path / "in it").mkdir(parents=True)
    elif kind == "empty":
        path.touch()
    elif kind == "text file":
        path.write_text("text")
    else:
        path.symlink_to("nothing")
    return str(path)
