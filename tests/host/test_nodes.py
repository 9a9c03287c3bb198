"""The nodes with the real comfy_api: every case of cases_*.py, run inside ComfyUI's Python."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from comfy_cases import Cases
from comfy_host import PACK
from slow import slow_but

HERE = Path(__file__).parent
CASES = [
    item.name
    for file in sorted(HERE.glob("cases_*.py"))
    for item in ast.parse(file.read_text(encoding="utf-8")).body
    if getattr(item, "name", "").startswith("case_")
]

_SLOW = re.compile(r"_the_same|float8|fp8|bf16|_memory_|without_room|three_families|encodes_nothing_again|^case_core_(?!model_is_loaded)")
"""What is computed twice or by several models, from weights that lie in two places or in two forms; and all but one of what needs a text encoder
of ComfyUI's."""


@pytest.fixture(scope="session")
def cases(request, host, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inside")
    chosen = [item.callspec.params["case"] for item in request.session.items if getattr(item, "originalname", "") == "test_case"]
    settings = {"pack": str(PACK), "base": str(base), "scratch": str(folder)}
    cases = Cases([host.python, HERE / "inside.py"], chosen, settings, folder, env=host.environment())
    yield cases
    cases.close()


@pytest.mark.parametrize("case", slow_but(CASES, [case for case in CASES if not _SLOW.search(case)]))
def test_case(cases, case):
    error = cases.error(case)
    assert error is None, error


FAKE = """
import json, os, sys, time
for name in json.load(open(sys.argv[1]))["cases"]:
    print(json.dumps({"begin": name}), flush=True)
    if name == "hangs": time.sleep(60)
    if name == "dies": os._exit(3)
    print(json.dumps({"case": name, "error": "wrong" if name == "fails" else None}), flush=True)
"""


def test_a_case_that_hangs_or_dies_is_one_failure(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    names = ["one", "hangs", "two", "dies", "fails", "three"]
    cases = Cases([sys.executable, tmp_path / "fake.py"], names, {}, tmp_path, limit=1.0)
    found = {name: cases.error(name) for name in names}
    cases.close()
    assert [name for name in names if found[name] is None] == ["one", "two", "three"]
    assert "1 seconds" in found["hangs"] and "exit code 3" in found["dies"] and found["fails"] == "wrong"


def test_a_process_that_does_not_begin_fails_every_case_at_once(tmp_path):
    cases = Cases([sys.executable, "-c", "raise SystemExit('no torch here')"], ["one", "two"], {}, tmp_path)
    assert all("before its first case" in cases.error(name) and "no torch here" in cases.error(name) for name in ("one", "two"))
