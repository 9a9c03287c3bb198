"""Tracking many objects with different prompt frames in one forward and one backward sweep over a sequence of frames.

Object by object the result is that of a video predictor that is given one mask and asked to propagate forward and then backward from it. A
predictor encodes every frame once per prompt frame and direction and keeps every memory; here a frame is encoded at most once per sweep,
objects go in batches, and a memory lives no longer than it is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..masks import unpack_bits
from .frames import FrameEncoder
from .memory_plan import MemoryPlan, Step, TrackedObject
from .segmenter import Features, Segmenter


@dataclass(frozen=True)
class Swept:
    """Masks on one frame. `ids`: n objects. `logits`: (n, 1, h, w) float32 at the segmenter's mask resolution; > 0 is the object. Every
    object comes once for every frame: forward from its prompt frame to the end, then backward."""

    frame: int
    ids: list[int]
    logits: Tensor


@dataclass(frozen=True)
class Arrivals:
    """New objects on a frame, by id, with their (H, bytes) packed masks, and ids of objects to forget."""

    masks: dict[int, Tensor]
    dropped: frozenset[int] = frozenset()


class Prompter(Protocol):
    """Says which objects begin where. `first`, `last`: the first and last frame on which one may begin."""

    first: int
    last: int

    def arrivals(self, frame: int, features: Features, tracked: Swept | None) -> Arrivals:
        """Called on the frames first..last in order, with the masks of the objects that are tracked already (None if there are none)."""


class FixedPrompts:
    """Objects that are known beforehand. `prompts`: one (frame, (H, bytes) packed mask) per object; ids are indices of this list, which is
    not empty."""

    def __init__(self, prompts: Sequence[tuple[int, Tensor]]):
        self._prompts = prompts
        self.first = min(frame for frame, _ in prompts)
        self.last = max(frame for frame, _ in prompts)

    def arrivals(self, frame: int, features: Features, tracked: Swept | None) -> Arrivals:
        return Arrivals({i: mask for i, (start, mask) in enumerate(self._prompts) if start == frame})


class Sweep:
    """`width`: of the frames in pixels, which the prompts' masks are unpacked to. `batch`: how many objects go through the segmenter at
    once."""

    def __init__(self, segmenter: Segmenter, encoder: FrameEncoder, width: int, *, batch: int):
        self._segmenter, self._encoder, self._width, self._batch = segmenter, encoder, width, batch
        self._length = len(encoder)

    def run(self, prompter: Prompter) -> Iterator[Swept]:
        """The forward frames, then the backward ones. Nothing is held when the iterator is dropped."""
        objects: list[TrackedObject] = []
        for frame in range(prompter.first, self._length):
            then = frame + 1 if frame + 1 < self._length else None
            features = self._encoder.encode(frame, keep=frame < prompter.last, then=then)
            step = Step(frame, False)
            swept = self._track(objects, step, features)
            if frame <= prompter.last:
                swept, objects = self._admit(prompter, objects, step, features, swept)
            if swept is not None:
                yield swept
            for each in objects:
                each.release(step)
        for frame in range(max((each.prompt for each in objects), default=0) - 1, -1, -1):
            step = Step(frame, True)
            objects = [each for each in objects if each.prompt > 0]
            active = [each for each in objects if each.prompt > frame]
            yield self._track(active, step, self._encoder.encode(frame, then=frame - 1 if frame else None))
            for each in active:
                each.release(step)

    def _admit(
        self, prompter: Prompter, objects: list[TrackedObject], step: Step, features: Features, swept: Swept | None
    ) -> tuple[Swept | None, list[TrackedObject]]:
        """Lets the prompter drop and add objects on this frame."""
        arrivals = prompter.arrivals(step.frame, features, swept)
        if swept is not None and arrivals.dropped:
            stay = [i for i, each in enumerate(objects) if each.id not in arrivals.dropped]
            objects = [objects[i] for i in stay]
            swept = Swept(step.frame, [each.id for each in objects], swept.logits[stay]) if stay else None
        if not arrivals.masks:
            return swept, objects
        plan = MemoryPlan(step.frame, self._length, self._segmenter.reach)
        new = [TrackedObject(id_, plan) for id_ in arrivals.masks]
        logits = [swept.logits] if swept is not None else []
        for part in self._parts(new):
            logits.append(self._prompt(part, [arrivals.masks[each.id] for each in part], features))
        objects = objects + new
        return Swept(step.frame, [each.id for each in objects], torch.cat(logits)), objects

    def _parts(self, objects: list[TrackedObject]) -> Iterator[list[TrackedObject]]:
        for start in range(0, len(objects), self._batch):
            yield objects[start : start + self._batch]

    def _prompt(self, objects: list[TrackedObject], masks: list[Tensor], features: Features) -> Tensor:
        """Makes packed masks the first memories of their objects. Returns (n, 1, h, w) logits: the masks as the segmenter sees them."""
        outputs = self._segmenter.remember(features, [unpack_bits(mask, self._width) for mask in masks])
        for each, memory, pointer in zip(objects, outputs.memories, outputs.pointers, strict=True):
            each.memories[each.prompt], each.pointers[each.prompt] = memory, pointer
        return outputs.logits

    def _track(self, objects: list[TrackedObject], step: Step, features: Features) -> Swept | None:
        if not objects:
            return None
        logits = torch.cat([self._track_part(part, step, features) for part in self._parts(objects)])
        return Swept(step.frame, [each.id for each in objects], logits)

    def _track_part(self, objects: list[TrackedObject], step: Step, features: Features) -> Tensor:
        wanted = [each.plan.needs_memory(step.frame) for each in objects]
        outputs = self._segmenter.track(features, [each.bank(step) for each in objects], wanted, self._length)
        for each, memory, pointer in zip(objects, outputs.memories, outputs.pointers, strict=True):
            if each.plan.needs_memory(step.frame):
                each.memories[step.frame] = memory
            if each.plan.needs_pointer(step.frame):
                each.pointers[step.frame] = pointer
        return outputs.logits
