"""Options and fixtures that all tests share."""

from pathlib import Path

import pytest
import tiny_models
import torch

TESTS = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption(
        "--golden", default=TESTS / "golden" / "data", type=Path, help="folder of golden numbers, laid out like tests/golden/data"
    )


@pytest.fixture(scope="session")
def golden(request) -> Path:
    folder = request.config.getoption("--golden").resolve()
    if not folder.is_dir():
        raise pytest.UsageError(f"--golden {folder} is not a folder")
    return folder


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def mllm_folder(tmp_path_factory):
    """mllm_folder(family) -> folder of a random tiny model (see tiny_models), made once a session. Not to be written to."""
    made = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tiny_models.make_mllm(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder
