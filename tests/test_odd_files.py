"""Files, folders and names that are damaged, in the way or just unusual: refused in a sentence, or taken as they are."""

import json
import os
import shutil
import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from decaf.attention.extract import extract_attention
from decaf.attention.fusion import frame_fusion, object_background_fusion
from decaf.attention.points import attention_points
from decaf.attention.questions import Templates, clean_query
from decaf.clips import clip_from_images, open_clip, write_video
from decaf.command import main as cli
from decaf.command.attention_file import load_attention
from decaf.errors import DecafError
from decaf.files import write_json
from decaf.mllm import find_mllm, load_mllm
from decaf.sam2 import load_sam2
from decaf.tracking import segment as track


def noise(frames, height=48, width=64):
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(0))


def pictures(folder: Path, names=("0.png", "1.png")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in zip(names, noise(len(names)), strict=True):
        Image.fromarray((frame * 255).byte().numpy()).save(folder / name)
    return folder


def refused(call, *parts):
    with pytest.raises(DecafError) as caught:
        call()
    told = str(caught.value)
    assert all(part in told for part in parts) and 20 < len(told) < 500 and "\n" not in told, told


@pytest.fixture
def segment(mllm_folder, sam2_file, tmp_path, capsys):
    """segment(clip, *more) -> (exit status, the last line that is told); results go to tmp_path / "out" unless `out` is given."""

    def run(clip, *more, out=None):
        models = ["--mllm", str(mllm_folder("qwen2_5_vl")), "--sam2", str(sam2_file), "--device", "cpu"]
        limits = ["--max-key-frames", "2", "--tokens-per-frame", "16", "--out", str(out or tmp_path / "out")]
        code = cli.main(["segment", str(clip), "--query", "the cup", *models, *limits, *more])
        shown = capsys.readouterr()
        return code, (shown.err if code else shown.out).strip().splitlines()[-1]

    return run


# -- the output folder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["result.json", "overlay.mp4", "attention.png", "attention.safetensors"])
@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_folder_where_a_result_belongs(segment, tmp_path, name, more):
    (tmp_path / "out" / name / "kept").mkdir(parents=True)
    code, told = segment(pictures(tmp_path / "clip"), *more)
    assert code == 2 and name in told and "another" in told
    assert (tmp_path / "out" / name / "kept").is_dir() and not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"[]", b"5", b"\xff\xfe\0", b'{"made_from": {}}', b"{"])
def test_resume_beside_a_strange_record(segment, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_bytes(content)
    assert segment(pictures(tmp_path / "clip"), "--resume", "--no-overlay")[0] == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["clip"]["frames"] == 2


@pytest.mark.parametrize("metadata", [None, {"other": "1"}, {"made_from": "not JSON"}])
def test_attention_of_another_program_is_not_taken_up(tmp_path, metadata):
    path = tmp_path / "attention.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata)
    assert load_attention(path, {"query": "the cup"}) is None


@pytest.mark.parametrize("place", ["masks/00000.png", "objects/0", "objects/0/00000.png", "attention.png", "."])
def test_clip_among_the_results_is_left_alone(segment, tmp_path, place):
    out = tmp_path / "out"
    clip = out / place
    pictures(clip.parent, [clip.name]) if clip.suffix else pictures(clip, ["00000.png"])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, told = segment(clip)
    assert code == 2 and str(clip) in told and "another folder" in told
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_names_that_are_no_text(segment, tmp_path):
    """Linux takes any bytes for a name; the record of the run is JSON in UTF-8 all the same, and a later run recognises it."""
    try:
        clip = pictures(tmp_path / os.fsdecode(b"caf\xe9"))
    except OSError:
        pytest.skip("names must be text on this file system")
    assert segment(clip, "--no-overlay", "--method", "as-published")[0] == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))["clip"]["name"] == clip.name
    code, told = segment(clip, "--no-overlay", "--method", "as-published", "--resume")
    assert code == 0 and "Already finished" in told


def test_json_keeps_what_can_be_read(tmp_path):
    write_json(tmp_path / "a.json", {"query": "会飞的鸟", "name": "\udcff"})
    assert "会飞的鸟" in (tmp_path / "a.json").read_text(encoding="utf-8")


# -- questions ---------------------------------------------------------------------------------------------------------


def test_query_that_is_no_text():
    refused(lambda: clean_query("the \udcff cup"), "query", "UTF-8")


def test_a_query_cannot_pose_as_a_field():
    templates = Templates(choose="{query} | {answers}")
    assert templates.ask_choice("what {answers} means", ["cup"]) == "what {answers} means | cup"


# -- clips and videos --------------------------------------------------------------------------------------------------


def test_colons_in_a_relative_name(tmp_path, monkeypatch):
    """FFmpeg would take what stands before the colon for a protocol."""
    write_video(tmp_path / "x.mp4", [torch.zeros(32, 32, 3, dtype=torch.uint8)] * 2, 25, (32, 32))
    monkeypatch.chdir(tmp_path)
    for name in ("10:30.mp4", "file:x.mp4", "http:x.mp4"):
        shutil.copy("x.mp4", name)
        assert len(open_clip(name)) == 2


@pytest.mark.parametrize("fps", [Fraction(1, 100_000), 5000, 90_000])
def test_rates_that_players_refuse(tmp_path, fps):
    write_video(tmp_path / "x.mp4", [torch.zeros(32, 32, 3, dtype=torch.uint8)] * 3, fps, (32, 32))
    clip = open_clip(tmp_path / "x.mp4")
    assert len(clip) == 3 and clip.fps == (Fraction(1, 1000) if fps < 1 else 1000)


def test_frames_too_long_for_a_video(tmp_path):
    refused(lambda: write_video(tmp_path / "x.mp4", iter(()), 25, (2, 20_000)), "x.mp4", "20000x2", "16384")
    assert not list(tmp_path.iterdir())


def test_threads_share_a_clip(tmp_path):
    frames = [torch.full((32, 32, 3), 4 * index, dtype=torch.uint8) for index in range(60)]
    write_video(tmp_path / "x.mp4", frames, 25, (32, 32))
    whole, shared = open_clip(tmp_path / "x.mp4"), open_clip(tmp_path / "x.mp4", budget=4 * 32 * 32 * 3)
    right = []

    def read(seed):
        order = torch.randint(60, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        right.append(all(torch.equal(shared[index], whole[index]) for index in order))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(mllm_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(mllm_folder("qwen2_5_vl"), folder)
    return folder


def configure(folder, **changed):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"text_config": 5},
        {"text_config": None},
        {"model_type": []},
        {"vision_config": 5},
        {"num_attention_heads": 0},
        {"num_hidden_layers": "x"},
    ],
)
def test_damaged_config(model, changed):
    configure(model, **changed)
    refused(lambda: load_mllm(model), str(model), "ownload")


def test_config_of_a_larger_model(model):
    configure(model, hidden_size=128)
    refused(lambda: load_mllm(model), "another shape", "weight", "download it again")


def test_quantised_model(model):
    configure(model, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(lambda: load_mllm(model), str(model), "cannot be loaded")


def test_tokenizer_of_another_model(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<|video_pad|>"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder"), config.pop("additional_special_tokens")
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    refused(lambda: load_mllm(model), str(model), "no token <|video_pad|>", "not of one model")


@pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": null}'])
def test_damaged_index(model, index):
    (model / "model.safetensors.index.json").write_text(index)
    refused(lambda: load_mllm(model), "incomplete", "model.safetensors.index.json")


def test_numbers_of_pictures_are_the_family_s_where_the_folder_has_none(model):
    given = load_mllm(model)
    (model / "preprocessor_config.json").unlink()
    found = load_mllm(model)
    assert found.mean == found.family.mean == given.mean and found.std == given.std


@pytest.mark.parametrize("name", ["~nobody-of-that-name/model", "/" + 300 * "n"])
def test_model_names_that_lead_nowhere(name):
    refused(lambda: find_mllm(name), "no model folder")


@pytest.mark.parametrize("device", ["banana", "mps" if not torch.backends.mps.is_available() else "cuda"])
def test_devices_that_are_not_there(mllm_folder, sam2_file, device):
    refused(lambda: load_mllm(mllm_folder("qwen2_vl"), device=device), device, "cpu")
    refused(lambda: load_sam2(sam2_file, device=device), device, "cpu")


def test_checkpoints_that_nearly_fit(sam2_file, tmp_path):
    weights, path = load_file(sam2_file), tmp_path / "sam2.pt"

    def load(content, **settings):
        torch.save({"model": content, "decaf.sam2": json.dumps(settings)} if settings else content, path)
        return load_sam2(path)

    refused(lambda: load({1: torch.ones(2)}), "sam2.pt", "weights by name")
    refused(lambda: load({name: value.to(torch.int8) for name, value in weights.items()}), "int8", "quantised")
    name = "sam_mask_decoder.mask_tokens.weight"
    refused(lambda: load(weights | {name: weights[name].flatten()}), "sam2.pt", "do not fit together")
    refused(lambda: load(weights, image_size=96_000), "image_size", "4096")
    refused(lambda: load(weights, num_heads=0), "num_heads", "at least one")
    refused(lambda: load(weights, num_heads=3), "num_heads", "does not divide")


@pytest.fixture(scope="module")
def asked(mllm_folder):
    """A clip and its attention."""
    clip = clip_from_images(noise(3))
    return clip, extract_attention(load_mllm(mllm_folder("qwen2_vl")), clip, "a cup", max_key_frames=2, tokens_per_frame=16)


def test_prompts_that_do_not_fit_together(asked, sam2_file):
    clip, attention = asked
    sam2, prompts = load_sam2(sam2_file), attention_points(frame_fusion(object_background_fusion(*attention)))
    one_map = replace(prompts.fused, map=prompts.fused.map[:1])
    for changed in ({"value": prompts.value[:-1]}, {"xy": prompts.xy[:-1]}, {"fused": one_map}):
        refused(lambda changed=changed: track(sam2, clip, replace(prompts, **changed)), "as many of each")
    for changed in ({"key": prompts.key + 9}, {"key": prompts.key - 9}, {"xy": prompts.xy + 5}, {"value": prompts.value * float("nan")}):
        refused(lambda changed=changed: track(sam2, clip, replace(prompts, **changed)), "outside 0 to 1", "again")
    refused(lambda: track(sam2, clip, prompts, score_threshold=float("nan")), "score threshold")
    refused(lambda: track(sam2, clip, prompts, max_tracks=0), "max_tracks")


@pytest.mark.parametrize("factor", [float("nan"), 1e20])
def test_weights_that_give_no_numbers(asked, sam2_file, tmp_path, factor):
    """They give empty masks, which must not pass for an answer."""
    clip, attention = asked
    with safe_open(sam2_file, "pt") as file:
        settings = file.metadata()
    save_file({name: value * factor for name, value in load_file(sam2_file).items()}, tmp_path / "sam2.safetensors", settings)
    prompts = attention_points(frame_fusion(object_background_fusion(*attention)))
    refused(lambda: track(load_sam2(tmp_path / "sam2.safetensors"), clip, prompts), "not finite", "again")
