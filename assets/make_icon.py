"""Makes icon.png and banner.png, which the registry shows: `python assets/make_icon.py` (about 20 seconds on a CPU, nothing is downloaded).

The icon is a frame of a made-up clip with the object that the sentence means in the spotlight; the banner has the clip, the heat map and the mask
beside the sentence. All of it comes from one run of the library with the bundled models.
"""

from __future__ import annotations

from pathlib import Path

import torch
from make_animation import FRAMES, INK, PAPER, QUERY, QUIET, SEED
from PIL import Image, ImageDraw

import decaf
from decaf.clips import clip_from_images
from decaf.demo import MLLM_FOLDER, SAM2_FILE
from decaf.demo.scenes import make_scene
from decaf.pictures.drawing import cut_out, heat_overlay
from decaf.pictures.lettering import write

HERE = Path(__file__).parent
ICON = 400
BANNER = (1260, 540)  # 21:9
SHOWN = 5  # the frame of the clip


def main() -> None:
    scene = make_scene(SEED, length=FRAMES, count=(3, 4))
    clip = clip_from_images(torch.from_numpy(scene.frames))
    result = decaf.segment_clip(decaf.load_mllm(MLLM_FOLDER), decaf.load_sam2(SAM2_FILE), clip, QUERY)
    frame, mask = clip[SHOWN], result.tracks.union()[SHOWN]
    icon(cut_out(frame, mask), mask).save(HERE / "icon.png", optimize=True)
    banner([frame, heat_overlay(frame, result.fused.map[SHOWN]), cut_out(frame, mask)]).save(HERE / "banner.png", optimize=True)


def icon(picture: torch.Tensor, mask: torch.Tensor) -> Image.Image:
    """A square around the object, three times as wide as it."""
    height, width = mask.shape
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    x, y = (int(columns.min()) + int(columns.max())) / 2, (int(rows.min()) + int(rows.max())) / 2
    side = min(height, 3 * max(int(columns.max() - columns.min()), int(rows.max() - rows.min())))
    left, top = (int(max(0, min(middle - side / 2, whole - side))) for middle, whole in ((x, width), (y, height)))
    square = Image.fromarray(picture.numpy()).crop((left, top, left + side, top + side)).resize((ICON, ICON), Image.Resampling.LANCZOS)
    rounded = Image.new("L", (4 * ICON, 4 * ICON), 0)
    ImageDraw.Draw(rounded).rounded_rectangle((0, 0, 4 * ICON - 1, 4 * ICON - 1), radius=ICON // 2, fill=255)
    square.putalpha(rounded.resize((ICON, ICON), Image.Resampling.LANCZOS))
    return square


def banner(pictures: list[torch.Tensor]) -> Image.Image:
    picture = Image.new("RGB", BANNER, PAPER)
    write(picture, (40, 44), "DecAF", 64, INK)
    write(picture, (40, 128), "Type a sentence, get a mask for every frame of your video.", 30, QUIET)
    write(picture, (40, 184), f"“{QUERY}”", 30, INK)
    gap, width = 20, (BANNER[0] - 2 * 40 - 2 * 20) // 3
    for column, one in enumerate(pictures):
        shown = Image.fromarray(one.numpy())
        height = min(BANNER[1] - 250 - 24, width * shown.height // shown.width)
        shown = shown.resize((width, width * shown.height // shown.width), Image.Resampling.LANCZOS)
        cut = (shown.height - height) // 2
        picture.paste(shown.crop((0, cut, width, cut + height)), (40 + column * (width + gap), 250))
    return picture


if __name__ == "__main__":
    main()
