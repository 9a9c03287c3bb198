"""What is asked of the mask decoder's outputs, and of the picture's features alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MASK, SINGLE, OTHERS, IOU, PRESENCE = 8.0, 0.3, 0.3, 1.0, 1.0


@dataclass(frozen=True)
class Outputs:
    """Of n prompts. `masks`: (n, 4, h, w) logits, the single mask's first, then the three of the multi-mask output; `ious`: (n, 4);
    `tokens`: (n, 4, channels); `presence`: (n, 1) logits."""

    masks: Tensor
    ious: Tensor
    tokens: Tensor
    presence: Tensor

    def best(self) -> Tensor:
        """(n,) places in 1..3: the mask of the three that is used, by predicted IoU."""
        return 1 + self.ious[:, 1:].argmax(1)


def mask_loss(outputs: Outputs, target: Tensor) -> tuple[Tensor, dict[str, float]]:
    """`target`: (n, 1, h, w) in 0..1, all zero where there is no object. Mask losses and predicted IoUs count where there is one; where
    there is none the predicted IoU should be zero and the presence score negative."""
    present = (target > 0.5).flatten(1).any(1)
    n = present.sum().clamp(min=1)
    wanted = target.expand_as(outputs.masks)
    probability = outputs.masks.sigmoid()
    # Pixels that are still wrong count most.
    entropy = F.binary_cross_entropy_with_logits(outputs.masks, wanted, reduction="none") * (0.3 + (probability.detach() - wanted).abs())
    overlap = (probability * wanted).sum((2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum((2, 3)) + wanted.sum((2, 3)) + 1)
    each = MASK * entropy.mean((2, 3)) + dice
    with torch.no_grad():
        found, truth = outputs.masks > 0, wanted > 0.5
        iou = (found & truth).sum((2, 3)) / (found | truth).sum((2, 3)).clamp(min=1)
        iou = iou * present[:, None]
    masks = SINGLE * each[:, 0] + each[:, 1:].amin(1) + OTHERS * each[:, 1:].mean(1)
    # The absolute error, which SAM 2 takes, stops teaching once early failures have driven all predictions to zero.
    ious = F.binary_cross_entropy(outputs.ious.clamp(1e-6, 1 - 1e-6), iou)
    presence = F.binary_cross_entropy_with_logits(outputs.presence[:, 0], present.float())
    total = (masks * present).sum() / n + IOU * ious + PRESENCE * presence
    chosen = iou[torch.arange(len(iou)), outputs.best()]
    seen = outputs.presence[:, 0] > 0
    return total, {
        "iou": float((chosen * present).sum() / n),
        "iou_error": float((outputs.ious.detach() - iou).abs().mean()),
        "lost": float((present & ~seen).sum() / n),
        "ghosts": float((~present & seen).sum() / (~present).sum().clamp(min=1)),
    }


class Grouping(nn.Module):
    """Which pixels of a picture belong together, told from the image encoder's features, and which of them a point means, told from the
    mask decoder's tokens: dense tasks that get both going long before masks say much. Used in training only."""

    SAMPLES = 192

    def __init__(self, channels: tuple[int, int, int], width: int = 32, code: int = 16):
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.out = nn.Conv2d(width, code, 1)
        self.meant = nn.Linear(channels[-1], code)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, features: list[Tensor], labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """`features`: (n, c, h, w) per level, finest first; `labels`: (n, S, S), on the CPU. Returns the cross-entropy of
        pairs of pixels being of one region, equal weight to pairs that are and are not, and the sampled pixels' codes (n, samples, code)
        and labels (n, samples)."""
        size = features[0].shape[-2:]
        total = sum(
            F.interpolate(level(x), size=size, mode="bilinear", align_corners=False) if x.shape[-2:] != size else level(x)
            for level, x in zip(self.levels, features, strict=True)
        )
        codes = self.out(F.gelu(total)).flatten(2)
        step = labels.shape[-1] // size[-1]
        regions = labels[:, step // 2 :: step, step // 2 :: step].flatten(1).long()
        counts = torch.stack([(regions == k).sum(1) for k in range(int(regions.max()) + 1)], 1)
        # Small objects get as many samples as large ones.
        places = torch.multinomial(1 / counts.gather(1, regions).float(), self.SAMPLES, replacement=True, generator=generator)
        regions = regions.gather(1, places).to(codes.device)
        places = places.to(codes.device)
        codes = codes.gather(2, places[:, None].expand(-1, codes.shape[1], -1)).transpose(1, 2)
        return self._same(codes, codes, regions[:, :, None] == regions[:, None, :]), codes, regions

    def of_tokens(self, tokens: Tensor, codes: Tensor, same: Tensor) -> Tensor:
        """`tokens`: (n, 4, channels); `codes`: (n, samples, code); `same`: (n, samples) bool, the pixels that the prompt means."""
        return self._same(self.meant(tokens), codes, same[:, None].expand(-1, tokens.shape[1], -1))

    def _same(self, one: Tensor, other: Tensor, same: Tensor) -> Tensor:
        distances = (one[:, :, None] - other[:, None]).square().sum(-1)
        loss = F.binary_cross_entropy_with_logits(self.scale[1] - self.scale[0] * distances, same.float(), reduction="none")
        return 0.5 * (loss * same).sum() / same.sum().clamp(min=1) + 0.5 * (loss * ~same).sum() / (~same).sum().clamp(min=1)
