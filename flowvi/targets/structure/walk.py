"""Increments of a walk: latents whose running sums are a chain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Largest number of times that increments are summed: a walk, and one whose slope walks.
MOST_SUMS = 2


@dataclass(frozen=True)
class Walk:
    r"""A linear map between increments z and their sums w; its determinant is one.

    .. math:: w_t = z_1 + \dots + z_t, \qquad z_t = w_t - w_{t-1}

    A walk with standard normal increments ties each observation to all increments before it, but
    to few sums (the centred parametrisation; Papaspiliopoulos, Roberts and Sköld, 2007,
    doi:10.1214/088342307000000014).

    Args:
        columns: Columns of z of the increments, in order, (N).
        sums: How often they are summed; zero changes nothing.
    """

    columns: Tensor
    sums: int = 0

    def summed(self, z: Tensor) -> Tensor:
        """Points with sums in place of increments. (..., D) -> (..., D)."""
        if not self.sums:
            return z
        part = z[..., self.columns]
        for _ in range(self.sums):
            part = part.cumsum(-1)
        return self._with(z, part)

    def differenced(self, w: Tensor) -> Tensor:
        """Points with increments in place of sums. (..., D) -> (..., D)."""
        if not self.sums:
            return w
        part = w[..., self.columns]
        for _ in range(self.sums):
            part = torch.cat([part[..., :1], part[..., 1:] - part[..., :-1]], -1)
        return self._with(w, part)

    def _with(self, z: Tensor, part: Tensor) -> Tensor:
        # Not in place: derivatives are taken, and programs written, of both.
        return z.index_copy(-1, self.columns, part)
