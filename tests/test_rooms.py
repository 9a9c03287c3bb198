"""How the library is built: rooms, and imports that lead down alone, so that a reader can take one room after the other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "decaf"

FLOORS = (
    ("__main__",),
    ("command",),
    ("evaluation",),
    ("bulk",),
    ("results",),
    ("pipeline", "pictures"),
    ("segmenters",),
    ("sam3",),
    ("sam2",),
    ("tracking", "attention", "finishing"),
    ("mllm", "clips", "demo"),
    ("data", "files", "folder_lock"),
    ("masks", "paths", "report", "settings"),
    ("devices", "contours"),
    ("errors",),
)
"""From the roof to the cellar. A room may import those on floors below it."""


def imports(file: Path) -> list[tuple[int, tuple[str, ...]]]:
    """(line, module of decaf) of every import in a file, those inside functions included."""
    package = file.relative_to(ROOT).parts[:-1]
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            named = tuple((node.module or "").split(".")) if node.module else ()
            for alias in node.names:
                # A name may be a module or something in one.
                whole = (*base, *named, alias.name)
                exists = (ROOT.joinpath(*whole)).is_dir() or ROOT.joinpath(*whole).with_suffix(".py").is_file()
                found.append((node.lineno, whole if exists else (*base, *named)))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "decaf" for name in names), f"{file}:{node.lineno}: imports of decaf in decaf are relative"
    return found


FILES = sorted(file for file in ROOT.rglob("*.py") if file.name != "__init__.py" or file.parent != ROOT)


def test_every_room_has_a_floor():
    rooms = {file.relative_to(ROOT).with_suffix("").parts[0] for file in FILES}
    assert rooms == {room for floor in FLOORS for room in floor}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_lead_down(file):
    floor = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    room = file.relative_to(ROOT).with_suffix("").parts[0]
    climbing = [
        f"line {line}: {room} imports {target[0]}, which is not below it"
        for line, target in imports(file)
        if target and target[0] != room and floor[target[0]] <= floor[room]
    ]
    assert not climbing


def test_no_circles():
    """Within rooms too."""

    def name(file: Path) -> tuple[str, ...]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        return parts[:-1] if parts[-1] == "__init__" else parts

    arrows = {name(file): {target for _, target in imports(file) if target != name(file)} for file in FILES}
    done, path = set(), []

    def visit(module):
        if module in path:
            circle = [*path[path.index(module) :], module]
            raise AssertionError("a circle of imports: " + " -> ".join(".".join(one) for one in circle))
        if module in done:
            return
        path.append(module)
        for target in sorted(arrows.get(module, ())):
            # A room's __init__ gathers its modules; they may know it by its own name only from outside.
            if target != module[:-1]:
                visit(target)
        done.add(path.pop())

    for module in sorted(arrows):
        visit(module)


def test_only_one_room_knows_sam2_s_package():
    for file in FILES:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        known = {name.split(".")[0] for name in names}
        assert "sam2" not in known or file.parent.name == "sam2", file
        if file.parent.name not in ("mllm", "families", "sam3", "command"):
            assert "transformers" not in known, file


def test_importing_the_library_costs_nothing():
    told = "import sys, time; a = time.perf_counter(); import decaf; b = time.perf_counter(); print(b - a, 'torch' in sys.modules)"
    times = []
    for _ in range(5):
        seconds, heavy = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout.split()
        assert heavy == "False"
        times.append(float(seconds))
    assert min(times) < 0.005
