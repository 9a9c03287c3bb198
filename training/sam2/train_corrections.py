"""Teaches a trained tiny SAM 2 what corrections ask for: `python train_corrections.py OLD.safetensors NEW.safetensors`.

Training from points alone leaves out negative points, boxes and masks as prompts. Only what reads these is trained here: the embeddings of
negative points and of a box's corners, the encoder of mask prompts, and the head of the mask that is used where there are two points or
more. All other weights stay bit for bit, and so does what the model makes of a single positive point. The image encoder does not change, so every
picture goes through it once.

Tracking begins with a mask too, which reaches the object pointer through the encoder of mask prompts, as numbers near 0, where a correction's
mask is plus and minus 10. For the former the encoder is held to what it said before.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from cache import render_still
from corrections import MADE_UP, Correction, made_up, objects_of, of_own_mask
from losses import Outputs, mask_loss
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from steps import decode, target
from torch import Tensor, nn
from torch.nn import functional as F

from decaf.sam2 import load_sam2

log = logging.getLogger("corrections")

SHARES = {
    "spill": 0.22,
    "neighbour": 0.18,
    "part of a neighbour": 0.08,
    "another object": 0.06,
    "half": 0.07,
    "missing": 0.07,
    "box": 0.14,
    "neighbour, box": 0.05,
    "neighbour, two points": 0.05,
    "points of both kinds": 0.08,
}
"""How often each kind of correction is drawn."""

RATES = {"embeddings": 2e-2, "others": 3e-3}
KINDS_EACH, WARM_UP = 2, 20


class Pictures:
    """Still pictures with their image features (half precision) and labels (S, S)."""

    def __init__(self, model: nn.Module, count: int, first_seed: int):
        self.labels: list[np.ndarray] = []
        levels: list[list[Tensor]] = []
        seed = first_seed
        while len(self.labels) < count:
            picture, labels = render_still(seed)
            seed += 1
            if picture is None:
                continue
            with torch.inference_mode():
                _, flat, _, sizes = model._prepare_backbone_features(model.forward_image(picture))
            levels.append([x[:, 0].T.unflatten(1, size).half() for x, size in zip(flat, sizes, strict=True)])
            self.labels.append(labels)
        self._levels = [torch.stack(level) for level in zip(*levels, strict=True)]
        log.info("%d pictures, seeds %d to %d", count, first_seed, seed - 1)

    def maps(self, indices: list[int]) -> list[Tensor]:
        """Features (n, c, h, w) per level, finest first."""
        return [level[indices].float() for level in self._levels]


def logits_of(outputs: Outputs) -> Tensor:
    """(n, 1, h, w): of the three masks the one that is used."""
    return outputs.masks[torch.arange(len(outputs.masks)), outputs.best()][:, None]


def own_masks(model: nn.Module, pictures: Pictures, rng: np.random.Generator) -> dict[str, list[Correction]]:
    """Corrections of what the model makes of a point on each object of each picture, by kind."""
    found: dict[str, list[Correction]] = defaultdict(list)
    for i, labels in enumerate(pictures.labels):
        objects, points = objects_of(labels), []
        for k in objects:
            ys, xs = np.nonzero(labels == k)
            j = rng.integers(len(ys))
            points.append((float(xs[j] + 0.5), float(ys[j] + 0.5)))
        if not objects:
            continue
        with torch.inference_mode():
            *fine, lowest = pictures.maps([i] * len(objects))
            outputs = decode(model, lowest + model.no_mem_embed.view(1, -1, 1, 1), fine, torch.tensor(points))
            masks = F.interpolate(logits_of(outputs), size=labels.shape, mode="bilinear", align_corners=False)[:, 0] > 0
        for k, point, mask in zip(objects, points, masks.numpy(), strict=True):
            for kind, correction in of_own_mask(rng, i, labels == k, mask, point).items():
                found[kind].append(correction)
    return found


class Lesson:
    """The model, what of it is trained, and what its mask prompts said before."""

    def __init__(self, model: nn.Module, before: nn.Module, keep: float):
        self.model, self.keep = model, keep
        self._before = copy.deepcopy(before.sam_prompt_encoder.mask_downscaling)
        encoder, decoder = model.sam_prompt_encoder, model.sam_mask_decoder
        embeddings = [encoder.point_embeddings[label].weight for label in (0, 2, 3)]
        others = [*encoder.mask_downscaling.parameters(), *decoder.output_hypernetworks_mlps[0].parameters()]
        self.trained = embeddings + others
        self.optimiser = torch.optim.AdamW(
            [
                {"params": embeddings, "rate": RATES["embeddings"]},
                {"params": others, "rate": RATES["others"]},
            ],
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )
        for weight in self.trained:
            weight.requires_grad_(True)

    def loss(self, pictures: Pictures, corrections: list[Correction]) -> tuple[Tensor, dict[str, float]]:
        """Of corrections of one kind."""
        model = self.model
        truth = torch.from_numpy(np.stack([each.truth for each in corrections]))
        masks, before = [truth], None
        if corrections[0].before is not None:
            masks.append(torch.from_numpy(np.stack([each.before for each in corrections])))
            # As the tracker hands on a mask that was: plus and minus 10, at a quarter of the size.
            before = F.interpolate(
                masks[-1][:, None] * 20.0 - 10.0, scale_factor=0.25, mode="bilinear", antialias=True, align_corners=False
            )
        *fine, lowest = pictures.maps([each.picture for each in corrections])
        xy = torch.tensor([each.xy for each in corrections])
        labels = torch.tensor([each.labels for each in corrections], dtype=torch.int32)
        outputs = decode(model, lowest + model.no_mem_embed.view(1, -1, 1, 1), fine, xy, labels, before)
        if xy.shape[1] > 1:  # of two points or more the single mask is used
            outputs = Outputs(
                outputs.masks[:, :1].expand(-1, 4, -1, -1), outputs.ious[:, :1].expand(-1, 4), outputs.tokens, outputs.presence
            )
        loss, figures = mask_loss(outputs, target(truth))
        tracked = model.mask_downsample(torch.cat(masks)[:, None].float())
        with torch.no_grad():
            wanted = self._before(tracked)
        change = (model.sam_prompt_encoder.mask_downscaling(tracked) - wanted).square().mean()
        return loss + self.keep * change, {"iou": figures["iou"], "change": float(change.detach()) ** 0.5}

    def update(self, share: float) -> None:
        """`share` of the learning rates, 0..1."""
        nn.utils.clip_grad_norm_(self.trained, 2.0)
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * share
        self.optimiser.step()
        self.optimiser.zero_grad()


def train(lesson: Lesson, pictures: Pictures, own: dict[str, list[Correction]], steps: int, each: int, rng: np.random.Generator) -> None:
    def draw(kind: str) -> Correction:
        if kind not in MADE_UP:
            return own[kind][rng.integers(len(own[kind]))]
        while True:
            i = int(rng.integers(len(pictures.labels)))
            if (correction := made_up(rng, i, pictures.labels[i], kind)) is not None:
                return correction

    shares = np.array(list(SHARES.values())) / sum(SHARES.values())
    figures: dict[str, list[float]] = defaultdict(list)
    started = time.monotonic()
    for step in range(steps):
        for kind in rng.choice(list(SHARES), KINDS_EACH, p=shares).tolist():
            loss, result = lesson.loss(pictures, [draw(kind) for _ in range(each)])
            loss.backward()
            figures[kind].append(result["iou"])
            figures["change"].append(result["change"])
        lesson.update(min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * np.cos(np.pi * step / steps)))
        if (step + 1) % 50 == 0:
            text = " ".join(f"{kind} {np.mean(values):.4f}" for kind, values in sorted(figures.items()))
            log.info("%d/%d %.0f s | %s", step + 1, steps, time.monotonic() - started, text)
            figures.clear()


def save_changed(old: Path, new: Path, model: nn.Module) -> None:
    """The old file with the weights that were trained; all others are its own, bit for bit."""
    weights = load_file(old)
    with safe_open(old, "pt") as file:
        metadata = file.metadata()
    for name, value in model.state_dict().items():
        if not torch.equal(value, weights[name].float()):
            weights[name] = value.detach().to(weights[name].dtype).contiguous()
    save_file(weights, new, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="what train.py has made")
    parser.add_argument("new", type=Path, help="the file to write")
    parser.add_argument("--start", type=Path, help="go on from this file's weights, and hold them to those of 'old'")
    parser.add_argument("--pictures", type=int, default=1200)
    parser.add_argument("--first-seed", type=int, default=6_000_000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--each", type=int, default=10, help="corrections of a kind in a step, which has two kinds")
    parser.add_argument("--keep", type=float, default=1000.0, help="weight of what mask prompts say to tracking")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    rng = np.random.default_rng(options.seed)
    old = load_sam2(options.old).model
    model = load_sam2(options.start or options.old).model
    pictures = Pictures(old, options.pictures, options.first_seed)
    own = own_masks(old, pictures, rng)
    log.info("own masks: %s", {kind: len(of_kind) for kind, of_kind in own.items()})
    train(Lesson(model, old, options.keep), pictures, own, options.steps, options.each, rng)
    save_changed(options.old, options.new, model)


if __name__ == "__main__":
    main()
