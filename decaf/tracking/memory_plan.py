"""Which of an object's past outputs a segmenter looks at when it tracks a frame, and when each of them is no longer needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .segmenter import Memory, MemoryBank, MemoryReach, Pointer


@dataclass(frozen=True)
class Step:
    """One tracked frame: which, and whether time runs backward."""

    frame: int
    backward: bool


class MemoryPlan:
    """The memories of an object that is prompted on frame `prompt` of `length` frames, and tracked to the end and then to the start. `more`:
    later frames on which it is prompted, too; they are not tracked, and all prompts are remembered before the first frame is.

    Looked at are the memories of all prompts and of the `reach.memories - 1` frames before the tracked one, and the object pointers of the
    prompts before it and of the `reach.pointers - 1` frames before it ("before" in the direction of tracking). The backward sweep also meets outputs
    that the forward sweep left behind on the frames after the prompt. An output is kept exactly until the last step that looks at it.
    """

    def __init__(self, prompt: int, length: int, reach: MemoryReach, more: Sequence[int] = ()):
        self.prompt, self._length = prompt, length
        self.prompts = (prompt, *more)
        self._memories = reach.memories
        self._pointers = min(length, reach.pointers)

    def memories(self, step: Step) -> list[tuple[int, int]]:
        """(distance, frame) of the memories after the prompt's own, the most distant first."""
        return self._before(step, range(self._memories - 1, 0, -1))

    def pointers(self, step: Step) -> list[tuple[int, int]]:
        """(distance, frame) of the object pointers after the prompt's own, the nearest first."""
        return self._before(step, range(1, self._pointers))

    def _before(self, step: Step, distances: range) -> list[tuple[int, int]]:
        frames = [(d, step.frame + d if step.backward else step.frame - d) for d in distances]
        return [(d, frame) for d, frame in frames if self._is_tracked(frame, step)]

    def _is_tracked(self, frame: int, step: Step) -> bool:
        """Has `frame` an output of tracking when `step` comes? A prompt's frame never has: it is listed apart."""
        return frame not in self.prompts and (step.frame < frame < self._length if step.backward else self.prompt < frame < step.frame)

    def _last(self, frame: int, reach: int) -> Step | None:
        """The last step that looks at the output of `frame`, if any does, when outputs are looked at from up to `reach` frames away."""
        start = max(frame - reach, 0)
        if start < min(frame, self.prompt):
            return Step(start, True)
        return Step(min(frame + reach, self._length - 1), False) if self.prompt < frame < self._length - 1 else None

    def needs_memory(self, frame: int) -> bool:
        return self._last(frame, self._memories - 1) is not None

    def needs_pointer(self, frame: int) -> bool:
        return self._last(frame, self._pointers - 1) is not None

    def memory_is_dead(self, frame: int, step: Step) -> bool:
        """Is no step after `step` going to look at the memory of `frame`?"""
        return frame not in self.prompts and self._last(frame, self._memories - 1) == step

    def pointer_is_dead(self, frame: int, step: Step) -> bool:
        return frame not in self.prompts and self._last(frame, self._pointers - 1) == step


@dataclass
class TrackedObject:
    """An object on its way through the clip. `memories` and `pointers`: by frame."""

    id: int
    plan: MemoryPlan
    memories: dict[int, Memory] = field(default_factory=dict)
    pointers: dict[int, Pointer] = field(default_factory=dict)

    @property
    def prompt(self) -> int:
        return self.plan.prompt

    def bank(self, step: Step) -> MemoryBank:
        """What is looked at on this step."""
        prompts = [(frame - step.frame if step.backward else step.frame - frame, frame) for frame in self.plan.prompts]
        past = [(d, frame) for d, frame in prompts if d > 0]
        return MemoryBank(
            [(d, self.memories[frame]) for d, frame in [*prompts, *self.plan.memories(step)]],
            [(d, self.pointers[frame]) for d, frame in [*past, *self.plan.pointers(step)]],
            len(prompts),
        )

    def release(self, step: Step) -> None:
        """Drops what no later step looks at."""
        self.memories = {t: m for t, m in self.memories.items() if not self.plan.memory_is_dead(t, step)}
        self.pointers = {t: p for t, p in self.pointers.items() if not self.plan.pointer_is_dead(t, step)}
