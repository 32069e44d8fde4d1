"""Draw from a guide into a table."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi.draws.draws import Draws, scored
from flowvi.guides.guide import Guide
from flowvi.runtime import memory
from flowvi.runtime.arguments import check_integer
from flowvi.runtime.columns import Columns
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.targets import Target

DRAWING = 0
# Columns of the table without names; values have named columns.
POINT, LOG_P, LOG_Q = range(3)
# Function from a number n to draws (n, D) and their log density (n).
Sample = Callable[[int], tuple[Tensor, Tensor]]


def draw(
    target: Target,
    guides: Sequence[Guide],
    n: int,
    seed: int = 0,
    meta: dict[str, Any] | None = None,
) -> Draws:
    """Draw from each guide, and evaluate the target at the draws, within `memory.limit()`.

    The global random number generators are not changed.

    Args:
        target: The approximated log density.
        guides: Independent fits, one for each chain.
        n: Number of draws from each guide.
        seed: Seed of the draws.
        meta: JSON-able facts about the fit, stored in the table.
    """
    n = check_integer("n", n)
    with torch.no_grad(), isolated_rng(derive_seed(seed, DRAWING)):
        found = tabulate(target, n, [in_pieces(sampler(guide), n) for guide in guides], meta)
    return replace(found, guide=guides[0]) if len(guides) == 1 else found


def tabulate(
    target: Target,
    n: int,
    chains: Sequence[Iterable[tuple[Tensor, Tensor]]],
    meta: dict[str, Any] | None = None,
    stats: dict[str, np.ndarray] | None = None,
) -> Draws:
    """Evaluate the target at draws, and collect the results in one table.

    Args:
        target: The log density.
        n: Number of draws of each chain.
        chains: For each chain, parts of its draws: z (k, D) and log q (k).
        meta: JSON-able facts about the draws.
        stats: Statistics of each draw, (chain, draw).
    """
    columns: Columns[int | str] = Columns(n * len(chains))
    for pieces in chains:
        for piece in pieces:
            for some in zip(*(t.split(target.chunk()) for t in piece), strict=True):
                columns.add(_piece(target, *some))
    table = {
        name: column.reshape(len(chains), n, *column.shape[1:])
        for name, column in columns.arrays.items()
    }
    z, log_p, log_q = (table.pop(number) for number in (POINT, LOG_P, LOG_Q))
    values = {str(name): column for name, column in table.items()}
    log_p, log_q = scored(log_p, log_q)
    return Draws(z, log_p, log_q, values, target, dict(meta or {}), dict(stats or {}))


def sampler(guide: Guide) -> Sample:
    """Return a function from a number of draws to draws of the guide."""
    return lambda n: guide.sample((n,))


def piece(sample: Sample) -> int:
    """Number of draws in one call; draws do not depend on `max_memory`, so neither may this.

    Args:
        sample: Function that draws, the result of `sampler`.
    """
    with torch.no_grad(), isolated_rng():
        return memory.measure_cost(sample).points_within(memory.PIECE)


def in_pieces(sample: Sample, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate draws z (k, D) and their log density (k) in parts, n draws in total."""
    size = piece(sample)
    for start in range(0, n, size):
        yield sample(min(size, n - start))


def _piece(target: Target, z: Tensor, log_q: Tensor) -> dict[int | str, Tensor]:
    """Columns of the table for some draws: points, both log densities, and values."""
    found: dict[int | str, Tensor] = {POINT: z, LOG_P: target.log_prob(z), LOG_Q: log_q}
    found.update(target.constrain(z))
    return found
