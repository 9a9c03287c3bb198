"""Rollout of random models against the reference implementation's numbers, through the same packed passes that a clip takes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from decaf.attention.rollout import last_row_rollout
from decaf.mllm import MLLM, Layout, registry
from decaf.mllm.engine import TransformersEngine
from decaf.mllm.packed import Packed, PackedAttention, generate, run


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--golden").resolve()
    files = [f for f in sorted(folder.glob("*/*.safetensors")) if f.name != "model.safetensors" and (f.parent / "config.json").is_file()]
    reason = f"{folder} holds no model folder with inputs"
    params = [pytest.param(f, id=f"{f.parent.name}/{f.stem}") for f in files] or [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    metafunc.parametrize("file", params)


_models = {}
_exact = {}
_seen = {}


def load(folder) -> MLLM:
    if folder not in _models:
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        ).eval()
        model.generation_config.eos_token_id = None  # the reference was made to give a fixed number of tokens
        family, tokenizer = registry()[model.config.model_type], SimpleNamespace(eos_token_id=None)  # the files hold token ids
        vision = family.vision_shape(model.config)
        _models[folder] = MLLM(TransformersEngine(model), tokenizer, family, folder.name, vision, family.mean, family.std)
    return _models[folder]


class Case:
    """One golden file as the passes want it."""

    def __init__(self, file):
        self.file, self.mllm, data = file, load(file.parent), load_file(file)
        self.expected = {int(k.rsplit("start", 1)[1]): v for k, v in data.items() if k.startswith("expected.rollout_last_row.start")}
        self.tokens = data["expected.greedy_tokens"]
        self.ids, self.mask = data["input.input_ids"], data["expected.visual_token_mask"].bool()
        assert (self.mask == self.mask[0]).all() and (data["input.attention_mask"] == 1).all() and (self.ids == self.ids[0]).all()
        self.mask = self.mask[0]
        self.shared = int(self.mask.nonzero()[-1]) + 1
        pixels = {k[6:]: v.float() if v.is_floating_point() else v for k, v in data.items() if k.startswith("input.")}
        kind = "video" if "pixel_values_videos" in pixels else "image"
        names = {
            "video": ("pixel_values_videos", "video_grid_thw"),
            "image": ("pixel_values", "image_grid_thw", "image_sizes"),
        }[kind]
        grid, expected_grid = pixels.get(names[1]), data.get("expected.visual_grid_thw")
        merge = getattr(self.mllm.model.config.vision_config, "spatial_merge_size", 1)
        if expected_grid is not None:  # of the visual tokens in the prompt
            slots, rows, cols = expected_grid[0].tolist()
        else:
            slots, rows, cols = (1, 1, int(self.mask.sum())) if grid is None else (int(grid[0, 0]), *(int(n) // merge for n in grid[0, 1:]))
        batch = len(self.ids)
        self.layout = Layout(kind, (slots, rows, cols), (), batch, batch)
        self.pixels = {n: pixels[n] for n in names if n in pixels}

    @torch.inference_mode()
    def run(self, start, shared=None, new_tokens=0, block_bytes=None, later=False):
        """Rows of the prompt's question, asked twice, and its answers. `later`: the second time in a pass of its own, behind the same pictures."""
        shared = shared or self.shared
        encoded = self.encoded()
        positions = self.mllm.family.position_ids(self.mllm.vision, self.mask, self.layout)

        def packed(times):
            return Packed(self.layout, self.ids[0, :shared], self.mask[:shared], (self.ids[0, shared:],) * times, (positions,) * times)

        def attention(segments, past=None):
            return PackedAttention(segments, past=past, capture_from=start, keep=True)

        batch, first = len(self.ids), packed(1 if later else 2)
        answered = run(self.mllm, first, encoded, attention, batch=batch)
        asked = answered.attention.questions
        if later:
            past = answered.attention.kept.shared().cpu()
            asked = asked + run(self.mllm, packed(1), None, lambda segments: attention(segments, past), batch=batch).attention.questions
        rows = last_row_rollout(answered.attention.shared, asked, self.mask[:shared], block_bytes=block_bytes)
        said = generate(self.mllm, first, answered, [0], new_tokens, lambda: None)[0] if new_tokens else None
        return rows, said

    def encoded(self):
        """What the model's own tower makes of the pictures, in float64 and then rounded: how a tower's float32 rounds differs from one make of CPU to
        another by more than the bounds here, and none of it is ours."""
        if self.file not in _seen:
            dtype = next(self.mllm.model.parameters()).dtype
            rough = self.mllm.family.encode(self.mllm, self.layout, self.pixels).tokens
            self.mllm.model.double()
            pixels = {name: value.double() if value.is_floating_point() else value for name, value in self.pixels.items()}
            _seen[self.file] = self.mllm.family.encode(self.mllm, self.layout, pixels)
            self.mllm.model.to(dtype)
            assert relative(rough, _seen[self.file].tokens) <= 1e-5
        fine, dtype = _seen[self.file], next(self.mllm.model.parameters()).dtype
        return replace(fine, tokens=fine.tokens.to(dtype), deepstack=tuple(level.to(dtype) for level in fine.deepstack))

    def exact(self, start):
        """The row from passes in float64, once per file and start."""
        if (self.file, start) not in _exact:
            self.mllm.model.double()
            _exact[self.file, start] = self.run(start)[0][0]
            self.mllm.model.float()
        return _exact[self.file, start]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def close(exact, found, expected):
    """To 1e-5. Some rows of the reference are further than that from exact arithmetic, and then nearer to it than the reference is."""
    assert relative(exact, expected) <= 5e-5
    assert relative(found, expected) <= 1e-5 or relative(found, exact) <= relative(exact, expected)


def all_close(case, start, found, expected):
    exact = case.exact(start)
    close(exact, found, expected)
    close(*(row[:, : len(case.mask)][:, case.mask] for row in (exact, found, expected)))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("block_bytes", [None, 1 << 12])
def test_rollout(file, block_bytes, later):
    case = Case(file)
    assert case.expected
    for start, expected in case.expected.items():
        for row in case.run(start, block_bytes=block_bytes, later=later)[0]:
            all_close(case, start, row, expected)


def test_rollout_does_not_depend_on_where_the_prefix_ends(file):
    case = Case(file)
    start, expected = max(case.expected.items())
    for shared in (case.shared + 1, case.ids.shape[1] - 1):
        all_close(case, start, case.run(start, shared)[0][0], expected)


def test_greedy_answer(file):
    """The answer goes on behind the question on the same cache, so it pins positions and masks of generated tokens too."""
    case = Case(file)
    expected = case.tokens.tolist()
    _, answers = case.run(max(case.expected), new_tokens=len(expected[0]))
    assert answers == expected
