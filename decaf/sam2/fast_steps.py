"""The steps of a segmenter in this library's way: all objects of a frame in one batch, and nothing computed twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..tracking.segmenter import MemoryBank, Outputs
from .encoder import FastEncoder, Features
from .heads import TrackingHeads
from .memory_attention import BankGroup, BatchedMemoryAttention
from .package import sam2_package
from .package_steps import PackageSteps, as_tokens


class FastSteps(PackageSteps):
    """Equal to `PackageSteps` up to rounding. Prompts, of which there are few, go through the package's own steps, in a batch."""

    memory_mask_size: int | None = None
    """Side of the masks that memories are made of, if not that of the picture."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype = torch.float32,
        check_cancelled: Callable[[], None] = lambda: None,
        *,
        image_size: int | None = None,
    ):
        """`image_size`: of the pictures to encode, if not the model's own."""
        super().__init__(model, dtype, check_cancelled)
        self._encode = FastEncoder(model, image_size)
        self._attention: BatchedMemoryAttention | None = None
        self._heads: TrackingHeads | None = None

    def remember(self, features: Features, masks: Sequence[Tensor]) -> Outputs:
        return self._remember(features, masks)

    def remember_as(self, other: PackageSteps) -> None:
        """From now on memories that `other` made may be looked at."""
        self._memory_pos_enc = other._memory_pos_enc

    def track(self, features: Features, banks: Sequence[MemoryBank], remember: Sequence[bool], length: int) -> Outputs:
        with self._inference():
            if self._heads is None:
                self._heads = TrackingHeads(self._model, self.memory_mask_size)
            low, pointers, score = self._heads.masks(self._conditioned(features, banks, length), features)
            memories: list[Tensor | None] = [None] * len(banks)
            wanted = [i for i, yes in enumerate(remember) if yes]
            if wanted:
                new = as_tokens(self._heads.memories(features, low[wanted], score[wanted]))
                for i, memory in zip(wanted, new, strict=True):
                    memories[i] = memory
            return Outputs(low, memories, [pointer.clone() for pointer in pointers])

    def _conditioned(self, features: Features, banks: Sequence[MemoryBank], length: int) -> Tensor:
        """The frame's features (n, h * w, channels), each object's seen through its memories."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        for i, bank in enumerate(banks):
            groups.setdefault((len(bank.memories), len(bank.pointers), bank.prompts), []).append(i)
        if self._attention is None:
            self._attention = BatchedMemoryAttention(self._model, self._memory_pos_enc, self._check_cancelled)
        current, pos_enc = features.levels[-1].transpose(0, 1), features.pos_enc.transpose(0, 1)
        return self._attention(current, pos_enc, [self._group(banks, index, length) for index in groups.values()])

    def _group(self, banks: Sequence[MemoryBank], index: list[int], length: int) -> BankGroup:
        """The banks at these indices, which have equally many memories and pointers each."""
        model, chosen = self._model, [banks[i] for i in index]
        per_pointer = model.hidden_dim // model.mem_dim  # a pointer is as wide as several memory tokens
        memories = []
        for bank in chosen:
            prompts, tracked = bank.memories[: bank.prompts], bank.memories[bank.prompts :]
            ages = [(0, memory) for _, memory in prompts]
            memories.append([*ages, *((model.num_maskmem - distance, memory) for distance, memory in tracked)])
        pos_enc = self._distance_pos_enc([[distance for distance, _ in bank.pointers] for bank in chosen], length)
        pointers = torch.stack([pointer for bank in chosen for _, pointer in bank.pointers])
        return BankGroup(index, memories, pointers.view(len(chosen), -1, model.mem_dim), pos_enc.repeat_interleave(per_pointer, 1))

    def _distance_pos_enc(self, distances: list[list[int]], length: int) -> Tensor:
        """Distances in frames, n objects of p pointers -> their positional encodings (n, p, channels). All zero in SAM 2.0, which has none."""
        model = self._model
        if not model.add_tpos_enc_to_obj_ptrs:
            return self._memory_pos_enc.new_zeros(len(distances), len(distances[0]), model.mem_dim)
        shares = torch.tensor(distances, device=self.device) / (min(length, model.max_obj_ptrs_in_encoder) - 1)
        return model.obj_ptr_tpos_proj(sam2_package().get_1d_sine_pe(shares, dim=model.hidden_dim))
