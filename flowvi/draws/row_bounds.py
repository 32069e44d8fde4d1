"""Importance-weighted bounds on the evidence of each row."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowvi.draws.row_sampling import Pairs, pairs_of, sample_rows
from flowvi.guides.guide import Guide
from flowvi.runtime import memory
from flowvi.runtime.arguments import check_integer
from flowvi.runtime.display import Printed
from flowvi.runtime.progress import showing
from flowvi.runtime.rng import isolated_rng
from flowvi.targets import Batch, LocalTarget
from flowvi.targets.local.rows import split_batch


class Difference(NamedTuple):
    """A mean difference over rows, and its standard error."""

    value: float
    se: float


@dataclass(frozen=True, repr=False)
class RowBounds(Printed):
    r"""Importance-weighted bounds on the log evidence of rows.

    .. math:: L_K(x_n) = \log \frac{1}{K} \sum_k \frac{p(x_n, z_k)}{q(z_k \mid x_n)}

    Attributes:
        values: :math:`L_K` of each row, (N): one estimate from K draws.
        elbo: The ELBO of each row, (N), from the same draws.
        particles: K.
    """

    values: np.ndarray = field(repr=False)
    elbo: np.ndarray = field(repr=False)
    particles: int

    INSTEAD = ".mean and .se hold the bound of a row, and .minus(other) compares models row by row"

    @property
    def mean(self) -> float:
        """Mean bound over rows."""
        return float(self.values.mean())

    @property
    def se(self) -> float:
        """Standard error of the mean bound, over rows."""
        return _se(self.values)

    @property
    def elbo_mean(self) -> float:
        """Mean ELBO over rows."""
        return float(self.elbo.mean())

    @property
    def elbo_se(self) -> float:
        """Standard error of the mean ELBO, over rows."""
        return _se(self.elbo)

    def minus(self, other: RowBounds) -> Difference:
        """Mean difference to the bounds of another model on the same rows, paired by row."""
        if len(other.values) != len(self.values):
            raise ValueError(
                f"Paired differences need the same rows; got {len(self.values)} and "
                f"{len(other.values)} of them."
            )
        apart = self.values - other.values
        return Difference(float(apart.mean()), _se(apart))

    def __str__(self) -> str:
        return (
            f"{len(self.values)} rows: ELBO {self.elbo_mean:.4f} +- {self.elbo_se:.2g}, "
            f"L_{self.particles} {self.mean:.4f} +- {self.se:.2g} nats per row"
        )


def row_bounds(
    target: LocalTarget,
    guide: Guide,
    batch: Batch,
    particles: int,
    seed: int,
    progress: bool = False,
) -> RowBounds:
    """Evaluate the bounds of rows in parts that fit in memory.

    Args:
        target: The log densities.
        guide: A density for every row.
        batch: The rows.
        particles: Number of draws K for each row.
        seed: Seed of the draws.
        progress: Whether to show the progress: one bar in a terminal or a notebook, and a line
            every 10 seconds elsewhere.
    """
    particles = check_integer("particles", particles)
    with torch.no_grad(), isolated_rng():
        drawing = Pairs.measured(lambda k, part: sample_rows(guide, k, part), batch)
    size, draws = drawing.fit(memory.PIECE, len(batch.places), particles)
    scored = pairs_of(target, batch)
    values: list[Tensor] = []
    elbos: list[Tensor] = []
    parts = list(split_batch(batch, size))
    with (
        torch.no_grad(),
        isolated_rng(seed),
        showing(target.name, progress, unit="part") as shown,
    ):
        shown.phase(f"bound with {particles:,} draws of each row", len(parts))
        for part in parts:
            total = torch.zeros(len(part.places), dtype=torch.float64)
            log_sum = torch.full_like(total, -math.inf)
            for start in range(0, particles, draws):
                z, log_q = sample_rows(guide, min(draws, particles - start), part)
                log_w = (scored.each(target.log_prob, z, part) - log_q).double().cpu()
                log_w = log_w.masked_fill(log_w.isnan(), -math.inf)
                log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_w, 0))
                total += log_w.sum(0)
            values.append(log_sum - math.log(particles))
            elbos.append(total / particles)
            shown.step()
    return RowBounds(torch.cat(values).numpy(), torch.cat(elbos).numpy(), particles)


def _se(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.inf
