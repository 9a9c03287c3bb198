"""From points to candidate masks, and non-maximum suppression among them and the tracklets that are there already."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import SAM2Prompts
from ..errors import DecafError
from ..masks import pack_bits
from .masks import pairwise_iou, video_masks
from .segmenter import Features, Segmenter
from .sweep import Arrivals, Swept


def suppress(
    masks: Tensor, scores: Tensor, previous_masks: Tensor, previous_scores: Tensor, threshold: float
) -> tuple[list[int], list[int]]:
    """Non-maximum suppression by score, also against earlier tracklets' masks on this frame.

    `masks` (n, H, bytes) and `previous_masks` (m, H, bytes): packed. Candidates come in order of falling score. One is kept if it overlaps
    (IoU above `threshold`) neither a kept candidate nor a standing tracklet of at least its score; a tracklet that a kept candidate beats
    is deleted and suppresses nothing any more. Returns the kept candidates in order of score and the deleted tracklets in theirs.
    """
    overlaps = pairwise_iou(masks, torch.cat([masks, previous_masks])) > threshold
    among, against = overlaps[:, : len(masks)], overlaps[:, len(masks) :]
    kept: list[int] = []
    deleted: set[int] = set()
    for i in scores.argsort(descending=True, stable=True).tolist():
        rivals = [j for j in against[i].nonzero()[:, 0].tolist() if j not in deleted]
        if any(among[i, k] for k in kept) or any(previous_scores[j] >= scores[i] for j in rivals):
            continue
        kept.append(i)
        deleted.update(rivals)
    return kept, sorted(deleted)


@dataclass(frozen=True)
class Candidate:
    """A point's mask that survived suppression. `point`: index in the prompts; `key`: key index; `predicted_iou` and `attention` in
    0..1."""

    point: int
    key: int
    predicted_iou: float
    attention: float

    @property
    def score(self) -> float:
        return self.predicted_iou + self.attention


class CandidatePrompts:
    """Makes objects of the points while a sweep over the key frames passes them: masks, suppression, adding and dropping in one go.

    Comparing a new mask with an earlier tracklet needs that tracklet only on the new mask's frame, where the forward sweep has just tracked
    it. Points whose mask is empty are left out. `standing`: the tracklets by id that have not been deleted so far. `batch`: points decoded
    at once. `name`: of the segmenter's model, for people.
    """

    def __init__(self, segmenter: Segmenter, prompts: SAM2Prompts, frame_size: tuple[int, int], *, name: str, nms_iou: float, batch: int):
        self._segmenter, self._prompts, self._frame_size = segmenter, prompts, frame_size
        self._name, self._nms_iou, self._batch = name, nms_iou, batch
        self.first, self.last = int(prompts.key.min()), int(prompts.key.max())
        self.standing: dict[int, Candidate] = {}
        self._next_id = 0

    def arrivals(self, frame: int, features: Features, tracked: Swept | None) -> Arrivals:
        found, masks = self._candidates(frame, features)
        if not found:
            return Arrivals({})
        earlier = tracked.ids if tracked is not None else []
        earlier_masks = self._pack(tracked.logits) if tracked is not None else masks[:0]
        earlier_scores = torch.tensor([self.standing[i].score for i in earlier])
        kept, deleted = suppress(masks, torch.tensor([c.score for c in found]), earlier_masks, earlier_scores, self._nms_iou)
        dropped = frozenset(earlier[j] for j in deleted)
        for id_ in dropped:
            del self.standing[id_]
        new = {}
        for i in kept:
            self.standing[self._next_id] = found[i]
            new[self._next_id] = masks[i]
            self._next_id += 1
        return Arrivals(new, dropped)

    def _candidates(self, frame: int, features: Features) -> tuple[list[Candidate], Tensor]:
        """Candidates on this key frame and their packed masks (n, H, bytes)."""
        points = (self._prompts.key == frame).nonzero()[:, 0]
        found: list[Candidate] = []
        masks = [torch.zeros(0, self._frame_size[0], -(-self._frame_size[1] // 8), dtype=torch.uint8)]
        for start in range(0, len(points), self._batch):
            part = points[start : start + self._batch]
            logits, ious = self._segmenter.point_masks(features, self._prompts.xy[part])
            if not ious.isfinite().all():
                raise DecafError(
                    f"{self._name} gives scores that are not finite numbers. Download its checkpoint again, or load it in float32 or "
                    "bfloat16 instead of float16."
                )
            packed = self._pack(logits)
            filled = packed.flatten(1).ne(0).any(1)
            masks.append(packed[filled])
            for point, iou in zip(part[filled].tolist(), ious.cpu()[filled].tolist(), strict=True):
                found.append(Candidate(point, frame, iou, float(self._prompts.value[point])))
        return found, torch.cat(masks)

    def _pack(self, logits: Tensor) -> Tensor:
        return torch.cat([pack_bits(masks) for _, masks in video_masks(logits, self._frame_size)])
