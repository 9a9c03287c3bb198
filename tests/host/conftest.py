"""A ComfyUI to test with, tiny models where it looks for them, and its page. Without a ComfyUI the tests here are skipped."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import tiny_models
import tiny_sam2
import torch
from comfy_host import Server, find_host
from comfy_page import chromium, open_page
from PIL import Image

from decaf.video import write_video

FRAMES, HEIGHT, WIDTH = 12, 72, 96


@pytest.fixture(scope="session")
def host():
    found = find_host()
    if isinstance(found, str):
        pytest.skip(found)
    probe = subprocess.run([found.python, "-c", "import sam2, transformers"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"the requirements of this pack are not installed in {found.python}: {probe.stderr.strip().splitlines()[-1]}")
    return found


def moving_square(frames: int = FRAMES) -> torch.Tensor:
    """(frames, HEIGHT, WIDTH, 3) uint8: a red square that crosses a grey gradient."""
    ramp = torch.linspace(60, 180, WIDTH).to(torch.uint8)
    clip = ramp[None, None, :, None].repeat(frames, HEIGHT, 1, 3)
    for index in range(frames):
        left = 8 + index * 5
        clip[index, 24:48, left : left + 24] = torch.tensor([220, 30, 30], dtype=torch.uint8)
    return clip


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A base directory for ComfyUI: models/LLM and models/sam2 with tiny models, input with a clip and a picture."""
    base = tmp_path_factory.mktemp("comfy")
    for family in tiny_models.FAMILIES:
        tiny_models.make_mllm(base / "models" / "LLM" / f"tiny_{family}", family)
    (base / "models" / "sam2").mkdir()
    tiny_sam2.make_sam2(base / "models" / "sam2" / "tiny_sam2.safetensors")
    (base / "input").mkdir()
    clip = moving_square()
    write_video(base / "input" / "clip.mp4", iter(clip), 12, (HEIGHT, WIDTH))
    Image.fromarray(np.asarray(clip[0])).save(base / "input" / "example.png")
    return base


@pytest.fixture(scope="session")
def server(host, base):
    with Server(host, base) as server:
        yield server


@pytest.fixture(scope="session")
def page(server):
    if chromium() is None:
        pytest.skip("no chromium on this machine")
    with open_page(server.url) as page:
        yield page
