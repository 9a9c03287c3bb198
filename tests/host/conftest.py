"""A ComfyUI to test with, tiny models where it looks for them, and its page. Without a ComfyUI the tests here are skipped."""

from __future__ import annotations

import pytest
import small_core
import tiny_models
import tiny_sam2
from comfy_host import HostBroken, PackBroken, Server, check_requirements, find_host, running
from comfy_page import chromium, open_browser
from make_workflows import red_square
from PIL import Image

from decaf.clips import write_video


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
    """A base directory for ComfyUI: models/LLM and models/sam2 with tiny models, input with a clip and a picture."""
    base = tmp_path_factory.mktemp("comfy")
    for family in tiny_models.FAMILIES:
        tiny_models.make_mllm(base / "models" / "LLM" / f"tiny_{family}", family)
    small_core.make_all(base / "models")
    (base / "models" / "sam2").mkdir()
    tiny_sam2.make_sam2(base / "models" / "sam2" / "tiny_sam2.safetensors")
    (base / "input").mkdir()
    clip = red_square(12, 72, 96)
    write_video(base / "input" / "clip.mp4", clip, 12, (72, 96))
    Image.fromarray(clip[0].numpy()).save(base / "input" / "example.png")
    return base


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
