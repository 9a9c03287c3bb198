"""What the repository promises about itself: its size, what an import costs, what is packed, and code that must not appear."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import decaf
from decaf.mllm import all_families

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
MB = 1 << 20


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [path for name in listed.decode().split("\0") if name and (path := ROOT / name).is_file()]


def is_binary(path: Path) -> bool:
    return b"\0" in path.read_bytes()[:8192]


def lines(paths, pattern: str) -> list[str]:
    """`file:line: text` of every line in text files that matches."""
    found = []
    for path in paths:
        if is_binary(path) or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:160]}")
    return found


def shipped() -> list[Path]:
    """Python that runs on a user's machine."""
    code = [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("decaf", "nodes", "__init__.py")]
    assert len(code) > 10
    return code


def calls(path: Path, *names: str) -> list[ast.Call]:
    """Calls of functions or methods of these names in a Python file."""
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in tree if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in names]


def test_no_code_of_a_model_folder_is_asked_for():
    """Left out, the library asks on the terminal, and runs it after a yes."""
    found = 0
    for path in tracked():
        for call in calls(path, "from_pretrained", "from_config") if path.suffix == ".py" else ():
            given = {keyword.arg: keyword.value for keyword in call.keywords}.get("trust_remote_code")
            assert isinstance(given, ast.Constant) and given.value is False, f"{path.relative_to(ROOT)}:{call.lineno}"
            found += path.relative_to(ROOT).parts[0] == "decaf"
    assert found >= 3


def test_sizes():
    sizes = {path: path.stat().st_size for path in tracked()}
    assert [str(path) for path, size in sizes.items() if size > 10 * MB] == []
    assert sum(size for path, size in sizes.items() if is_binary(path)) < 30 * MB


def test_no_hosts_or_paths_of_one_machine():
    hosts = r"pypi\.org|pythonhosted\.org|npmjs\.|index-url|registry\.yarnpkg|deb\.debian|://(localhost|127\.0\.0\.1):(80|3128|8081)\b"
    folders = r"(^|[\s\"'(=:])/(root|work|home|Users)/\w"
    assert lines(tracked(), hosts) == []
    assert lines(tracked(), folders) == []


@pytest.mark.parametrize(
    "pattern",
    [
        r"trust_remote_code\s*=\s*True",
        r"sys\.path\.(insert|append|extend)|sys\.path\s*=",
        r"\.cuda\(",
        r"torch\.load\((?!.*weights_only=True)",
        r"pickle\.loads?\b|Unpickler\b|\b(eval|exec)\((?!\))|os\.system|^\s*import subprocess",
        r"^\s*print\(",
        r"^\s*assert ",
        r"TODO|FIXME|NotImplementedError",
    ],
)
def test_shipped_code_keeps_the_rules(pattern):
    found = [line for line in lines(shipped(), pattern) if not re.search(r"\.(eval|exec)\(", line)]
    assert found == []


def test_files_can_be_read_in_one_sitting():
    assert [str(path) for path in shipped() if len(path.read_text(encoding="utf-8").splitlines()) > 400] == []


def test_requirements_are_the_project_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    assert [line for line in listed if line and not line.startswith("#")] == project["dependencies"]
    for dependency in project["dependencies"]:
        assert not re.search(r"==|<|~=|;|@", dependency), f"{dependency} caps or pins a version that other packs share"
    assert {"torch", "torchvision", "numpy"} <= set(project["dependencies"]), "their versions are the user's own business"


DISTRIBUTIONS = {"PIL": "pillow", "sam2": "rf-sam-2", "hydra": "hydra-core"}
"""What installs a module, where that has another name."""

NOT_OURS = {
    "scipy": "an extra: comes with ComfyUI, and what needs it says so where it is missing",
    "ray": "an extra: imported only by decaf.bulk.on_ray, when it is asked for and installed",
    "triton": "comes with PyTorch where PyTorch has it; imported only then",
    **dict.fromkeys(["comfy", "comfy_api", "comfy_execution", "comfyui_version", "folder_paths", "server"], "ComfyUI, for the nodes"),
}


def imported_modules() -> dict[str, str]:
    """Top-level name of every module that shipped code imports, by an import statement or by its name -> where."""
    found = {}
    for path in shipped():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
                names = [text.value for text in ast.walk(node.args[0]) if isinstance(text, ast.Constant)]
            found |= {name.partition(".")[0]: f"{path.relative_to(ROOT)}:{node.lineno}" for name in names if not name.startswith(".")}
    return {name: place for name, place in found.items() if name and name not in sys.stdlib_module_names and name != "decaf"}


def test_what_is_imported_is_installed():
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    listed = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in listed}
    imported = imported_modules()
    assert {"torch", "numpy", "PIL", "transformers", "sam2", "hydra", "huggingface_hub"} <= set(imported), "the search finds imports"
    missing = {
        name: place
        for name, place in imported.items()
        if name not in NOT_OURS and DISTRIBUTIONS.get(name, name).replace("_", "-") not in listed
    }
    assert missing == {}
    needed_by_others = {"torchvision"}  # SAM 2's package and the picture processors of transformers
    assert listed - needed_by_others <= {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in imported}, "nothing is listed in vain"


def modules_after(code: str) -> set[str]:
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nsys.stderr.write(' '.join(sys.modules))"], capture_output=True, text=True, check=True
    )
    return set(shown.stderr.split())


@pytest.mark.parametrize(
    "code", ["import decaf", "import decaf.command.main\ntry:\n    decaf.command.main.main(['segment', '--help'])\nexcept SystemExit:\n    pass"]
)
def test_imports_nothing_heavy(code):
    assert modules_after(code) & {"torch", "numpy", "transformers", "sam2", "av", "PIL"} == set()


def test_every_public_name_is_there():
    for name in decaf.__all__:
        assert getattr(decaf, name) is not None, name


def test_wheel_holds_the_library_alone(tmp_path):
    if not shutil.which("uv"):
        pytest.skip("uv, which builds the wheel, is not on PATH")
    built = subprocess.run(["uv", "build", "--wheel", "--out-dir", tmp_path, ROOT], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"decaf"}
    packed = {name for name in names if name.startswith("decaf/") and name.endswith(".py")}
    assert packed == {path.relative_to(ROOT).as_posix() for path in (ROOT / "decaf").rglob("*.py")}
    assert {"decaf/demo/models/mllm/model.safetensors", "decaf/demo/models/sam2.safetensors"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_ci_runs_what_the_readme_tells():
    command = "uv run pytest"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert any(line.split(" ||")[0].strip() == command for line in script)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_what_the_checks_name_is_there():
    scripts = [ROOT / ".ci" / "run", *(ROOT / ".github" / "workflows").glob("*.yml")]
    named = [name for script in scripts for name in re.findall(r"\btests/[\w./*-]+", script.read_text(encoding="utf-8"))]
    assert len(named) > 10 and [name for name in named if not list(ROOT.glob(name))] == []


def test_the_help_page_lists_the_families_of_the_registry():
    page = (ROOT / "web" / "docs" / "LoadMLLM.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in page if line.startswith("|")][2:]
    listed = lambda names: ", ".join(f"`{name}`" for name in names)  # noqa: E731
    assert rows == [f"| {one.title} | {listed(one.model_types)} | {listed(one.repositories)} |" for one in all_families()]


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert local and all((ROOT / link).is_file() for link in local), local
