"""The slow way: SAM 2's own video predictor, driven by its public methods as the DecAF authors do. It shares nothing with decaf."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from decaf.sam2.package import sam2_package


def predictor_class():
    """The package's predictor, which also remembers the predicted IoUs that it otherwise drops, and counts the images that it encodes."""
    sam2_package()  # imports the package without leaving Hydra initialised
    from sam2.sam2_video_predictor import SAM2VideoPredictor

    class Predictor(SAM2VideoPredictor):
        encodings = 0

        def forward_image(self, *args, **kwargs):
            self.encodings += 1
            return super().forward_image(*args, **kwargs)

        def _forward_sam_heads(self, *args, **kwargs):
            out = super()._forward_sam_heads(*args, **kwargs)
            self.predicted_ious = out[2]
            return out

    return Predictor


def predictor_of(model):
    """A predictor with the modules, weights and settings of a `SAM2Base`."""
    kind = predictor_class()
    predictor = kind.__new__(kind)
    predictor.__dict__.update(model.__dict__)
    predictor.fill_hole_area = 0
    predictor.non_overlap_masks = False
    predictor.clear_non_cond_mem_around_input = False
    predictor.add_all_frames_to_correct_as_cond = False
    return predictor


def start(predictor, frames, folder: Path):
    write(frames, folder)
    return predictor.init_state(str(folder))


def write(frames, folder: Path):
    """`init_state` reads a folder of files called *.jpg; lossless pictures under that name are as welcome, and these are read at once."""
    folder.mkdir(parents=True, exist_ok=True)
    for t, frame in enumerate(frames):
        Image.fromarray(frame.numpy()).save(folder / f"{t:05d}.jpg", format="BMP")


def propagate(predictor, state, frame: int, masks) -> torch.Tensor:
    """(n, T, H, W) logits of objects that are given by masks on one frame."""
    predictor.reset_state(state)
    for number, mask in enumerate(masks):
        predictor.add_new_mask(state, frame, number, mask)
    out = torch.zeros(len(masks), state["num_frames"], state["video_height"], state["video_width"])
    for reverse in (False, True):
        for t, _, logits in predictor.propagate_in_video(state, start_frame_idx=frame, reverse=reverse):
            out[:, t] = logits[:, 0]
    return out


def point_mask(predictor, state, frame: int, xy) -> tuple[torch.Tensor, float]:
    """(H, W) logits and the predicted IoU of the mask at one point."""
    predictor.reset_state(state)
    _, _, logits = predictor.add_new_points_or_box(state, frame, 0, points=xy[None], labels=[1], normalize_coords=False)
    return logits[0, 0].cpu(), float(predictor.predicted_ious.max())


def correct(predictor, state, anchors: dict, frame: int, base, points, labels, box) -> torch.Tensor:
    """(T, H, W) logits of one object: masks of other frames, then a mask and clicks on `frame`, and one propagation from all of them."""
    predictor.reset_state(state)
    for t, mask in anchors.items():
        predictor.add_new_mask(state, t, 0, mask)
    if base is not None:
        predictor.add_new_mask(state, frame, 0, base)
    if points is not None or box is not None:
        predictor.add_new_points_or_box(state, frame, 0, points=points, labels=labels, box=box)
    out = torch.full((state["num_frames"], state["video_height"], state["video_width"]), float("nan"))
    for reverse in (False, True):
        for t, _, logits in predictor.propagate_in_video(state, reverse=reverse):
            out[t] = logits[0, 0]
    return out


def iou(a, b) -> float:
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0


def tracklets(predictor, state, prompts, nms_iou: float) -> list[dict]:
    """Candidates one by one, suppression frame by frame, each survivor propagated over all key frames at once."""
    found: list[dict] = []
    for key in range(state["num_frames"]):
        new = []
        for point in (prompts.key == key).nonzero()[:, 0].tolist():
            logits, predicted = point_mask(predictor, state, key, prompts.xy[point])
            if (logits > 0).any():
                score = torch.tensor(predicted) + prompts.value[point]
                new.append({"point": point, "key": key, "iou": predicted, "score": float(score), "mask": logits > 0})
        kept = []
        for candidate in sorted(new, key=lambda c: -c["score"]):
            rivals = [old for old in found if iou(candidate["mask"], old["masks"][key]) > nms_iou]
            beaten = any(iou(candidate["mask"], other["mask"]) > nms_iou for other in kept)
            if not beaten and all(old["score"] < candidate["score"] for old in rivals):
                kept.append(candidate)
                found = [old for old in found if all(old is not rival for rival in rivals)]
        if kept:
            logits = propagate(predictor, state, key, [c["mask"] for c in kept])
            for candidate, masks in zip(kept, logits > 0, strict=True):
                candidate["masks"] = masks
        found += kept
    return found


def segment(predictor, frames, prompts, folder: Path, *, nms_iou=0.7, score_threshold=0.8):
    """Kept tracklets (with "consistency" and "final") and (n, T, H, W) logits of the final propagation."""
    keys = start(predictor, [frames[t] for t in prompts.fused.clip.key_frames], folder / "keys")
    return segment_started(predictor, keys, start(predictor, frames, folder / "clip"), prompts, nms_iou, score_threshold)


def segment_started(predictor, keys, clip, prompts, nms_iou: float, score_threshold: float):
    """`segment` of key frames and clip that the predictor has read already."""
    found = tracklets(predictor, keys, prompts, nms_iou)
    attention = prompts.fused.map
    consistency = []
    for tracklet in found:
        total = gain = 0.0
        for key, cells in enumerate(attention):
            covered = F.interpolate(tracklet["masks"][key][None, None].float(), size=cells.shape, mode="area")[0, 0]
            mean, highest = float(cells.mean()), float(cells.max())
            for cell, part in zip(cells.flatten().tolist(), covered.flatten().tolist(), strict=True):
                if cell > mean:
                    total += cell
                    gain += cell * part
                else:
                    gain -= highest * part
        consistency.append(gain / total)
    best = max([c for c in consistency if c > 0], default=1.0)
    for tracklet, value in zip(found, consistency, strict=True):
        tracklet["consistency"] = value / best if value > 0 else value
        tracklet["final"] = (tracklet["score"] + tracklet["consistency"]) / 3
    kept = [t for t in found if t["final"] > score_threshold] or [max(found, key=lambda t: t["final"])]
    key_frames = prompts.fused.clip.key_frames
    logits = [None] * len(kept)
    for key in sorted({t["key"] for t in kept}):
        group = [i for i, t in enumerate(kept) if t["key"] == key]
        for i, one in zip(group, propagate(predictor, clip, key_frames[key], [kept[i]["masks"][key] for i in group]), strict=True):
            logits[i] = one
    return kept, torch.stack(logits)
