"""Tests that ask for `case` run once for every file of the folder that their module names in GOLDEN, whatever the files are called."""

import pytest
from safetensors.torch import load_file


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames and hasattr(metafunc.module, "GOLDEN"):
        folder = metafunc.config.getoption("--golden").resolve() / metafunc.module.GOLDEN
        files = sorted(folder.glob("*.safetensors"))
        none = pytest.param(None, marks=pytest.mark.skip(reason=f"{folder} holds no .safetensors file"))
        metafunc.parametrize("case", files or [none], ids=[file.stem for file in files] or None, indirect=True)


@pytest.fixture
def case(request):
    return load_file(request.param)
