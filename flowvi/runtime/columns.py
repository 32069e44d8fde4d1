"""Columns of results that are filled in pieces, on disk where they are too large for memory."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from flowvi.runtime import memory

Name = TypeVar("Name", bound=Hashable)


class Columns(Generic[Name]):
    """Named arrays (N, ...) that are made in pieces along their first axis.

    The arrays are allocated at the first piece, which avoids fragmented memory. Arrays that
    take more than their share of `max_memory` lie in unnamed temporary files, in the folder
    TMPDIR, and are deleted with the object.

    Args:
        n: Their length N.
    """

    def __init__(self, n: int) -> None:
        self.n, self.filled = n, 0
        self.arrays: dict[Name, np.ndarray] = {}

    def add(self, pieces: Mapping[Name, Tensor | np.ndarray]) -> None:
        """Append a piece to each column, (n, *shape)."""
        found = {k: p.cpu().numpy() if isinstance(p, Tensor) else p for k, p in pieces.items()}
        if not self.arrays:
            each = sum(p[:1].nbytes for p in found.values())
            make = _on_disk if self.n * each > memory.table_bytes() else np.empty
            self.arrays = {k: make((self.n, *p.shape[1:]), p.dtype) for k, p in found.items()}
        begin = self.filled
        for name, piece in found.items():
            self.filled = begin + len(piece)
            self.arrays[name][begin : self.filled] = piece


def _on_disk(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:
        return np.asarray(np.memmap(file, dtype, "w+", shape=shape))
