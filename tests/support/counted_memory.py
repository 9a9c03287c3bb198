"""Counts the tensors that are alive while something works, on any device; with a limit, a stand-in for a card of that size."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """`most`: bytes of the tensors that operators made and that were alive at a time. What an operator takes inside is not seen. With
    a `limit`, the operator that passes it raises what a full GPU raises."""

    def __init__(self, limit: int | None = None):
        super().__init__()
        self.most, self._limit, self._storages = 0, limit, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        made = {}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: one for key, one in self._storages.items() if not one[0].expired()} | made
        alive = sum(size for _, size in self._storages.values())
        if self._limit is not None and alive > self._limit:
            size = sum(size for _, size in made.values())
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size:,} bytes of {self._limit:,} (a stand-in for a GPU).")
        self.most = max(self.most, alive)
        return out
