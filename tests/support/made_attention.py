"""Fused attention that is made by hand."""

import torch

from decaf.data import ClipInfo, FusedAttention


def fused(maps, size=(90, 120)):
    maps = torch.as_tensor(maps, dtype=torch.float32)
    clip = ClipInfo(len(maps), size, tuple(range(len(maps))), torch.zeros(len(maps), 16, 16, 3, dtype=torch.uint8))
    return FusedAttention(maps, clip)


def three_frames():
    """Three frames on a 6x8 grid of 15 px cells: two blobs with points, nothing, one weak and one strong blob."""
    maps = torch.zeros(3, 6, 8)
    maps[0, 1:3, 1:3], maps[0, 4, 6] = 0.9, 1.0
    maps[2, 1, 1], maps[2, 4, 5:7] = 0.7, 0.85
    return fused(maps)
