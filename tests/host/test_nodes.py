"""The nodes with the real comfy_api: every case of cases_*.py, run inside ComfyUI's Python."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import pytest
from comfy_host import PACK

HERE = Path(__file__).parent
CASES = [
    item.name
    for file in sorted(HERE.glob("cases_*.py"))
    for item in ast.parse(file.read_text(encoding="utf-8")).body
    if getattr(item, "name", "").startswith("case_")
]


@pytest.fixture(scope="session")
def results(host, base, tmp_path_factory) -> dict[str, dict]:
    settings = tmp_path_factory.mktemp("inside") / "settings.json"
    settings.write_text(json.dumps({"pack": str(PACK), "base": str(base), "scratch": str(settings.parent)}))
    run = subprocess.run(
        [host.python, HERE / "inside.py", settings],
        cwd=settings.parent,
        env=host.environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"case"')]
    return {line["case"]: line for line in lines} | {"": {"error": run.stderr[-3000:]}}


@pytest.mark.parametrize("case", CASES)
def test_case(results, case):
    assert case in results, results[""]["error"]
    assert results[case]["error"] is None, results[case]["error"]
