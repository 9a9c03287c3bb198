"""The module `sam2`: found, missing, in pieces, or another one of that name; and what goes on working without it."""

import importlib.machinery
import importlib.metadata
import subprocess
import sys

import pytest

from decaf.errors import DecafError
from decaf.sam2.package import sam2_package


@pytest.fixture
def lookup(monkeypatch):
    """The package as in a process that has not imported it yet. Call with module names and lists of folders: they are looked for in these alone;
    in an empty list they are missing."""

    def look(**places):
        monkeypatch.setattr(
            importlib.machinery.PathFinder, "find_spec", lambda name, path=None, target=None: find(name, places.get(name, path), target)
        )
        # pytest's own finder keeps the true function, and asks it for packages that bring a plugin, as Hydra does.
        monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if "pytest" not in type(one).__module__])
        for name in [one for one in sys.modules if one.partition(".")[0] in {"sam2", *places}]:
            monkeypatch.delitem(sys.modules, name)

    find = importlib.machinery.PathFinder.find_spec
    sam2_package()  # what is imported by now is there again after the test
    sam2_package.cache_clear()
    yield look
    sam2_package.cache_clear()


def complaint() -> str:
    with pytest.raises(DecafError) as caught:
        sam2_package()
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["", "import nothing_of_this_name\n", "raise OSError('a library of it is not there')\n", "1 / 0\n", "def broken(:\n"],
)
def test_a_module_in_the_way_is_named(tmp_path, lookup, content):
    (tmp_path / "sam2").mkdir()
    (tmp_path / "sam2" / "__init__.py").write_text(content)
    lookup(sam2=[str(tmp_path)])
    said = complaint()
    assert str(tmp_path / "sam2") in said and "disable or rename" in said and "rf-sam-2" in said


def test_a_folder_without_code_is_named(tmp_path, lookup):
    """What an uninstalled package has left behind, or a folder of checkpoints, is a module to Python."""
    (tmp_path / "sam2").mkdir()
    lookup(sam2=[str(tmp_path)])
    said = complaint()
    assert str(tmp_path / "sam2") in said and "not a working sam2 package" in said


def test_an_older_version_is_told(monkeypatch, lookup):
    class Older:
        def __init__(self, image_encoder): ...

    monkeypatch.setattr("sam2.modeling.sam2_base.SAM2Base", Older)
    assert "older than SAM 2.1" in complaint()


def test_a_missing_package_says_how_to_install_it(monkeypatch, lookup):
    versions = {"rf-sam-2": "1.0.3"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    lookup(sam2=[])
    said = complaint()
    assert "The Python package sam2" in said and "is missing" in said and f'"{sys.executable}" -m pip install' in said
    assert "--force-reinstall --no-deps rf-sam-2 " in said, "pip would do nothing: another package took the files along"
    versions.clear()
    assert "-m pip install rf-sam-2 " in complaint()


@pytest.mark.parametrize("module, distribution", [("hydra", "hydra-core"), ("iopath", "iopath")])
def test_what_the_package_needs_is_named(lookup, module, distribution):
    lookup(**{module: []})
    said = complaint()
    assert f"needs {module}, which is missing" in said and f" {distribution} " in said


def run_python(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_hydra_is_left_as_it_was(tmp_path):
    run = run_python(
        "from hydra.core.global_hydra import GlobalHydra\n"
        "from decaf.sam2.package import sam2_package\n"
        "sam2_package()\n"
        "assert not GlobalHydra.instance().is_initialized()\n"
        "import hydra\n"
        "hydra.initialize(version_base=None)\n",
        tmp_path,
    )
    assert run.returncode == 0, run.stderr


WITHOUT = """
import importlib, pkgutil
from importlib.machinery import PathFinder

find, missing = PathFinder.find_spec, ("sam2", "hydra", "iopath")
PathFinder.find_spec = lambda name, path=None, target=None: None if name in missing else find(name, path, target)

import torch
import decaf
from decaf.clips import clip_from_images
from decaf.demo import MLLM_FOLDER, SAM2_FILE

for entry in pkgutil.walk_packages(decaf.__path__, "decaf."):
    if entry.name.rpartition(".")[2] not in ("__main__", "rollout_triton"):  # the latter needs Triton, and is asked for with it alone
        importlib.import_module(entry.name)
mllm = decaf.load_mllm(MLLM_FOLDER)
[(thing, rest)] = decaf.extract_attentions(mllm, clip_from_images(torch.rand(2, 64, 64, 3)), ["the red ball"])
assert thing.frame.isfinite().all()
try:
    decaf.load_sam2(SAM2_FILE)
except decaf.DecafError as error:
    assert "pip install" in str(error), error
else:
    raise SystemExit("SAM 2 was loaded without its package")
"""


@pytest.mark.slow
def test_without_the_package_the_rest_works(tmp_path):
    """Every room is imported and the bundled model is asked about a clip; only loading SAM 2 says what is missing."""
    run = run_python(WITHOUT, tmp_path)
    assert run.returncode == 0, run.stderr
