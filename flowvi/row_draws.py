"""What is read off a guide for local latents: bounds of rows, and draws for them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowvi.arguments import unknown, whole
from flowvi.diagnostics import psis
from flowvi.guides import Guide
from flowvi.randomness import own_randomness
from flowvi.row_training import pieces
from flowvi.target import Batch, LocalTarget

# Numbers that an evaluation may hold at a time, about: 20 million are 80 MB in single precision.
NUMBERS = 20_000_000
# A decoder holds about so many numbers for each number of a row.
COPIES = 8
BOUNDS, DRAWING = 1, 0


class Difference(NamedTuple):
    """A mean difference over rows, and its standard error."""

    value: float
    se: float


@dataclass(frozen=True)
class RowBounds:
    r"""Importance-weighted bounds on the log evidence of rows.

    .. math:: L_K(x_n) = \log \frac{1}{K} \sum_k \frac{p(x_n, z_k)}{q(z_k \mid x_n)}

    Attributes:
        values: :math:`L_K` of each row, (N): one estimate of K draws.
        elbo: The ELBO of each row, (N), from the same draws.
        particles: K.
    """

    values: np.ndarray = field(repr=False)
    elbo: np.ndarray = field(repr=False)
    particles: int

    @property
    def mean(self) -> float:
        """Mean bound of a row."""
        return float(self.values.mean())

    @property
    def se(self) -> float:
        """Its standard error, over rows."""
        return _se(self.values)

    @property
    def elbo_mean(self) -> float:
        """Mean ELBO of a row."""
        return float(self.elbo.mean())

    @property
    def elbo_se(self) -> float:
        """Its standard error, over rows."""
        return _se(self.elbo)

    def minus(self, other: RowBounds) -> Difference:
        """How much better this model is than another on the same rows, pair by pair."""
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
            f"L_{self.particles} {self.mean:.4f} +- {self.se:.2g} nats a row"
        )


@dataclass(frozen=True, eq=False)
class RowDraws:
    """Draws of the latents of some rows.

    Attributes:
        z: Unconstrained draws, (1, draw, row, D).
        log_p: Log density of rows and latents, (1, draw, row).
        log_q: Log density of the guide, (1, draw, row).
        values: Latents and deterministics as in the model, each (1, draw, row, *shape).
        batch: The rows.
        target: Where names and dims come from.
        meta: JSON-able facts about the fit.
        guide: What drew them.
    """

    z: np.ndarray
    log_p: np.ndarray
    log_q: np.ndarray
    values: dict[str, np.ndarray]
    batch: Batch
    target: LocalTarget
    meta: dict[str, Any] = field(default_factory=dict)
    guide: Guide | None = None

    @property
    def log_weights(self) -> np.ndarray:
        """Log p - log q, (1, draw, row)."""
        return self.log_p - self.log_q

    @property
    def khat(self) -> np.ndarray:
        """Pareto shape of the weights of each row, (row)."""
        weights = self.log_weights.reshape(-1, self.log_weights.shape[-1])
        return np.array([psis(weights[:, n]).khat for n in range(weights.shape[1])])

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.values:
            raise KeyError(unknown("value", name, self.values))
        return self.values[name]

    def __str__(self) -> str:
        _, draws, rows, dim = self.z.shape
        return f"{self.target.name}: {draws} draws for each of {rows} rows in {dim} dimensions"


def row_bounds(
    target: LocalTarget,
    guide: Guide,
    batch: Batch,
    particles: int,
    seed: int,
    progress: bool = False,
) -> RowBounds:
    """Evaluate the bounds of rows in pieces that fit memory.

    Args:
        target: The log densities.
        guide: A density for every row.
        batch: The rows.
        particles: Number of draws K for each.
        seed: Seed of the draws.
        progress: Whether to show a bar.
    """
    particles = whole("particles", particles)
    most = chunk(target, batch)
    size = max(1, min(len(batch.places), most // min(particles, most)))
    draws = min(particles, most)
    values: list[Tensor] = []
    elbos: list[Tensor] = []
    hidden = not progress or not sys.stderr.isatty()
    parts = tqdm(list(pieces(batch, size)), desc=f"L_{particles}", unit="piece", disable=hidden)
    with torch.no_grad(), own_randomness(seed):
        for part in parts:
            rows: Any = part
            total = torch.zeros(len(part.places), dtype=torch.float64)
            log_sum = torch.full_like(total, -math.inf)
            for start in range(0, particles, draws):
                z, log_q = guide.sample((min(draws, particles - start),), rows)
                log_w = (target.log_prob(z, part) - log_q).double().cpu()
                log_w = log_w.masked_fill(log_w.isnan(), -math.inf)
                log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_w, 0))
                total += log_w.sum(0)
            values.append(log_sum - math.log(particles))
            elbos.append(total / particles)
    return RowBounds(torch.cat(values).numpy(), torch.cat(elbos).numpy(), particles)


def row_draws(
    target: LocalTarget,
    guide: Guide,
    batch: Batch,
    n: int,
    seed: int,
    meta: dict[str, Any] | None = None,
) -> RowDraws:
    """Draw the latents of rows and evaluate the target there.

    Args:
        target: The log densities.
        guide: A density for every row.
        batch: The rows.
        n: Draws for each.
        seed: Seed of the draws.
        meta: JSON-able facts about the fit, kept with the draws.
    """
    n = whole("n", n)
    size = max(1, chunk(target, batch) // max(1, len(batch.places)))
    columns: list[list[Tensor]] = [[], [], []]
    values: list[dict[str, Tensor]] = []
    rows: Any = batch
    with torch.no_grad(), own_randomness(seed):
        for start in range(0, n, size):
            z, log_q = guide.sample((min(size, n - start),), rows)
            log_p = target.log_prob(z, batch)
            for column, piece in zip(columns, (z, log_p, log_q), strict=True):
                column.append(piece)
            values.append(target.constrain(z, batch))
    drawn, scores, own = (_whole(column) for column in columns)
    named = {name: _whole([v[name] for v in values]) for name in values[0]}
    # A draw that cannot be scored has weight zero.
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    return RowDraws(drawn, scores, own, named, batch, target, dict(meta or {}), guide)


def chunk(target: LocalTarget, batch: Batch) -> int:
    """How many pairs of a draw and a row to evaluate at a time, so that memory stays bounded."""
    numbers = sum(t[0].numel() for t in batch.data) + target.dim
    return int(np.clip(NUMBERS // (COPIES * numbers + 1), 1, 100_000))


def _whole(pieces: Sequence[Tensor]) -> np.ndarray:
    return torch.cat(list(pieces)).cpu().numpy()[None]


def _se(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.inf
