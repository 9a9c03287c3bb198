"""The output matrix of a language model, read from its file: ComfyUI leaves that of Qwen2.5-VL out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..decaf.errors import DecafError, reason

ROWS_AT_ONCE = 16384
"""Rows of the matrix that are read and multiplied together: a tenth of it, 0.1 GB."""


class FileHead:
    """`lm_head.weight` (vocabulary, width) in a safetensors file, which is read when it is asked, a part at a time. `scale`: by which its
    numbers are multiplied, where they are stored in few bits."""

    def __init__(self, path: Path, name: str, scale: str | None = None):
        self.path, self._name, self._scale = path, name, scale
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, hidden: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """Hidden states (..., width) -> logits (..., vocabulary), or (..., n) of the tokens `ids`."""
        if ids is None:
            return self._product(hidden)
        wanted = tuple(ids)
        if wanted not in self._rows:  # always those of yes and no
            with self._opened() as file:
                head = file.get_slice(self._name)
                self._rows[wanted] = torch.cat([self._plain(file, head[index : index + 1]) for index in wanted])
        return F.linear(hidden, self._rows[wanted].to(hidden))

    def _product(self, hidden: Tensor) -> Tensor:
        with self._opened() as file:
            head = file.get_slice(self._name)
            rows = head.get_shape()[0]
            parts = [
                F.linear(hidden, self._plain(file, head[first : min(first + ROWS_AT_ONCE, rows)]).to(hidden))
                for first in range(0, rows, ROWS_AT_ONCE)
            ]
        return torch.cat(parts, -1)

    def _plain(self, file, rows: Tensor) -> Tensor:
        if self._scale is None:
            return rows
        return rows.float() * file.get_tensor(self._scale).float()

    def _opened(self):
        from safetensors import safe_open

        try:
            return safe_open(self.path, "pt")
        except Exception as error:  # the file was moved or replaced since it was loaded
            raise DecafError(
                f"{self.path} can no longer be read ({reason(error)}); the model's answers are computed from it. Load the model again."
            ) from error
