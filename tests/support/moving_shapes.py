"""Small clips of moving coloured shapes on a textured ground."""

import torch

from decaf.clips import clip_from_images


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
