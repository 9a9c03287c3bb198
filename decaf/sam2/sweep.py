"""Tracking many objects with different prompt frames in one forward and one backward sweep over a sequence of frames.

Object by object the result is that of SAM 2's video predictor, given one mask and asked to propagate forward and then backward from it. The
predictor encodes every frame once per prompt frame and direction, tracks objects one at a time and keeps every memory; here a frame is
encoded at most once per sweep, objects go in batches, and a memory lives no longer than it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .build import SAM2
from .encoder import Features
from .frames import FrameEncoder, inference
from .heads import TrackingHeads
from .memory_attention import Memory, MemoryAttention, Remembered
from .memory_plan import MemoryPlan, Step, TrackedObject
from .package import sam2_package

MEMORY_DTYPE = torch.bfloat16
"""The predictor stores memories so, in every setting."""

_KEY_BYTES = 64 << 20
"""For keys that the memory attention makes of memories, of all objects together. Enough at small sizes, where making them is a tenth of the
work; at 1024 x 1024 it is less than a hundredth, and the keys of one memory are 16 MB."""


@dataclass(frozen=True)
class Swept:
    """Masks on one frame. `ids`: n objects. `logits`: (n, 1, h, w) float32 at SAM 2's mask resolution, a quarter of its input size; > 0 is
    the object. Every object comes once for every frame: forward from its prompt frame to the end, then backward."""

    frame: int
    ids: list[int]
    logits: Tensor


@dataclass(frozen=True)
class Arrivals:
    """New objects on a frame, by id, with their (H, W) bool masks, and ids of objects to forget."""

    masks: dict[int, Tensor]
    dropped: frozenset[int] = frozenset()


class Prompter(Protocol):
    """Says which objects begin where. `first`, `last`: the first and last frame on which one may begin."""

    first: int
    last: int

    def arrivals(self, frame: int, features: Features, tracked: Swept | None) -> Arrivals:
        """Called on the frames first..last in order, with the masks of the objects that are tracked already (None if there are none)."""


class FixedPrompts:
    """Objects that are known beforehand. `prompts`: one (frame, (H, W) bool mask) per object; ids are places in this list, which is not
    empty."""

    def __init__(self, prompts: list[tuple[int, Tensor]]):
        self._prompts = prompts
        self.first = min(frame for frame, _ in prompts)
        self.last = max(frame for frame, _ in prompts)

    def arrivals(self, frame: int, features: Features, tracked: Swept | None) -> Arrivals:
        return Arrivals({i: mask for i, (start, mask) in enumerate(self._prompts) if start == frame})


class Sweep:
    """`batch`: how many objects go through the model at once. With an `exact` encoder each object goes alone through the package's own
    `track_step`, which is slower and equal to the predictor bit for bit; otherwise the result is equal up to rounding. `tick`: called
    within a frame where one may take seconds; may raise to stop."""

    def __init__(self, sam2: SAM2, encoder: FrameEncoder, *, batch: int, tick: Callable[[], None] = lambda: None):
        self._tick = tick
        self._sam2, self._model, self._encoder = sam2, sam2.model, encoder
        self._length = len(encoder)
        self._batch = 1 if encoder.exact else batch
        self._memory_position: Tensor | None = None  # (1, channels, h, w), the same for all memories
        self._attention: MemoryAttention | None = None
        self._heads: TrackingHeads | None = None

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
        plan = MemoryPlan(step.frame, self._length, self._model.num_maskmem, self._model.max_obj_ptrs_in_encoder)
        new = [TrackedObject(id_, plan) for id_ in arrivals.masks]
        logits = [swept.logits] if swept is not None else []
        with inference(self._sam2):
            for part in self._parts(new):
                logits.append(self._prompt(part, [arrivals.masks[each.id] for each in part], features))
            objects = objects + new
            return Swept(step.frame, [each.id for each in objects], torch.cat(logits)), objects

    def _parts(self, objects: list[TrackedObject]) -> Iterator[list[TrackedObject]]:
        for start in range(0, len(objects), self._batch):
            yield objects[start : start + self._batch]

    # ---- the prompt's frame ----------------------------------------------------------------------------------------------------------

    def _prompt(self, objects: list[TrackedObject], masks: list[Tensor], features: Features) -> Tensor:
        """Makes masks the first memory of their objects. Returns (n, 1, h, w) logits: the masks as SAM 2 sees them."""
        model, frame = self._model, objects[0].prompt
        levels, positions = features.flat(len(objects))
        out = model.track_step(
            frame, True, levels, positions, features.sizes, None, self._prompt_masks(masks), {}, self._length, run_mem_encoder=False
        )
        low = out["pred_masks"]
        if self._length > 1:
            # The predictor memorises what is left of the mask at the low resolution, not the mask itself.
            memories = self._memorise_prompts(features, low, out["object_score_logits"])
            for each, memory, pointer in zip(objects, memories, out["obj_ptr"], strict=True):
                each.memories[frame], each.pointers[frame] = Memory(memory.clone()), pointer.clone()
        return low

    def _prompt_masks(self, masks: list[Tensor]) -> Tensor:
        """(H, W) bool -> (n, 1, S, S) float32 of zeros and ones, resized as the predictor does."""
        size = (self._model.image_size,) * 2
        resized = []
        for mask in masks:
            mask = mask[None, None].to(self._sam2.device).float()
            if mask.shape[-2:] != size:
                mask = (F.interpolate(mask, size=size, mode="bilinear", align_corners=False, antialias=True) >= 0.5).float()
            resized.append(mask)
        return torch.cat(resized)

    def _memorise_prompts(self, features: Features, low: Tensor, score: Tensor) -> Tensor:
        """(n, 1, h, w) mask logits and (n, 1) object scores -> memories (n, h' * w', channels)."""
        model = self._model
        high = F.interpolate(low, size=(model.image_size,) * 2, mode="bilinear", align_corners=False)
        levels, _ = features.flat(len(high))
        memories, positions = model._encode_new_memory(levels, features.sizes, high, score, True)
        self._memory_position = positions[-1][:1]
        return _tokens(memories)

    # ---- a tracked frame -------------------------------------------------------------------------------------------------------------

    def _track(self, objects: list[TrackedObject], step: Step, features: Features) -> Swept | None:
        if not objects:
            return None
        track = self._track_one if self._encoder.exact else self._track_batch
        with inference(self._sam2):
            logits = torch.cat([track(part, step, features) for part in self._parts(objects)])
        return Swept(step.frame, [each.id for each in objects], logits)

    def _track_batch(self, objects: list[TrackedObject], step: Step, features: Features) -> Tensor:
        if self._heads is None:
            self._heads = TrackingHeads(self._model)
        low, pointers, score = self._heads.masks(self._conditioned(objects, step, features), features)
        wanted = [i for i, each in enumerate(objects) if each.plan.needs_memory(step.frame)]
        if wanted:
            memories = self._heads.memories(features, low[wanted], score[wanted])
            for i, memory in zip(wanted, _tokens(memories), strict=True):
                objects[i].memories[step.frame] = Memory(memory.clone())  # a view would keep the memories of the whole batch
        for each, pointer in zip(objects, pointers, strict=True):
            if each.plan.needs_pointer(step.frame):
                each.pointers[step.frame] = pointer.clone()
        return low

    def _track_one(self, objects: list[TrackedObject], step: Step, features: Features) -> Tensor:
        (one,) = objects
        levels, positions = features.flat(1)
        wanted = one.plan.needs_memory(step.frame)
        out = self._model.track_step(
            step.frame,
            False,
            levels,
            positions,
            features.sizes,
            None,
            None,
            self._output_dict(one),
            self._length,
            track_in_reverse=step.backward,
            run_mem_encoder=wanted,
        )
        if wanted:
            one.memories[step.frame] = Memory(_tokens(out["maskmem_features"])[0])
        if one.plan.needs_pointer(step.frame):
            one.pointers[step.frame] = out["obj_ptr"][0]
        return out["pred_masks"]

    def _output_dict(self, one: TrackedObject) -> dict[str, dict[int, dict[str, object]]]:
        """What is alive of the object, in the predictor's structure."""
        size = self._memory_position.shape[-2:]
        outputs = {
            frame: {
                "maskmem_features": one.memories[frame].tokens.transpose(0, 1).unflatten(1, size)[None] if frame in one.memories else None,
                "maskmem_pos_enc": [self._memory_position],
                "obj_ptr": one.pointers[frame][None] if frame in one.pointers else None,
            }
            for frame in one.memories.keys() | one.pointers.keys()
        }
        return {"cond_frame_outputs": {one.prompt: outputs.pop(one.prompt)}, "non_cond_frame_outputs": outputs}

    # ---- memory attention ------------------------------------------------------------------------------------------------------------

    def _conditioned(self, objects: list[TrackedObject], step: Step, features: Features) -> Tensor:
        """The frame's features (n, h * w, channels), each object's seen through its memories."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, each in enumerate(objects):
            groups.setdefault((len(each.plan.memories(step)), len(each.plan.pointers(step))), []).append(i)
        remembered = [self._remembered(objects, places, step) for places in groups.values()]
        if self._attention is None:
            self._attention = MemoryAttention(self._model, self._memory_position, _KEY_BYTES, self._tick)
        current, position = features.levels[-1].transpose(0, 1), features.position.transpose(0, 1)
        return self._attention(current, position, remembered)

    def _remembered(self, objects: list[TrackedObject], places: list[int], step: Step) -> Remembered:
        """Memories and pointers of objects that have equally many of each: the prompt's first, then the tracked frames'."""
        model = self._model
        per_pointer = model.hidden_dim // model.mem_dim  # a pointer is as wide as several memory tokens
        group = [objects[i] for i in places]
        memories = [[(age, one.memories[frame]) for age, frame in [(0, one.prompt), *one.plan.memories(step)]] for one in group]
        pointers = [[(abs(step.frame - one.prompt), one.prompt), *one.plan.pointers(step)] for one in group]
        codes = self._distance_codes([[distance for distance, _ in each] for each in pointers]).repeat_interleave(per_pointer, 1)
        tokens = torch.stack([one.pointers[frame] for one, each in zip(group, pointers, strict=True) for _, frame in each])
        return Remembered(places, memories, tokens.view(len(group), -1, model.mem_dim), codes)

    def _distance_codes(self, distances: list[list[int]]) -> Tensor:
        """Distances in frames, n objects of p pointers -> their position codes (n, p, channels). All zero in SAM 2.0, which has none."""
        model = self._model
        if not model.add_tpos_enc_to_obj_ptrs:
            return self._memory_position.new_zeros(len(distances), len(distances[0]), model.mem_dim)
        shares = torch.tensor(distances, device=self._sam2.device) / (min(self._length, model.max_obj_ptrs_in_encoder) - 1)
        return model.obj_ptr_tpos_proj(sam2_package().get_1d_sine_pe(shares, dim=model.hidden_dim))


def _tokens(memories: Tensor) -> Tensor:
    """(n, channels, h, w) -> (n, h * w, channels)."""
    return memories.to(MEMORY_DTYPE).flatten(2).transpose(1, 2)
