"""SAM 2 checkpoints that are damaged or made to do harm: refused in a sentence, at once and in little memory."""

import json
import logging
import random
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict

import pytest
import tiny_sam2
import torch
from safetensors.torch import save_file

from decaf.errors import DecafError
from decaf.sam2 import load_sam2

SIDE = 64
WEIGHTS = tiny_sam2.random_weights(0, SIDE)
DIM = WEIGHTS["image_encoder.neck.convs.0.conv.weight"].shape[0]


def write(path, weights, **settings):
    """.pt or .safetensors by the suffix; `weights` are a change to a sound model's."""
    weights, settings = {**WEIGHTS, **weights}, json.dumps({"image_size": SIDE, **settings})
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata={"decaf.sam2": settings})
    else:
        torch.save({"model": weights, "decaf.sam2": settings}, path)
    return path


def refused(path, *parts, seconds=10, **options):
    start = time.process_time()
    with pytest.raises(DecafError) as caught:
        load_sam2(path, **options)
    told = str(caught.value)
    assert all(part in told for part in parts) and 20 < len(told) < 700 and told.isprintable(), told
    assert time.process_time() - start < seconds
    return told


@pytest.fixture(params=[".pt", ".safetensors"])
def path(request, tmp_path):
    return tmp_path / f"model{request.param}"


def test_a_sound_model_passes(path):
    assert load_sam2(write(path, {})).image_size == SIDE


# -- sizes -------------------------------------------------------------------------------------------------------------

NECK = "image_encoder.neck.convs.0.conv.weight"
MEMORY = "memory_attention.layers."


def expanded():
    """Gigabytes of one number, in every weight that a hidden size is read from."""
    return {name: value.flatten()[:1].expand(16384, 16384) for name, value in WEIGHTS.items() if value.ndim == 2}


def sharing():
    """Every weight whole, but all of them the same bytes."""
    most = max(value.numel() for value in WEIGHTS.values())
    store = torch.zeros(most)
    return {name: store[: value.numel()].view(value.shape) for name, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    "make, says",
    [
        (expanded, "claim"),
        (sharing, "claim"),
        (lambda: {NECK: torch.zeros(1).expand(DIM, 8 * 16, 1, 20_000)}, "claim"),
        (lambda: {NECK: WEIGHTS[NECK].to_sparse()}, "sparse"),
        (lambda: {NECK: WEIGHTS[NECK].to("meta")}, "no values"),
        (lambda: {NECK: WEIGHTS[NECK].to(torch.complex64)}, "complex64"),
        (lambda: {NECK: torch.quantize_per_tensor(WEIGHTS[NECK], 0.1, 0, torch.qint8)}, "qint8"),
        (lambda: {NECK: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}, "Use"),
        (lambda: {NECK: torch.nn.Parameter(WEIGHTS[NECK])}, None),
    ],
)
def test_tensors_that_are_not_plain(tmp_path, make, says):
    path = write(tmp_path / "model.pt", make())
    if says is None:
        assert torch.equal(load_sam2(path).model.state_dict()[NECK], WEIGHTS[NECK])
    else:
        refused(path, "model.pt", says)


def layers(count, at=lambda number: number):
    return {f"{MEMORY}{at(number)}.norm1.weight": torch.zeros(1) for number in range(count)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, says",
    [
        (lambda: layers(15_000), ("15000 parts", "memory_attention.layers.", "at most 32")),
        (lambda: layers(3, lambda number: 10**9 + number), ("not numbered", "100000000")),
        (lambda: layers(3, lambda number: f"word{number}"), ("not numbered", "word0")),
        (lambda: layers(3, lambda number: f"0{number}"), ("not numbered", "'00'")),
        (lambda: layers(1, lambda number: "n" * 100_000), ("not numbered", "nnn...nnn")),
        (lambda: layers(30_000), ("weights", "fewer than 20000")),
        (lambda: {f"image_encoder.trunk.blocks.{i}.norm1.weight": torch.zeros(1) for i in range(9000)}, ("9000 parts", "at most 256")),
        (lambda: {f"image_encoder.trunk.blocks.0.more.{i}": torch.zeros(1) for i in range(9000)}, ("unknown weights", "8999 more")),
        (lambda: {f"sam_mask_decoder.iou_prediction_head.layers.{i}.bias": torch.zeros(1) for i in range(9000)}, ("9000 parts",)),
        (lambda: {"maskmem_tpos_enc": torch.zeros(30_000, 1, 1, tiny_sam2.MEMORY_DIM)}, ("'maskmem_tpos_enc' is 30000 long", "at most 64")),
        (lambda: {"sam_mask_decoder.mask_tokens.weight": torch.zeros(30_000, DIM)}, ("30000 long", "at most 16")),
        (lambda: {NECK: torch.zeros(300_000, 1, 1, 1)}, ("shape",)),
        (lambda: {f"{MEMORY}0.norm1.weight": torch.zeros(200_000)}, ("shape",)),
        (lambda: {f"{MEMORY}0.linear1.weight": torch.zeros(5_000_000, 1)}, ("shape",)),
        (lambda: {f"{MEMORY}0.self_attn.q_proj.weight": torch.zeros(1, 500_000)}, ("shape", "memory_attention")),
        (lambda: {f"{MEMORY}0.self_attn.q_proj.weight": torch.zeros(5_000_000, 1)}, ("fit together",)),
        (lambda: {"image_encoder.trunk.patch_embed.proj.weight": torch.zeros(500_000, 1)}, ("shape",)),
        (lambda: {"image_encoder.trunk.pos_embed_window": torch.zeros(1, 1, 1, 500_000)}, ("'window_spec'", "500000")),
        (lambda: {"memory_encoder.mask_downsampler.encoder.0.weight": torch.zeros(1 << 20, 1, 1, 1)}, ("fit together",)),
        (lambda: {"memory_encoder.pix_feat_proj.weight": torch.zeros(1 << 20, 1)}, ("shape",)),
        (lambda: {"sam_mask_decoder.iou_prediction_head.layers.0.weight": torch.zeros(1 << 20, 1)}, ("shape",)),
        (lambda: {"\n\x1b[31m" * 9999: torch.zeros(1)}, ("unknown weights", "\\n\\x1b")),
    ],
)
def test_sizes_that_contradict_each_other(path, change, says):
    refused(write(path, change()), path.name, *says)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"image_size": 1 << 30}, ("'image_size'", "4096")),
        ({"image_size": 10**4000}, ("'image_size'", "000...000", "4096")),
        ({"window_spec": [10**9] * 4}, ("'window_spec'", "16 tokens")),
        ({"window_spec": [8] * 100_000}, ("longer than",)),
        ({"window_spec": [8]}, ("fit together",)),
        ({"global_att_blocks": [10**9]}, ("'global_att_blocks'", "0 to 6")),
        ({"num_heads": 10**12}, ("'num_heads'", "does not divide")),
        ({"memory_heads": 10**12}, ("fit together",)),
        ({"decoder_heads": 10**12}, ("fit together",)),
        ({"image_size": 1e400}, ("'image_size'", "inf")),
        ({"image_size": {"a": [[]] * 500}}, ("'image_size'", "whole number")),
        ({"x" * 5000: 1}, ("Unknown SAM 2 setting", "xxx...xxx")),
        ({"\0\x1b[31m": 1}, ("Unknown SAM 2 setting", "\\x1b")),
    ],
)
def test_settings_of_a_file_that_cannot_be(path, settings, says):
    refused(write(path, {}, **settings), *says)


@pytest.mark.parametrize("text", ["[" * 9000, '{"image_size":' * 600, "1" * 5000, "[" * 10_000_000, "\ud800", '{"image_size": NaN}'])
def test_settings_that_are_no_settings(path, text):
    if path.suffix == ".pt":
        torch.save({"model": WEIGHTS, "decaf.sam2": text}, path)
    else:
        save_file(WEIGHTS, path)
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length]) | {"__metadata__": {"decaf.sam2": text}}
        header = json.dumps(header, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    refused(path)


def test_settings_that_are_not_text(tmp_path):
    for value in (5, [1], torch.zeros(3), {"image_size": 64}, b"\xff\xfe\xfd"):
        torch.save({"model": WEIGHTS, "decaf.sam2": value}, tmp_path / "model.pt")
        refused(tmp_path / "model.pt", "not JSON")


# -- archives ----------------------------------------------------------------------------------------------------------


def repacked(path, change):
    """The archive at `path` again, with its members [(name, bytes, compression)] changed."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info), zipfile.ZIP_STORED) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data, compression in change(members):
            archive.writestr(name, data, compression)
    return path


@pytest.mark.slow
def test_an_archive_that_unpacks_to_gigabytes(tmp_path):
    path = write(tmp_path / "model.pt", {name: torch.zeros(4096, 4096) for name in list(WEIGHTS)[:4]})
    repacked(path, lambda members: [(name, data, zipfile.ZIP_DEFLATED) for name, data, _ in members])
    assert path.stat().st_size < 8 << 20
    refused(path, "unpack to", "compressed")


def test_an_archive_whose_members_are_the_same_bytes(tmp_path):
    path = write(tmp_path / "model.pt", {})
    data = path.read_bytes()
    end = data.rindex(b"PK\5\6")
    count, size, start = struct.unpack("<HII", data[end + 10 : end + 20])
    entries = data[start : start + size]
    again = entries * 30
    tail = data[end : end + 8] + struct.pack("<HHII", count * 30, count * 30, len(again), start) + b"\0\0"
    path.write_bytes(data[:start] + again + tail)
    refused(path, "model.pt")


def test_a_list_of_weights_without_end(tmp_path):
    def longer(members):
        return [(name, data[:-1] + b"N0" * (5 << 20) + b"." if name.endswith(".pkl") else data, kind) for name, data, kind in members]

    refused(repacked(write(tmp_path / "model.pt", {}), longer), "list of weights")


def header(path, entries, data=b""):
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_safetensors_headers_that_lie(tmp_path):
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for entries in (
        {"a": entry, "b": entry},  # the same bytes twice
        {"a": entry, "b": {**entry, "data_offsets": [4, 12]}},
        {"a": {**entry, "shape": [1 << 62, 8]}},
        {"a": {**entry, "shape": [1 << 40]}},
        {"a": {**entry, "data_offsets": [0, 1 << 60]}},
        {"a": {**entry, "dtype": "F4"}},
        {"a": entry, "__metadata__": {"decaf.sam2": {"image_size": 64}}},
        [[[]]],
    ):
        refused(header(path, entries, bytes(8)), "model.safetensors")
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(path, "damaged")
    path.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)
    refused(path, "damaged")
    many = {f"w{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(100_000)}
    refused(header(path, many), "100000 weights")


MEMORY_USED = """
import resource, sys
import torch
from decaf.errors import DecafError
from decaf.sam2 import load_sam2
from decaf.sam2.package import sam2_package

sam2_package()
load_sam2(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    try:
        load_sam2(path)
    except DecafError:
        continue
    sys.exit(f"{path} was loaded")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is told in kilobytes there")
def test_refusing_takes_little_memory(tmp_path):
    paths = [
        write(tmp_path / "expanded.pt", expanded()),
        write(tmp_path / "layers.pt", layers(15_000)),
        write(tmp_path / "neck.safetensors", {NECK: torch.zeros(300_000, 1, 1, 1)}),
        write(tmp_path / "linear.safetensors", {f"{MEMORY}0.linear1.weight": torch.zeros(1 << 20, 1)}),
        write(tmp_path / "window.safetensors", {}, window_spec=[10**9] * 4),
        write(tmp_path / "image.safetensors", {}, image_size=1 << 20),
        repacked(
            write(tmp_path / "bomb.pt", {name: torch.zeros(4096, 4096) for name in list(WEIGHTS)[:3]}),
            lambda members: [(name, data, zipfile.ZIP_DEFLATED) for name, data, _ in members],
        ),
    ]
    command = [sys.executable, "-c", MEMORY_USED, write(tmp_path / "sound.pt", {}), *paths]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 80, f"{run.stdout} MB"


# -- damage ------------------------------------------------------------------------------------------------------------


def damaged(whole, seed):
    """Bytes changed, cut out or put in, most of them where the list of weights stands."""
    draw, data = random.Random(seed), bytearray(whole)
    start = max(0, data.find(b"maskmem_tpos_enc") - 200) if seed % 2 else 0
    reach = min(len(data), start + 30_000)
    match seed % 5:
        case 0:
            del data[draw.randrange(len(data)) :]
        case 1:
            place = draw.randrange(start, reach)
            data[place : place + draw.randrange(1, 64)] = draw.randbytes(draw.randrange(64))
        case _:
            for _ in range(draw.randrange(1, 12)):
                data[draw.randrange(start, reach)] = draw.randrange(256)
    return data


@pytest.mark.parametrize("kind", ["zip.pt", "legacy.pt", "model.safetensors"])
def test_any_damage_is_a_sentence(tmp_path, kind, caplog):
    caplog.set_level(logging.CRITICAL)
    path = tmp_path / kind
    settings = json.dumps({"image_size": SIDE})
    small = OrderedDict((name, value.half()) for name, value in WEIGHTS.items())
    if kind == "legacy.pt":
        torch.save({"model": small, "decaf.sam2": settings}, path, _use_new_zipfile_serialization=False)
    else:
        write(path, small)
    whole, loaded = path.read_bytes(), 0
    for seed in range(90):
        path.write_bytes(damaged(whole, seed))
        try:
            load_sam2(path)
            loaded += 1  # the damage lay in the numbers
        except DecafError as error:
            assert kind in str(error), seed
            assert str(error).isprintable() and len(str(error)) < 700, seed
    assert loaded < 60
