"""Where a large MASK lies. Run by inside.py; each raises when something is wrong."""

import os
import shutil
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import torch
from kit import module

SHAPE = 48, 512, 1024
"""Frames, height, width: 96 MB."""


@contextmanager
def changed(place, name, value):
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def resident() -> float:
    """Megabytes of RAM that this process holds, those of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def dense_masks():
    """Tracks whose object covers every pixel, in another way on each frame; and the mask that is to come of them."""
    frames = torch.ones(SHAPE, dtype=torch.bool)
    frames[:, ::2, ::3] = False
    for index, frame in enumerate(frames):
        frame[index] = False
    return module("decaf.finishing").tracks_from_masks(frames), frames


def filled(tracks) -> torch.Tensor:
    return module("nodes.host").tracks_mask(tracks, lambda *_: None)


def case_a_large_mask_that_nobody_reads_takes_no_memory():
    memory = module("nodes.mask_memory")
    tracks, frames = dense_masks()
    if not Path("/proc/self/statm").exists():
        return
    filled(module("decaf.finishing").tracks_from_masks(frames[:1]))  # what is loaded and allocated once
    with changed(memory, "LARGE", 1 << 20), changed(memory, "_UNSETTLED", 4 << 20):
        before = resident()
        mask = filled(tracks)
        mapped = resident() - before
        assert mapped < 30, f"{mapped:.0f} MB of 96"
        assert torch.equal(mask, frames.float()), "it is all there when it is read"
        mask[3] = 0.25  # other nodes may write into it
        memory.MaskMemory((1,))
        assert bool((mask[3] == 0.25).all()) and torch.equal(mask[4], frames[4].float())
    del mask
    before = resident()
    assert filled(tracks) is not None and resident() - before < 130
    with changed(memory, "LARGE", 1 << 40):
        before = resident()
        mask = filled(tracks)
        assert resident() - before > 80, "in memory it is held, or this test says nothing"
    assert torch.equal(mask, frames.float())


def case_a_full_disk_leaves_the_mask_in_memory():
    memory = module("nodes.mask_memory")
    tracks, frames = dense_masks()
    usage = namedtuple("usage", "total used free")
    with changed(memory, "LARGE", 1 << 20), changed(shutil, "disk_usage", lambda _: usage(1, 1, 0)):
        assert torch.equal(filled(tracks), frames.float())
    with changed(memory, "LARGE", 1 << 20), changed(memory.folder_paths, "get_temp_directory", lambda: "/proc/no/such/folder"):
        assert torch.equal(filled(tracks), frames.float())


def case_an_empty_clip_of_masks_is_no_error():
    mask = module("nodes.mask_memory").MaskMemory((0, 4, 4)).tensor
    assert mask.shape == (0, 4, 4)
