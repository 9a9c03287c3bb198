"""One batch of pictures with points, or of clips with memory, to a loss."""

from __future__ import annotations

import numpy as np
import torch
from cache import View
from losses import Grouping, Outputs, mask_loss
from torch import Tensor, nn
from torch.nn import functional as F

_MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
_STD = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
GROUPING = 0.5
SMALLEST = 40 / 256**2
"""Area of the picture below which an object is not asked for."""

Result = tuple[Tensor, dict[str, float]]


def encode(model: nn.Module, images: Tensor) -> dict[str, list[Tensor]]:
    return model.forward_image(((images - _MEAN) / _STD).to(model.device))


def decode(
    model: nn.Module,
    lowest: Tensor,
    fine: list[Tensor],
    points: Tensor | None = None,
    labels: Tensor | None = None,
    masks: Tensor | None = None,
) -> Outputs:
    """`points`: in pixels, (n, 2), one on each object, or (n, p, 2) with `labels` (n, p); None for tracking. `masks`: (n, 1, S/4, S/4)
    logits of the masks before, or None."""
    n, device = len(lowest), lowest.device
    xy = torch.zeros(n, 1, 2, device=device) if points is None else points.view(n, -1, 2).to(device)
    if labels is None:
        labels = torch.full((n, 1), -1 if points is None else 1, dtype=torch.int32, device=device)
    sparse, dense = model.sam_prompt_encoder(points=(xy, labels), boxes=None, masks=masks)
    return Outputs(
        *model.sam_mask_decoder.predict_masks(
            image_embeddings=lowest,
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            repeat_image=False,
            high_res_features=fine,
        )
    )


def target(masks: Tensor) -> Tensor:
    """(n, S, S) bool -> (n, 1, S/4, S/4) covered part."""
    return F.avg_pool2d(masks[:, None].float(), 4)


# ---- points ------------------------------------------------------------------------------------------------------------------------


def free_places(labels: Tensor, distance: int) -> np.ndarray:
    """(S, S) labels -> (n, 2): corners (y, x) of 4 x 4 pixels which are about `distance` pixels away from every object."""
    cells = F.max_pool2d((labels > 0)[None].float(), 4)
    reach = -(-distance // 4)
    return 4 * np.argwhere(F.max_pool2d(cells, 2 * reach + 1, 1, reach)[0].numpy() == 0)


def pick_point(rng: np.random.Generator, labels: np.ndarray, wanted: int) -> tuple[tuple[float, float], int]:
    """A point for object `wanted`, in pixels, and the object that it means: as attention gives them, mostly on the object, at times a
    little off. A point just beside an object means that object, one on another object means the other."""
    size = len(labels)
    ys, xs = np.nonzero(labels == wanted)
    kind = rng.random()
    i = rng.integers(len(ys))
    if kind > 0.8:  # near the edge: of a few places the one with the least of the object around it
        some = rng.integers(len(ys), size=6)
        around = [np.clip((ys[some] + dy, xs[some] + dx), 0, size - 1) for dy in (-4, 0, 4) for dx in (-4, 0, 4)]
        i = some[np.sum([labels[y, x] == wanted for y, x in around], 0).argmin()]
    y, x = ys[i] + rng.random(), xs[i] + rng.random()
    if kind < 0.2:  # towards the middle
        y, x = y + (ys.mean() - y) * 0.8, x + (xs.mean() - x) * 0.8
    elif kind < 0.35:  # blurred
        y, x = rng.normal((y, x), 0.02 * size)
    y, x = float(np.clip(y, 0, size - 1e-3)), float(np.clip(x, 0, size - 1e-3))
    return (x, y), int(labels[int(y), int(x)]) or wanted


def pick_points(rng: np.random.Generator, labels: Tensor, count: int, background: float) -> list[tuple[tuple[float, float], int]]:
    """`count` points and the objects that they mean; 0 for a point far from every object. Empty if there is nothing to ask for."""
    truth = labels.numpy()
    size = len(truth)
    areas = np.bincount(truth.ravel())
    objects = [k for k in range(1, len(areas)) if areas[k] >= SMALLEST * size**2]
    free = free_places(labels, size // 20)
    points = []
    for _ in range(count):
        if len(free) and (not objects or rng.random() < background):
            y, x = free[rng.integers(len(free))] + 4 * rng.random(2)
            points.append(((float(x), float(y)), 0))
        elif objects:
            points.append(pick_point(rng, truth, int(rng.choice(objects))))
    return points


def picture_step(model: nn.Module, grouping: Grouping, views: list[View], rng: np.random.Generator, points_each: int) -> Result:
    """Points on pictures. A point on no object should find nothing."""
    images, labels = torch.cat([v.images for v in views]), torch.cat([v.labels for v in views])
    features = encode(model, images)["backbone_fpn"]
    pairs, codes, regions = grouping(features, labels, torch.Generator().manual_seed(int(rng.integers(2**31))))
    chosen = [(i, point, k) for i in range(len(labels)) for point, k in pick_points(rng, labels[i], points_each, 0.12)]
    places = torch.tensor([i for i, _, _ in chosen])
    wanted = torch.tensor([k for _, _, k in chosen])
    masks = ((labels[places] == wanted[:, None, None]) & (wanted > 0)[:, None, None]).to(model.device)
    wanted, places = wanted.to(model.device), places.to(model.device)
    fine, lowest = [f[places] for f in features[:-1]], features[-1][places]
    outputs = decode(model, lowest + model.no_mem_embed.view(1, -1, 1, 1), fine, torch.tensor([p for _, p, _ in chosen]))
    loss, figures = mask_loss(outputs, target(masks))
    meant = grouping.of_tokens(outputs.tokens, codes[places], regions[places] == wanted[:, None])
    return loss + GROUPING * (pairs + meant), {**figures, "pairs": float(pairs.detach()), "meant": float(meant.detach())}


# ---- clips -------------------------------------------------------------------------------------------------------------------------


def pick_objects(rng: np.random.Generator, labels: Tensor, most: int) -> list[int]:
    """Objects visible on the first frame, those that are away on a later one first."""
    size = labels.shape[-1]
    areas = np.stack([np.bincount(frame.flatten().numpy(), minlength=256) for frame in labels])
    objects = [k for k in range(1, 256) if areas[0, k] >= 1.5 * SMALLEST * size**2]
    rng.shuffle(objects)
    return sorted(objects, key=lambda k: bool((areas[:, k] > 0).all()))[:most]


def clip_step(model: nn.Module, views: list[View], rng: np.random.Generator, objects_each: int, own_presence: float) -> Result | None:
    """Objects from their masks on the first frame through the clip. `own_presence`: share of frames on which the memory believes the
    model's own presence score and not the truth. None if no object is visible on a first frame."""
    length, size = views[0].labels.shape[0], model.image_size
    picked = [(i, k) for i, view in enumerate(views) for k in pick_objects(rng, view.labels, objects_each)]
    if not picked:
        return None
    _, flat, positions, sizes = model._prepare_backbone_features(encode(model, torch.cat([v.images for v in views])))
    clips = torch.tensor([i for i, _ in picked], device=model.device)
    truth = torch.stack([views[i].labels == k for i, k in picked]).to(model.device)  # (n, T, S, S)
    memory = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    horizon = int(rng.choice([max(length, 8), 16, 64]))
    losses, figures = [], []
    for t in range(length):
        rows = clips * length + t
        levels, codes = [f[:, rows] for f in flat], [p[:, rows] for p in positions]
        maps = [f.permute(1, 2, 0).unflatten(2, s) for f, s in zip(levels, sizes, strict=True)]
        wanted, present = truth[:, t], truth[:, t].flatten(1).any(1)[:, None]
        if t == 0:
            mask, more = _prompt_masks(model, maps, views, picked, wanted, rng)
            if more is not None:
                losses.append(more[0])
            *_, high, pointer, score = model._use_mask_as_output(maps[-1], maps[:-1], mask[:, None].float())
        else:
            conditioned = model._prepare_memory_conditioned_features(t, False, levels[-1:], codes[-1:], sizes[-1:], memory, horizon)
            outputs = decode(model, conditioned, maps[:-1])
            loss, figure = mask_loss(outputs, target(wanted))
            losses.append(loss)
            figures.append(figure)
            every, best = torch.arange(len(picked)), outputs.best()
            own = torch.from_numpy(rng.random((len(picked), 1)) < own_presence).to(model.device)
            shown = torch.where(own, outputs.presence.detach() > 0, present)
            low = outputs.masks[every, best][:, None].masked_fill(~shown[:, :, None, None], -1024.0)
            high = F.interpolate(low, size=(size, size), mode="bilinear", align_corners=False)
            pointer = torch.where(shown, model.obj_ptr_proj(outputs.tokens[every, best]), model.no_obj_ptr)
            score = shown.float() * 20 - 10
        if t < length - 1:
            encoded, encoded_positions = model._encode_new_memory(levels, sizes, high, score, is_mask_from_pts=False)
            kind = "cond_frame_outputs" if t == 0 else "non_cond_frame_outputs"
            memory[kind][t] = {"maskmem_features": encoded, "maskmem_pos_enc": encoded_positions, "obj_ptr": pointer}
    return sum(losses) / len(losses), {name: float(np.mean([f[name] for f in figures])) for name in figures[0]}


def _prompt_masks(
    model: nn.Module, maps: list[Tensor], views: list[View], picked: list[tuple[int, int]], truth: Tensor, rng: np.random.Generator
) -> tuple[Tensor, Result | None]:
    """(n, S, S) bool masks to begin with: the truth, or as often what a point gives, for tracking usually begins with that."""
    if rng.random() < 0.5:
        return truth, None
    points = []
    for i, k in picked:
        # A point which means another object would begin another track.
        xy, meant = pick_point(rng, views[i].labels[0].numpy(), k)
        points.append(xy if meant == k else _inside(rng, views[i].labels[0].numpy(), k))
    outputs = decode(model, maps[-1] + model.no_mem_embed.view(1, -1, 1, 1), maps[:-1], torch.tensor(points))
    result = mask_loss(outputs, target(truth))
    low = outputs.masks[torch.arange(len(points)), outputs.best()][:, None].detach()
    mask = F.interpolate(low, size=truth.shape[-2:], mode="bilinear", align_corners=False)[:, 0] > 0
    # What has little to do with the object says nothing about where it goes.
    good = (mask & truth).flatten(1).sum(1) > 0.4 * (mask | truth).flatten(1).sum(1)
    return torch.where(good[:, None, None], mask, truth), result


def _inside(rng: np.random.Generator, labels: np.ndarray, wanted: int) -> tuple[float, float]:
    ys, xs = np.nonzero(labels == wanted)
    i = rng.integers(len(ys))
    return float(xs[i] + 0.5), float(ys[i] + 0.5)
