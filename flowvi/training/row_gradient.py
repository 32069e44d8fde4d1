"""Bound and gradient for a batch of rows, for one process or several."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from flowvi.guides.guide import Guide
from flowvi.objectives.renyi_bound import Renyi
from flowvi.objectives.reweighted import WakeSleep
from flowvi.objectives.rows import row_step
from flowvi.runtime import distributed, memory
from flowvi.runtime.clock import Clock
from flowvi.runtime.rng import isolated_rng
from flowvi.targets import Batch, LocalTarget
from flowvi.targets.local.rows import split_batch
from flowvi.training.flat import Flat
from flowvi.training.gradient import Gradient
from flowvi.training.minibatch import Minibatch


class RowGradient(Gradient):
    """Estimates row bounds from fresh draws, and the gradient of minus their mean.

    Its argument is a batch. With several processes each takes its part of the batch.

    Args:
        target: The log densities of rows.
        guide: A density for every row.
        objective: The bound.
        settings: Settings of the minibatches.
        clock: Clock of the fit.

    Attributes:
        flat: All parameters and their gradients, in one vector each.
        divergence: Mean of log q(z) - log p(z) in the last step.
    """

    target: LocalTarget

    guide: Guide

    def __init__(
        self,
        target: LocalTarget,
        guide: Guide,
        objective: Renyi | WakeSleep,
        settings: Minibatch,
        clock: Clock,
    ) -> None:
        super().__init__(target, guide, clock)
        self.objective, self.settings = objective, settings
        self.flat = Flat(self.trained)
        self.divergence = 0.0
        self._fits: int | None = None
        self._released = False

    @property
    def whole(self) -> Tensor | None:
        return None if self._released else self.flat.vector.detach()

    def release(self) -> None:
        """Give every parameter its own memory again."""
        self.flat.release()
        self._released = True

    def __call__(self, batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
        """Mean bound of a batch of rows, and the gradient of minus the mean bound.

        Args:
            batch: The rows.
            beta: Weight of the prior and the guide.
        """
        count, processes = len(batch.places), distributed.size()
        if processes > 1:
            part = slice(distributed.rank(), None, processes)
            batch = Batch(batch.places[part], tuple(t[part] for t in batch.data))
        self.flat.zero()
        bound = self.flat.gradient.new_zeros(())
        divergence = bound.double()
        for piece in self.parts(batch):
            with self._precision():
                found = row_step(
                    self.target, self.guide, self.objective, piece, beta, self.settings.free_bits
                )
            # Parts may differ in size: the average over processes is then the mean of the batch.
            share = len(piece.places) * processes / count
            (-share * found.objective).backward()
            bound = bound + share * found.bound
            divergence = divergence + share / processes * found.divergence
        self._finest.gather()
        self.divergence = float(divergence) * count / max(len(batch.places), 1)
        return self.averaged(bound, self.flat.gradient)

    def explain_nonfinite(self) -> str:
        return ""

    def measure(self) -> None:
        """Measure the number of rows whose step fits in memory."""

        def step(n: int) -> object:
            batch = self.target.batch(torch.arange(n) % self.target.rows)
            return row_step(self.target, self.guide, self.objective, batch).objective

        with isolated_rng():
            cost = memory.measure_cost(step)
        self._fits = cost.points_within(memory.evaluation_bytes(), memory.ANY)

    def parts(self, batch: Batch) -> list[Batch]:
        """Split a batch to fit in memory; free bits need the mean divergence of a whole batch."""
        if not len(batch.places):
            return []
        if self._fits is None or len(batch.places) <= self._fits or self.settings.free_bits > 0:
            return [batch]
        parts = -(-len(batch.places) // self._fits)
        return list(split_batch(batch, -(-len(batch.places) // parts)))

    def _precision(self) -> AbstractContextManager[Any]:
        if not self.settings.amp or self.target.device.type != "cuda":
            return nullcontext()
        return torch.autocast("cuda", torch.bfloat16)
