"""Draw the latents of rows, and evaluate the target at the draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowvi.draws.draws import Draws, scored
from flowvi.draws.sampling import LOG_P, LOG_Q, POINT
from flowvi.guides.guide import Guide
from flowvi.runtime import memory
from flowvi.runtime.arguments import check_integer
from flowvi.runtime.columns import Columns
from flowvi.runtime.rng import isolated_rng
from flowvi.targets import Batch, LocalTarget
from flowvi.targets.local.rows import split_batch

# Largest number of (draw, row) pairs in one evaluation.
MOST = 100_000
BOUNDS, DRAWING = 1, 0


def row_draws(
    target: LocalTarget,
    guide: Guide,
    batch: Batch,
    n: int,
    seed: int,
    meta: dict[str, Any] | None = None,
) -> Draws:
    """Draw the latents of rows, and evaluate the target at the draws.

    Args:
        target: The log densities.
        guide: A density for every row.
        batch: The rows.
        n: Number of draws for each row.
        seed: Seed of the draws.
        meta: JSON-able facts about the fit, stored in the table.
    """
    n = check_integer("n", n)

    def drawn(k: int, part: Batch) -> dict[int | str, Tensor]:
        z, log_q = sample_rows(guide, k, part)
        found: dict[int | str, Tensor] = {POINT: z, LOG_Q: log_q}
        found.update(target.constrain(z, part))
        return found

    with torch.no_grad(), isolated_rng():
        size, count = Pairs.measured(drawn, batch).fit(memory.PIECE, len(batch.places), n)
    scoring = pairs_of(target, batch)
    columns: Columns[int | str] = Columns(len(batch.places))
    with torch.no_grad(), isolated_rng(seed):
        for part in split_batch(batch, size):
            made = []
            for start in range(0, n, count):
                some = drawn(min(count, n - start), part)
                made.append({**some, LOG_P: scoring.each(target.log_prob, some[POINT], part)})
            every = {name: torch.cat([m[name] for m in made]) for name in made[0]}
            columns.add({name: t.transpose(0, 1) for name, t in every.items()})
    table = {name: t.swapaxes(0, 1)[None] for name, t in columns.arrays.items()}
    z, log_p, log_q = (table.pop(number) for number in (POINT, LOG_P, LOG_Q))
    named = {str(name): array for name, array in table.items()}
    facts = dict(meta or {})
    return Draws(z, *scored(log_p, log_q), named, target, facts, batch=batch, guide=guide)


def log_prior_of_rows(target: LocalTarget, z: np.ndarray, batch: Batch) -> dict[str, np.ndarray]:
    """Log prior of the latents of rows, (chain, draw, row) by `LocalTarget.log_prior`.

    Args:
        target: The log densities of the rows.
        z: Points, (chain, draw, row, D).
        batch: The rows.
    """
    points = torch.as_tensor(z, dtype=target.dtype, device=target.device).flatten(0, 1)
    names = list(target.log_prior(points[:1], batch))
    if not names:
        return {}

    def prior(z: Tensor, rows: Batch) -> Tensor:
        return target.log_prior(z, rows)[names[0]]

    with torch.no_grad():
        found = pairs_of(target, batch).each(prior, points, batch)
    return {names[0]: found.cpu().numpy().reshape(z.shape[:3])}


class Pairs(NamedTuple):
    """Memory in bytes of an evaluation: a constant, for each row, for each draw of a row."""

    fixed: float
    row: float
    draw: float

    @classmethod
    def measured(cls, function: Callable[[int, Batch], object], batch: Batch) -> Pairs:
        """Measure the memory of a function of a number of draws and a batch of rows."""

        def rows(n: int) -> Batch:
            some = torch.arange(n, device=batch.places.device) % len(batch.places)
            return Batch(batch.places[some], tuple(t[some] for t in batch.data))

        by_draw = memory.measure_cost(lambda k: function(k, rows(1)))
        by_row = memory.measure_cost(lambda n: function(1, rows(n)))
        return cls(by_row.fixed, max(by_row.per_point - by_draw.per_point, 0.0), by_draw.per_point)

    def fit(self, size: int, rows: int, draws: int) -> tuple[int, int]:
        """Numbers of rows, and of draws of each row, that fit in a number of bytes."""
        draws = memory.Cost(self.fixed + self.row, self.draw).points_within(size, min(draws, MOST))
        each = memory.Cost(self.fixed, self.row + draws * self.draw)
        return each.points_within(size, max(1, min(rows, MOST // draws))), draws

    def each(self, function: Callable[[Tensor, Batch], Tensor], z: Tensor, part: Batch) -> Tensor:
        """Apply a function of draws and rows in parts that fit in memory. (K, B, D) -> (K, B)."""
        size, count = self.fit(memory.evaluation_bytes(), len(part.places), len(z))
        columns = [
            torch.cat([function(some, rows) for some in own.split(count)])
            for own, rows in zip(z.split(size, 1), split_batch(part, size), strict=True)
        ]
        return torch.cat(columns, 1)


def pairs_of(target: LocalTarget, batch: Batch) -> Pairs:
    """Memory of the log density for pairs of a draw and a row."""

    def scores(k: int, part: Batch) -> Tensor:
        z = torch.zeros(k, len(part.places), target.dim, dtype=target.dtype, device=target.device)
        return target.terms_alone(z, part)

    with torch.no_grad():
        found = Pairs.measured(scores, batch)
    # If rows are evaluated together, each draw has a copy of its row.
    return found._replace(draw=found.draw + sum(t[0].nbytes for t in batch.data))


def sample_rows(guide: Guide, k: int, part: Batch) -> tuple[Tensor, Tensor]:
    """Draw K times for each row of a batch; return draws and log densities."""
    context: Any = part
    return guide.sample((k,), context)
