"""What is read off a guide for local latents: bounds of rows, and draws for them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowvi import memory
from flowvi.arguments import unknown, whole
from flowvi.columns import Columns
from flowvi.diagnostics import psis
from flowvi.draws import LOG_P, LOG_Q, POINT
from flowvi.guides import Guide
from flowvi.randomness import own_randomness
from flowvi.row_training import pieces
from flowvi.target import Batch, LocalTarget

# Most pairs of a draw and a row at a time.
MOST = 100_000
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

    FOR_ROWS = ".mean and .se hold the bound of a row, and .minus(other) compares models row by row"

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

    FOR_ROWS = (
        "draws.khat says which rows to trust, flowvi.to_inference_data(draws) brings them to "
        "ArviZ, and fit.iw_bound() has the evidence of each row"
    )

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
    with torch.no_grad(), own_randomness():
        drawing = Pairs.measured(lambda k, part: _sample(guide, k, part), batch)
    size, draws = drawing.fit(memory.PIECE, len(batch.places), particles)
    scored = _scoring(target, batch)
    values: list[Tensor] = []
    elbos: list[Tensor] = []
    hidden = not progress or not sys.stderr.isatty()
    parts = tqdm(list(pieces(batch, size)), desc=f"L_{particles}", unit="piece", disable=hidden)
    with torch.no_grad(), own_randomness(seed):
        for part in parts:
            total = torch.zeros(len(part.places), dtype=torch.float64)
            log_sum = torch.full_like(total, -math.inf)
            for start in range(0, particles, draws):
                z, log_q = _sample(guide, min(draws, particles - start), part)
                log_w = (scored.each(target.log_prob, z, part) - log_q).double().cpu()
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

    def drawn(k: int, part: Batch) -> dict[int | str, Tensor]:
        z, log_q = _sample(guide, k, part)
        found: dict[int | str, Tensor] = {POINT: z, LOG_Q: log_q}
        found.update(target.constrain(z, part))
        return found

    with torch.no_grad(), own_randomness():
        size, count = Pairs.measured(drawn, batch).fit(memory.PIECE, len(batch.places), n)
    scoring = _scoring(target, batch)
    columns: Columns[int | str] = Columns(len(batch.places))
    with torch.no_grad(), own_randomness(seed):
        for part in pieces(batch, size):
            made = []
            for start in range(0, n, count):
                some = drawn(min(count, n - start), part)
                made.append({**some, LOG_P: scoring.each(target.log_prob, some[POINT], part)})
            every = {name: torch.cat([m[name] for m in made]) for name in made[0]}
            columns.add({name: t.transpose(0, 1) for name, t in every.items()})
    table = {name: t.swapaxes(0, 1)[None] for name, t in columns.arrays.items()}
    z, log_p, log_q = (table.pop(number) for number in (POINT, LOG_P, LOG_Q))
    named = {str(name): array for name, array in table.items()}
    # A draw that cannot be scored has weight zero.
    log_p = np.where(np.isfinite(log_p), log_p, -np.inf)
    return RowDraws(z, log_p, log_q, named, batch, target, dict(meta or {}), guide)


class Pairs(NamedTuple):
    """Bytes that an evaluation for draws of rows takes: always, a row, and a draw of a row."""

    fixed: float
    row: float
    draw: float

    @classmethod
    def measured(cls, function: Callable[[int, Batch], object], batch: Batch) -> Pairs:
        """What a function of a number of draws and some rows takes."""

        def rows(n: int) -> Batch:
            some = torch.arange(n, device=batch.places.device) % len(batch.places)
            return Batch(batch.places[some], tuple(t[some] for t in batch.data))

        by_draw = memory.cost(lambda k: function(k, rows(1)))
        by_row = memory.cost(lambda n: function(1, rows(n)))
        return cls(by_row.fixed, max(by_row.each - by_draw.each, 0.0), by_draw.each)

    def fit(self, size: int, rows: int, draws: int) -> tuple[int, int]:
        """How many rows at a time, and how many draws of each, fit into a number of bytes."""
        draws = memory.Cost(self.fixed + self.row, self.draw).fits(size, min(draws, MOST))
        each = memory.Cost(self.fixed, self.row + draws * self.draw)
        return each.fits(size, max(1, min(rows, MOST // draws))), draws

    def each(self, function: Callable[[Tensor, Batch], Tensor], z: Tensor, part: Batch) -> Tensor:
        """A function of draws and rows, in parts that fit memory. (K, B, D) -> (K, B)."""
        size, count = self.fit(memory.evaluated(), len(part.places), len(z))
        columns = [
            torch.cat([function(some, rows) for some in own.split(count)])
            for own, rows in zip(z.split(size, 1), pieces(part, size), strict=True)
        ]
        return torch.cat(columns, 1)


def _scoring(target: LocalTarget, batch: Batch) -> Pairs:
    def scores(k: int, part: Batch) -> Tensor:
        z = torch.zeros(k, len(part.places), target.dim, dtype=target.dtype, device=target.device)
        return target.terms_alone(z, part)

    with torch.no_grad():
        found = Pairs.measured(scores, batch)
    # Where rows are evaluated together, each draw has a copy of its row.
    return found._replace(draw=found.draw + sum(t[0].nbytes for t in batch.data))


def _sample(guide: Guide, k: int, part: Batch) -> tuple[Tensor, Tensor]:
    context: Any = part
    return guide.sample((k,), context)


def _se(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.inf
