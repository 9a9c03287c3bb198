"""Small clips of moving coloured shapes on a textured ground, and random points on them."""

import torch

from decaf.clips.base import clip_from_images
from decaf.clips.identity import clip_info
from decaf.data import FusedAttention, SAM2Prompts


def moving_shapes(length: int, height: int, width: int, seed: int = 0, shapes: int = 3):
    """A clip of T frames, (H, W, 3) uint8 each."""
    random = torch.Generator().manual_seed(seed)
    ground = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6, generator=random), size=(height, width), mode="bicubic")[0]
    frames = (ground.clamp(0, 1) * 0.6).permute(1, 2, 0).repeat(length, 1, 1, 1)
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    for _ in range(shapes):
        start, speed, size = (
            torch.rand(2, generator=random),
            torch.randn(2, generator=random) * 0.03,
            0.08 + 0.12 * torch.rand(1, generator=random),
        )
        colour = torch.rand(3, generator=random)
        for t in range(length):
            cy, cx = ((start + speed * t) % 1).tolist()
            frames[t][(y - cy) ** 2 + (x - cx) ** 2 < size**2] = colour
    return clip_from_images((frames * 255).to(torch.uint8))


def key_frames(length, count=16):
    return torch.linspace(0, length - 1, min(length, count)).to(torch.int64).tolist()


def make_prompts(clip, count, seed=0, keys=None):
    """Random points over the key frames (or those in `keys`) and a random map."""
    random = torch.Generator().manual_seed(seed)
    frames = key_frames(len(clip))
    allowed = torch.tensor(range(len(frames)) if keys is None else keys)
    key = allowed[torch.randint(len(allowed), (count,), generator=random)].sort().values
    fused = FusedAttention(torch.rand(len(frames), 6, 7, generator=random), clip_info(clip, frames))
    return SAM2Prompts(key, torch.rand(count, 2, generator=random), 0.8 + 0.2 * torch.rand(count, generator=random), fused)
