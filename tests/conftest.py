"""Options and fixtures that all tests share."""

import os
from fractions import Fraction
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers  # noqa: F401 (now, since its log keeps the stderr of that moment, which later is a test's own and closed)
from short_runs import FRAMES, KEYS, SIZE, picture

TESTS = Path(__file__).parent

# The models here are tiny: a second thread costs more than it brings, and with other work on the machine ten times as much. And tests that
# two ways are equal to the bit need equal numbers of threads.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for child processes


def pytest_addoption(parser):
    parser.addoption(
        "--golden", default=TESTS / "golden" / "data", type=Path, help="folder of golden numbers, laid out like tests/golden/data"
    )
    parser.addoption("--gpu-report", type=Path, metavar="FILE.md", help="table of what tests/gpu computes and measures; JSON beside it")
    parser.addoption("--all", action="store_true", help="run the slow tests, too, as .ci/run does")
    parser.addoption(
        "--long", action="store_true", help="run the long forms of the fuzz, kill and memory tests, and checks that start a server"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: those that take the longest, and of many alike all but a few; left out unless --all is given")


def pytest_report_header(config):
    return None if _runs_slow(config) else "the slow tests are left out; --all runs them, too"


def pytest_collection_modifyitems(config, items):
    if _runs_slow(config):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


def _runs_slow(config) -> bool:
    return config.getoption("--all") or config.getoption("--long")


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


@pytest.fixture(scope="session")
def sam2_file(tmp_path_factory) -> Path:
    """Checkpoint of a random tiny SAM 2.1, made once a session. Not to be written to."""
    import tiny_sam2

    return tiny_sam2.make_sam2(tmp_path_factory.mktemp("sam2") / "tiny.safetensors")


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    from decaf.clips import write_video

    path = tmp_path_factory.mktemp("clip") / "square.mp4"
    write_video(path, (picture(index) for index in range(FRAMES)), Fraction(25), SIZE)
    return path


@pytest.fixture
def line(clip_file, mllm_folder, sam2_file, tmp_path):
    """line("--more", family=...) -> the arguments of a short run into tmp_path / "out"."""

    def arguments(*more, family="qwen2_5_vl", clip=clip_file, query="the red square"):
        models = ["--mllm", str(mllm_folder(family)), "--sam2", str(sam2_file)]
        limits = ["--max-key-frames", str(KEYS), "--tokens-per-frame", "16", "--device", "cpu"]
        return ["segment", str(clip), "--query", query, *models, "--out", str(tmp_path / "out"), *limits, *more]

    return arguments
