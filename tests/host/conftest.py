"""A ComfyUI to test with, tiny models where it looks for them, and its page. Without a ComfyUI the tests here are skipped."""

from __future__ import annotations

import pytest
from comfy_base import make_base
from comfy_host import HostBroken, PackBroken, Server, check_requirements, find_host, running
from comfy_page import chromium, open_browser


@pytest.fixture(scope="session")
def host():
    found = find_host()
    if isinstance(found, str):
        pytest.skip(found)
    try:
        check_requirements(found)
    except HostBroken as reason:
        pytest.skip(str(reason))
    return found


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A base directory for ComfyUI: models/LLM, models/text_encoders and models/sam2 with tiny models, input with a clip and a picture."""
    return make_base(tmp_path_factory.mktemp("comfy"))


@pytest.fixture(scope="session")
def server(host, base, tmp_path_factory):
    try:
        with running(Server(host, base), tmp_path_factory.mktemp("bare")) as server:
            yield server
    except HostBroken as reason:
        pytest.skip(str(reason))
    except PackBroken as reason:
        pytest.fail(str(reason), pytrace=False)


@pytest.fixture(scope="session")
def browser():
    if chromium() is None:
        pytest.skip("no chromium on this machine")
    with open_browser() as browser:
        yield browser
