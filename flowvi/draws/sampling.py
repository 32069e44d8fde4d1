"""Draw from a guide, and put the draws into a table."""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
# Columns of the table beside those of the values, which have names.
POINT, LOG_P, LOG_Q = range(3)
# Number n -> draws (n, D) and their log density (n).
Sample = Callable[[int], tuple[Tensor, Tensor]]


def draw(
    target: Target,
    guides: Sequence[Guide],
    n: int,
    seed: int = 0,
    meta: dict[str, Any] | None = None,
) -> Draws:
    """Draw from each guide and evaluate the target there, within `memory.limit()`.

    The caller's random number generators are left as they were.

    Args:
        target: What the guides approximate.
        guides: Independent fits, one for each chain.
        n: Draws from each guide.
        seed: Seed of the draws.
        meta: JSON-able facts about the fit, kept with the draws.
    """
    n = check_integer("n", n)
    with torch.no_grad(), isolated_rng(derive_seed(seed, DRAWING)):
        return tabulate(target, n, [in_pieces(sampler(guide), n) for guide in guides], meta)


def tabulate(
    target: Target,
    n: int,
    chains: Sequence[Iterable[tuple[Tensor, Tensor]]],
    meta: dict[str, Any] | None = None,
    stats: dict[str, np.ndarray] | None = None,
) -> Draws:
    """Evaluate the target at draws and put all into one table.

    Args:
        target: The log density.
        n: Draws of each chain.
        chains: For each chain, pieces z (k, D) and log q (k) of so many draws.
        meta: JSON-able facts about the draws.
        stats: Facts about each draw, (chain, draw).
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
    """A guide as a function of the number of draws."""
    return lambda n: guide.sample((n,))


def piece(sample: Sample) -> int:
    """How many draws to make at a time: as many whatever `max_memory` is, on which no draw depends.

    Args:
        sample: What draws them, as `sampler` makes it.
    """
    with torch.no_grad(), isolated_rng():
        return memory.measure_cost(sample).points_within(memory.PIECE)


def in_pieces(sample: Sample, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draws z (k, D) and their log density (k), n in all, each piece made when it is asked for."""
    size = piece(sample)
    for start in range(0, n, size):
        yield sample(min(size, n - start))


def _piece(target: Target, z: Tensor, log_q: Tensor) -> dict[int | str, Tensor]:
    """A piece of the table: points, both densities, and the values there."""
    found: dict[int | str, Tensor] = {POINT: z, LOG_P: target.log_prob(z), LOG_Q: log_q}
    found.update(target.constrain(z))
    return found
