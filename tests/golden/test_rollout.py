"""Rollout of random models against the reference implementation's numbers, through the same prefix and question passes that a clip takes."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from decaf.mllm import MLLM, Visual, registry
from decaf.mllm.prefill import Prefix
from decaf.rollout import CAPTURE, last_row_rollout


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--golden").resolve()
    files = [f for f in sorted(folder.glob("*/*.safetensors")) if f.name != "model.safetensors" and (f.parent / "config.json").is_file()]
    reason = f"{folder} holds no model folder with inputs"
    params = [pytest.param(f, id=f"{f.parent.name}/{f.stem}") for f in files] or [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    metafunc.parametrize("file", params)


_models = {}


def load(folder) -> MLLM:
    if folder not in _models:
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        model.generation_config.eos_token_id = None  # the reference was made to give a fixed number of tokens
        processor = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=None))  # the files hold token ids
        mllm = MLLM(model, processor, registry()[model.config.model_type], folder.name)
        mllm.text_tower.set_attn_implementation(CAPTURE)
        _models[folder] = mllm
    return _models[folder]


class Case:
    """One golden file as the passes want it."""

    def __init__(self, file):
        self.mllm, data = load(file.parent), load_file(file)
        self.expected = {int(k.rsplit("start", 1)[1]): v for k, v in data.items() if k.startswith("expected.rollout_last_row.start")}
        self.tokens = data["expected.greedy_tokens"]
        self.ids, self.mask = data["input.input_ids"], data["expected.visual_token_mask"].bool()
        assert (self.mask == self.mask[0]).all() and (data["input.attention_mask"] == 1).all() and (self.ids == self.ids[0]).all()
        self.mask = self.mask[0]
        self.shared = int(self.mask.nonzero()[-1]) + 1
        pixels = {k[6:]: v.float() if v.is_floating_point() else v for k, v in data.items() if k.startswith("input.")}
        kind = "video" if "pixel_values_videos" in pixels else "image"
        names = {"video": ("pixel_values_videos", "video_grid_thw"), "image": ("pixel_values", "image_grid_thw")}[kind]
        grid = pixels.get(names[1])
        merge = getattr(self.mllm.model.config.vision_config, "spatial_merge_size", 1)
        slots, rows, cols = (1, 1, int(self.mask.sum())) if grid is None else (int(grid[0, 0]), *(int(n) // merge for n in grid[0, 1:]))
        batch = len(self.ids)
        self.visual = Visual(kind, {n: pixels[n] for n in names if n in pixels}, (slots, rows, cols), "", batch, batch)

    @torch.inference_mode()
    def run(self, start, shared=None, new_tokens=0, block_bytes=None):
        shared = shared or self.shared
        features = self.mllm.family.encode(self.mllm, self.visual)
        places = self.mllm.family.positions(self.mllm, self.mask, self.visual)
        prefix = Prefix(self.mllm, self.ids[:, :shared], features, places[..., :shared], start, lambda: None)
        # Asked twice: the first question must leave the prefix unharmed.
        asked = [prefix.ask(self.ids[0, shared:], places[..., shared:], new) for new in (new_tokens, 0)]
        rows = last_row_rollout(prefix.rows, [rows for rows, _ in asked], self.mask[:shared], block_bytes=block_bytes)
        return rows, asked[0][1]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("block_bytes", [None, 1 << 12])
def test_rollout(file, block_bytes):
    case = Case(file)
    assert case.expected
    for start, expected in case.expected.items():
        for row in case.run(start, block_bytes=block_bytes)[0]:
            assert relative(row, expected) <= 1e-5
            assert relative(row[:, : len(case.mask)][:, case.mask], expected[:, case.mask]) <= 1e-5


def test_rollout_does_not_depend_on_where_the_prefix_ends(file):
    case = Case(file)
    start, expected = max(case.expected.items())
    for shared in (case.shared + 1, case.ids.shape[1] - 1):
        assert relative(case.run(start, shared)[0][0], expected) <= 1e-5


def test_greedy_answer(file):
    """The answer goes on behind the question on the same cache, so it pins positions and masks of generated tokens too."""
    case = Case(file)
    expected = case.tokens.tolist()
    _, answers = case.run(max(case.expected), new_tokens=len(expected[0]))
    assert answers == expected
