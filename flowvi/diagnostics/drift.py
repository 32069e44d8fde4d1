"""How far short Markov chains drift from the draws at which they start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

# Chance that draws of the posterior itself are said to drift, over all measures of a fit.
LEVEL = 0.001
# Least drift to report: of a mean in sds, of a log sd, and of the mean log density in nats for
# each dimension. Smaller ones do not matter (`findings.TOLERANCE`).
SHIFT, STRETCH, NATS = 0.15, math.log1p(0.15), 0.1
# Tails whose mass is compared: the share of the draws in them, and the least excess to report.
TAILS = ((0.025, 0.015), (0.0025, 0.014))
# Fewest chains that enter a tail in which few or no draws are.
ENTERED = 12
# Directions of largest and of smallest stretch, chosen by half of the chains and measured by the
# other half; and the largest dimension in which they are searched.
DIRECTIONS, MOST_DIM = 2, 300
# Values are clipped at this many sds: means of heavy tails have no standard error.
CLIP = 6.0
# Chains that are correlated with their start by more, or accepted less often, say nothing.
STUCK, REJECTED = 0.9, 0.3
# Those that are correlated less, and accepted more often, are as good as draws of the posterior.
MIXED, ACCEPTED = 0.3, 0.5
# Kinds of measures, in the order in which they are named, and how many of them are named.
KINDS = MEAN, SD, DIRECTION, TAIL, DENSITY = ("mean", "sd", "direction", "tail", "density")
NAMED = 3


class Chains(NamedTuple):
    """Short chains and the draws at which they start, in one space.

    The first half of the chains starts at draws of the even rows of the table, the second half
    at draws of the odd rows.

    Attributes:
        table: The draws to be judged, (M, D).
        log_p: Their log densities, (M).
        weights: Their weights, (M), which add up to one.
        start: Draws at which the chains start, (N, D).
        start_log_p: Their log densities, (N).
        path: Points of the chains after a burn-in, (T, N, D).
        path_log_p: Their log densities, (T, N).
    """

    table: np.ndarray
    log_p: np.ndarray
    weights: np.ndarray
    start: np.ndarray
    start_log_p: np.ndarray
    path: np.ndarray
    path_log_p: np.ndarray


class Move(NamedTuple):
    """Drift of one measure.

    Attributes:
        kind: One of `KINDS`.
        label: The scalar, or a sentence part on the direction.
        drift: Of a mean in sds, of a log sd, of a share, or in nats.
        se: Its standard error.
        least: Smallest drift that matters.
    """

    kind: str
    label: str
    drift: float
    se: float
    least: float

    @property
    def words(self) -> str:
        """The drift in words."""
        if self.kind == MEAN:
            return f"the mean of {self.label} by {self.drift:+.2g} sd (+- {self.se:.1g})"
        if self.kind == TAIL:
            return f"the mass {self.label} by {self.drift:+.1%} (+- {self.se:.1%})"
        if self.kind == DENSITY:
            return f"the mean log density by {self.drift:+.2g} nats (+- {self.se:.1g})"
        return f"the sd of {self.label} by {math.expm1(self.drift):+.0%} (+- {self.se:.0%})"


@dataclass(frozen=True)
class Opinion:
    """What short chains say of the draws at which they start.

    Attributes:
        chains, transitions: Number of chains, and of transitions after the burn-in.
        acceptance: Mean acceptance probability.
        correlation: Median correlation of a coordinate with its start at the end.
        slow: The coordinate with the largest correlation, if that is large.
        measures: Number of measures.
        shift, stretch: The largest drift of a mean, in sds, and of a sd, relative to it.
        drifts: Drifts that matter and exceed noise, in words, the largest first.
        bridge: Log evidence by bridge sampling between draws and chains, and its standard error;
            None where chains moved in another space than the guide's, or not far enough.
    """

    chains: int
    transitions: int
    acceptance: float
    correlation: float
    slow: str
    measures: int
    shift: float
    stretch: float
    drifts: tuple[str, ...]
    bridge: tuple[float, float] | None = None

    @property
    def mixed(self) -> bool:
        """Whether each chain is nearly independent of where it started."""
        return self.correlation < MIXED and self.acceptance > ACCEPTED and not self.slow

    @property
    def moved(self) -> bool:
        """Whether the chains moved far enough to say anything."""
        return self.correlation < STUCK and self.acceptance > REJECTED

    @property
    def reason(self) -> str:
        """A sentence on the draws."""
        what = f"{self.chains} short Markov chains from these draws"
        how = f"acceptance {self.acceptance:.2f}, correlation with the start {self.correlation:.2f}"
        if self.drifts:
            return (
                f"{what} drift away from them: {'; '.join(self.drifts)}. The draws are off by at "
                f"least that much ({how})."
            )
        if not self.moved:
            return f"{what} hardly moved ({how}): they are no second opinion."
        return (
            f"{what} stay there ({how}): no mean moves by more than {self.shift:.2g} sd and no sd "
            f"by more than {self.stretch:.0%}. Modes that no draw visits remain unseen."
            f"{f' {self.slow} hardly moved, and may be off.' if self.slow else ''}"
        )


def opinion(chains: Chains, labels: Sequence[str], acceptance: float) -> Opinion:
    """Judge draws by the drift of chains that start at them.

    The chains leave the posterior unchanged. Any drift of an average, beyond noise, is therefore
    a lower bound on the error of the draws' own average. The noise of a difference is that of the
    chains, which are independent, with the part that the start explains taken out.

    Args:
        chains: The chains and the draws.
        labels: Names of the coordinates, D.
        acceptance: Mean acceptance probability of the chains.

    References:
        Wang, Kasprzak and Huggins (2023), "A Targeted Accuracy Diagnostic for Variational
        Approximations", arXiv:2302.12419.
    """
    moves, correlation = measure(chains, labels)
    limit = NormalDist().inv_cdf(1 - LEVEL / (2 * max(1, len(moves))))
    found = [m for m in moves if abs(m.drift) > max(m.least, limit * m.se)]
    largest = {
        kind: max((abs(m.drift) for m in moves if m.kind == kind), default=0.0)
        for kind in (MEAN, SD)
    }
    slowest = max(correlation, key=lambda name: correlation[name], default="")
    return Opinion(
        chains.path.shape[1],
        chains.path.shape[0],
        acceptance,
        float(np.median([*correlation.values()])) if correlation else 1.0,
        slowest if correlation and correlation[slowest] >= STUCK else "",
        len(moves),
        largest[MEAN],
        math.expm1(largest[SD]),
        tuple(_largest(some).words for some in _by_kind(found))[:NAMED],
    )


def measure(chains: Chains, labels: Sequence[str]) -> tuple[list[Move], dict[str, float]]:
    """All measures, and the correlation of each coordinate that varies with its start.

    Args:
        chains: The chains and the draws.
        labels: Names of the coordinates, D.
    """
    inside = np.isfinite(chains.log_p) & (chains.weights > 0)
    weights = np.where(inside, chains.weights, 0.0)
    weights = weights / weights.sum()
    loc = weights @ chains.table
    scale = np.sqrt(weights @ (chains.table - loc) ** 2)
    varies = scale > 0
    names = [label for label, kept in zip(labels, varies, strict=True) if kept]

    def standard(z: np.ndarray) -> np.ndarray:
        return np.clip(((z - loc)[..., varies]) / scale[varies], -CLIP, CLIP)

    table, start, path = (standard(z) for z in (chains.table, chains.start, chains.path))
    moves = [
        *_locations(table, start, path, weights, names),
        *_tails(table, start, path, weights, names),
        *_directions(table, start, path, weights, names),
        *_density(chains, weights, len(names)),
    ]
    correlation = _correlation(start, path[-1]).tolist()
    return moves, dict(zip(names, correlation, strict=True))


def _largest(moves: Sequence[Move]) -> Move:
    """The move that exceeds what matters most."""
    return max(moves, key=lambda m: abs(m.drift) / m.least)


def _by_kind(moves: Sequence[Move]) -> list[list[Move]]:
    """Moves of each kind, for kinds with any."""
    kinds = ([m for m in moves if m.kind == kind] for kind in KINDS)
    return [some for some in kinds if some]


def _correlation(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Correlation of start and end for each coordinate, (P); 1 where nothing moves."""
    a, b = start - start.mean(0), end - end.mean(0)
    spread = np.sqrt((a**2).mean(0) * (b**2).mean(0))
    return np.divide((a * b).mean(0), spread, out=np.ones_like(spread), where=spread > 0)


class _Change(NamedTuple):
    """Change of averages, (P), with the variances of its parts."""

    value: np.ndarray
    of_chains: np.ndarray
    of_table: np.ndarray

    @property
    def se(self) -> np.ndarray:
        return np.sqrt(self.of_chains + self.of_table)


def _change(table: np.ndarray, start: np.ndarray, path: np.ndarray, weights: np.ndarray) -> _Change:
    """Change of the averages of functions from the table to the chains.

    Args:
        table: Values at the table, (M, P).
        start: Values at the start, (N, P).
        path: Mean value of each chain, (N, P).
        weights: Weights of the table, (M).
    """
    mean = weights @ table
    spread = weights[:, None] ** 2 * (table - mean) ** 2
    a, b = start - start.mean(0), path - path.mean(0)
    square = (a**2).sum(0)
    slope = np.divide((a * b).sum(0), square, out=np.zeros_like(square), where=square > 0)
    slope = np.clip(slope, -1.0, 1.0)
    n = len(start)
    rest = ((b - slope * a) ** 2).sum(0) / (n * max(1, n - 2))
    value = path.mean(0) - slope * start.mean(0) - (1 - slope) * mean
    return _Change(value, rest, (1 - slope) ** 2 * spread.sum(0))


def _locations(
    table: np.ndarray,
    start: np.ndarray,
    path: np.ndarray,
    weights: np.ndarray,
    names: Sequence[str],
) -> list[Move]:
    """Drifts of means and log sds."""
    mean = _change(table, start, path.mean(0), weights)
    stretch = _stretch(table, start, path, weights, mean.value)
    return [*_moves(MEAN, names, mean.value, mean.se, SHIFT), *_moves(SD, names, *stretch, STRETCH)]


def _stretch(
    table: np.ndarray,
    start: np.ndarray,
    path: np.ndarray,
    weights: np.ndarray,
    shift: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Drifts of log sds, and their standard errors, (P), (P)."""
    loc = weights @ table
    change = _change((table - loc) ** 2, (start - loc) ** 2, ((path - loc) ** 2).mean(0), weights)
    before = weights @ (table - loc) ** 2
    after = np.maximum(before + change.value - shift**2, 1e-3 * before)
    # Errors relative to the variances that they belong to.
    slack = np.sqrt(change.of_chains / after**2 + change.of_table / before**2)
    return np.log(after / before) / 2, slack / 2


def _tails(
    table: np.ndarray,
    start: np.ndarray,
    path: np.ndarray,
    weights: np.ndarray,
    names: Sequence[str],
) -> list[Move]:
    """Excesses of mass beyond quantiles of the table, on either side."""
    order = np.argsort(table, axis=0)
    heights = np.cumsum(weights[order], axis=0)
    few = 10 * float((weights**2).sum())
    moves = []
    for asked, least in TAILS:
        share = max(asked, few)
        for sign, level, side in ((-1, share, "below"), (1, 1 - share, "above")):
            rows = np.argmax(heights >= level, axis=0)
            limits = np.take_along_axis(table, order, 0)[rows, np.arange(len(names))]

            def beyond(z: np.ndarray, sign: int = sign, limits: np.ndarray = limits) -> np.ndarray:
                return (sign * (z - limits) > 0).astype(np.float64)

            inside, before = beyond(path), beyond(start)
            change = _change(beyond(table), before, inside.mean(0), weights)
            # The variance of a share is proportional to it: the one that draws of the posterior
            # would have counts.
            had, has = weights @ beyond(table), inside.mean((0, 1))
            excess = np.minimum(1.0, np.divide(had, has, out=np.ones_like(had), where=has > 0))
            se = np.sqrt(change.of_chains * excess + change.of_table)
            entered = ((inside.max(0) > 0) & (before == 0)).sum(0)
            value = np.where(entered >= ENTERED, np.maximum(change.value, 0.0), 0.0)
            label = f"{side} the {level:.2%} quantile of"
            moves += _moves(TAIL, [f"{label} {name}" for name in names], value, se, least)
    return moves


def _directions(
    table: np.ndarray,
    start: np.ndarray,
    path: np.ndarray,
    weights: np.ndarray,
    names: Sequence[str],
) -> list[Move]:
    """Drifts of the log sds of combinations of coordinates that drift most.

    One half of table and chains chooses the combinations, the other half measures their drift.
    """
    dim, half = table.shape[1], len(start) // 2
    if not 2 <= dim <= MOST_DIM or not weights[::2].any() or not weights[1::2].any():
        return []
    from scipy.linalg import eigh

    def moment(z: np.ndarray, w: np.ndarray) -> np.ndarray:
        centred = z - w @ z
        return (w[:, None] * centred).T @ centred

    some = weights[::2] / weights[::2].sum()
    points = path[:, :half].reshape(-1, dim)
    before = moment(table[::2], some) + 1e-9 * np.eye(dim)
    try:
        _, vectors = eigh(moment(points, np.full(len(points), 1 / len(points))), before)
    except np.linalg.LinAlgError:
        return []
    number = min(DIRECTIONS, dim // 2)
    chosen = np.concatenate([vectors[:, :number], vectors[:, dim - number :]], axis=1)
    others = weights[1::2] / weights[1::2].sum()
    pieces = (table[1::2] @ chosen, start[half:] @ chosen, path[:, half:] @ chosen)
    mean = _change(pieces[0], pieces[1], pieces[2].mean(0), others)
    stretch = _stretch(*pieces, others, mean.value)
    labels = [_combination(vector, names) for vector in chosen.T]
    return _moves(DIRECTION, labels, *stretch, STRETCH)


def _combination(vector: np.ndarray, names: Sequence[str]) -> str:
    """A combination of coordinates in words: those with the largest coefficients."""
    order = np.argsort(-np.abs(vector))[:2]
    return "a combination of " + " and ".join(names[i] for i in order)


def _density(chains: Chains, weights: np.ndarray, dim: int) -> list[Move]:
    """Drift of the mean log density."""
    kept = weights > 0
    table, weights = chains.log_p[kept][:, None], weights[kept]
    known = np.isfinite(chains.start_log_p) & np.isfinite(chains.path_log_p).all(0)
    if known.sum() < 3 or not dim:
        return []
    path = chains.path_log_p[:, known].mean(0)[:, None]
    change = _change(table, chains.start_log_p[known][:, None], path, weights)
    return _moves(DENSITY, [""], change.value, change.se, NATS * dim)


def _moves(
    kind: str, labels: Sequence[str], drift: np.ndarray, se: np.ndarray, least: float
) -> list[Move]:
    """Moves of one kind."""
    columns = zip(labels, drift.tolist(), se.tolist(), strict=True)
    return [Move(kind, *column, least) for column in columns]
