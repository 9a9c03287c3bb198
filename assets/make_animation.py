"""Makes decaf.webp, the moving picture of the README: `python assets/make_animation.py` (about 20 seconds on a CPU, nothing is downloaded).

Three panels side by side: the clip while the query is typed, what the model looked at, and the mask. All of it comes from one run of the
library with the bundled models.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw

import decaf
from decaf.clips import clip_from_images
from decaf.demo import MLLM_FOLDER, SAM2_FILE
from decaf.demo.scenes import make_scene
from decaf.pictures.drawing import cut_out, heat_overlay
from decaf.pictures.lettering import write

SEED, FRAMES = 11, 16
QUERY = "the one to the left of the white one"
PANEL, GAP, TOP = (312, 240), 10, 84
WIDTH, HEIGHT = 3 * PANEL[0] + 4 * GAP, TOP + PANEL[1] + GAP
TITLES = ("your clip", "what the model looks at", "the mask")
PAPER, INK, QUIET, EMPTY = (18, 20, 26), (240, 242, 246), (150, 158, 172), (34, 37, 46)
MILLISECONDS = 100


def main() -> None:
    scene = make_scene(SEED, length=FRAMES, count=(3, 4))
    clip = clip_from_images(torch.from_numpy(scene.frames))
    mllm, sam2 = decaf.load_mllm(MLLM_FOLDER), decaf.load_sam2(SAM2_FILE)
    result = decaf.segment_clip(mllm, sam2, clip, QUERY)
    masks = result.tracks.union()
    columns = (
        [clip[i] for i in range(FRAMES)],
        [heat_overlay(clip[i], result.fused.map[i]) for i in range(FRAMES)],
        [cut_out(clip[i], masks[i]) for i in range(FRAMES)],
    )
    panels = [[Image.fromarray(one.numpy()).resize(PANEL, Image.Resampling.LANCZOS) for one in column] for column in columns]
    # The clip alone while the query is typed, then the heat map beside it, then the mask for two rounds.
    pictures = [_picture(panels, i, 1, QUERY[: len(QUERY) * (i + 1) // (FRAMES - 2)]) for i in range(FRAMES)]
    pictures += [_picture(panels, i, 2, QUERY) for i in range(FRAMES)]
    pictures += [_picture(panels, i, 3, QUERY) for i in range(FRAMES)] * 2
    out = Path(__file__).parent / "decaf.webp"
    pictures[0].save(out, save_all=True, append_images=pictures[1:], duration=MILLISECONDS, loop=0, quality=68, method=6)


def _picture(panels: list[list[Image.Image]], frame: int, shown: int, typed: str) -> Image.Image:
    """One frame of the animation, with the first `shown` of the three panels."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    write(picture, (GAP, 10), f"“{typed}" + ("”" if typed == QUERY else "_"), 26, INK)
    for column, title in enumerate(TITLES):
        left = GAP + column * (PANEL[0] + GAP)
        write(picture, (left, TOP - 28), title, 16, QUIET if column < shown else EMPTY)
        if column < shown:
            picture.paste(panels[column][frame], (left, TOP))
        else:
            ImageDraw.Draw(picture).rectangle((left, TOP, left + PANEL[0] - 1, TOP + PANEL[1] - 1), fill=EMPTY)
    return picture


if __name__ == "__main__":
    main()
