"""J and F against the numbers of the benchmark's own code."""

import pytest
import torch
from safetensors.torch import load_file

from decaf.metrics import contour_accuracy, region_similarity


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--golden").resolve() / "metrics"
    files = sorted(folder.glob("*.safetensors"))
    none = pytest.param(None, marks=pytest.mark.skip(reason=f"{folder} holds no .safetensors file"))
    metafunc.parametrize("case", files or [none], ids=[file.stem for file in files] or None, indirect=True)


@pytest.fixture
def case(request):
    return load_file(request.param)


def test_region_similarity(case):
    actual = region_similarity(case["input.prediction"], case["input.ground_truth"])
    torch.testing.assert_close(actual, case["expected.J"], rtol=0, atol=1e-12)


def test_contour_accuracy(case):
    actual = contour_accuracy(case["input.prediction"], case["input.ground_truth"])
    torch.testing.assert_close(actual, case["expected.F"], rtol=0, atol=1e-12)
