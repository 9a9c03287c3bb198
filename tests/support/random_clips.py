"""Clips of noise."""

import torch

from decaf.clips import clip_from_images


def clip_of(frames, height=60, width=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return clip_from_images(torch.rand(frames, height, width, 3, generator=generator))
