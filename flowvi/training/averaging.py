"""Averages of the iterates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Average:
    """Running mean of a vector, from a given step on.

    References:
        Polyak and Juditsky (1992), doi:10.1137/0330046.
    """

    mean: Tensor | None = None
    count: int = 0

    def add(self, vector: Tensor) -> None:
        self.count += 1
        if self.mean is None:
            self.mean = vector.clone()
        else:
            self.mean += (vector - self.mean) / self.count
