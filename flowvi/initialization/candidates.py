"""Where a fit starts: candidate Gaussians, and the best of them refined."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from flowvi.guides.guide import FULL_RANK_DIM
from flowvi.initialization.ascents import ascend, ascend_together
from flowvi.initialization.gaussian import (
    GaussianApproximation,
    LogDensityProtocol,
    curvature,
    diagonal_of,
    distinct_candidates,
    evaluate,
    factor_of,
    log_weights,
    refine,
    scores_in_chunks,
    value_and_score,
    with_elbo,
)
from flowvi.initialization.newton import refine_by_newton
from flowvi.initialization.pathfinder import normals_along_path
from flowvi.initialization.peaks import connected_place, converged_peak
from flowvi.runtime.clock import Interrupted, abort_on_interrupt, until_interrupted

Log = Callable[[str], None]

PATH_POINTS = 6
NEWTON_STEPS = 12
SMALL = 50
LARGE = 300
TRY_ROUNDS = 8
REFINE_ROUNDS = 30
JUDGE_DRAWS = 400
# Number of draws for the comparison of the candidates of one start point.
SIFT_DRAWS = 100
# Number of path candidates to refine if all starts lead to one mode.
PATH_REFINED = 2
# KL(q || p) in nats below which no other candidate of the same mode is refined.
CLOSE = 0.1
# If draws of a normal around a start point have no finite density, its scale is multiplied by
# this factor, at most so many times.
NARROWER, TIMES = 0.1, 12


class StartDensity(LogDensityProtocol, Protocol):
    """A density with points to start from: a target, or one of theta and some rows."""

    name: str

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the density is evaluated."""

    @property
    def device(self) -> torch.device:
        """Where the density is evaluated."""

    def starts(self, generator: torch.Generator) -> Tensor:
        """Points to start from, (P, D)."""


class StartSearch(NamedTuple):
    """Result of the search for a Gaussian start.

    Attributes:
        best: The candidate with the highest ELBO, refined.
        rejected: The other candidates that were refined.
        ends: Where the ascents have ended, (N, D).
    """

    best: GaussianApproximation
    rejected: list[GaussianApproximation]
    ends: Tensor


class StartCandidates(NamedTuple):
    """Candidates from one start point.

    Attributes:
        normals: Candidates, the first of them around the start point itself.
        end: Where the ascent from there has ended, (D).
    """

    normals: list[GaussianApproximation]
    end: Tensor


def best_gaussian(
    target: StartDensity,
    seed: int,
    diagonal: bool,
    log: Log,
    out_of_time: Callable[[], bool] = lambda: False,
    median: Tensor | None = None,
    places: Tensor | None = None,
    points: Tensor | None = None,
) -> StartSearch:
    """Find a normal density with a high ELBO, without a step size to choose.

    Candidates are narrow normals at start points, and Laplace approximations
    along and at the end of L-BFGS paths to a mode: where the density has no
    mode, as in a centred hierarchy, an earlier point of the path wins. The
    best ELBO on common draws is refined by `refine`. Where all ascents end in one
    mode, few candidates are enough: the best around a start point, and two at the mode; or
    the first of them alone, if its KL(q || p) leaves too little for another to be better.

    Args:
        target: The log density.
        seed: Seed of the start points and draws.
        diagonal: Restrict the covariance to a diagonal; the scale has shape (D).
        log: Takes a sentence about every decision, for the log.
        out_of_time: Returns whether the time for the search is spent.
        median: Median of the prior, (D), another point to start from.
        places: Points where the density is finite, (N, D), for start points where it is not.
        points: The only points to start from, (P, D), in place of those of the target.
    """
    generator = torch.Generator(device=target.device).manual_seed(seed)
    judge = torch.randn(
        JUDGE_DRAWS, target.dim, generator=generator, dtype=target.dtype, device=target.device
    )
    groups = candidates(target, generator, median, diagonal, places, points)
    found, ends = _score_starts(target, groups, judge, out_of_time)
    if diagonal:
        found = [with_elbo(target, diagonal_of(g), judge) for g in found]
    found, alone = _worth_refining(target, found, ends, out_of_time)

    first = found if target.dim <= LARGE else found[:2]
    if target.dim > LARGE and not diagonal:
        first = [_try_diagonal(target, g, generator, judge, out_of_time) for g in first]
    tried = []
    for g in first:
        tried.append(
            refine_fully(target, g, generator, judge, out_of_time, TRY_ROUNDS, diagonal=diagonal)
        )
        if alone and noise_gap_of(target, tried[-1], judge) < CLOSE:
            break
    best = max(tried, key=lambda g: g.elbo)
    refined = refine_fully(
        target, best, generator, judge, out_of_time, REFINE_ROUNDS, diagonal=diagonal
    )
    log(f"start: {best.name}, the best of {len(tried)} candidates")
    log(f"Gaussian: ELBO {refined.elbo:.3f} on {JUDGE_DRAWS} draws")
    return StartSearch(refined, [g for g in tried if g is not best], torch.stack(ends))


def _score_starts(
    target: StartDensity,
    groups: Iterator[StartCandidates],
    judge: Tensor,
    out_of_time: Callable[[], bool],
) -> tuple[list[GaussianApproximation], list[Tensor]]:
    """The best normals of each start point with their ELBOs, and the ends of the ascents, (D) each.

    The start point with the highest ELBO need not lead to the best Gaussian: near a spike, where
    the density is unbounded, the ELBO of a narrow normal is high. So each start point gives two
    candidates: the normal around the start point itself, and the best of those on the way to a
    mode, unless another start point led to the same one.
    """
    blind, aware, ends = [], [], []
    for group in until_interrupted(groups):
        around, *rest = group.normals
        blind.append(_narrow_until_finite(target, with_elbo(target, around, judge), judge))
        few = judge if target.dim > LARGE else judge[:SIFT_DRAWS]
        sifted: list[GaussianApproximation] = []
        with suppress(Interrupted), abort_on_interrupt():
            for g in rest:
                sifted.append(with_elbo(target, g, few))
            aware.append(with_elbo(target, max(sifted, key=lambda g: g.elbo), judge))
        ends.append(group.end)
        if out_of_time():
            break
    found = [g for g in blind if math.isfinite(g.elbo)] + distinct_candidates(aware, len(aware))
    if not found:
        raise ValueError(
            f"The log density of {target.name} is not finite around any start point; "
            "rescale the data or narrow the priors."
        )
    return found, ends


def _worth_refining(
    target: StartDensity,
    found: list[GaussianApproximation],
    ends: list[Tensor],
    out_of_time: Callable[[], bool],
) -> tuple[list[GaussianApproximation], bool]:
    """Candidates in the order of their ELBOs: the best of each kind where these are enough.

    Returns:
        The candidates, and whether all ascents have ended in one mode.
    """
    found = sorted(found, key=lambda g: -g.elbo)
    kinds = [[g for g in found if g.blind == kind] for kind in (True, False)]
    if out_of_time():
        return [kind[0] for kind in kinds if kind], False
    try:
        with abort_on_interrupt():
            if target.dim <= LARGE and _one_mode(target, ends):
                few = [*kinds[0][:1], *kinds[1][:PATH_REFINED]]
                return sorted(few, key=lambda g: -g.elbo), True
    except Interrupted:
        return [kind[0] for kind in kinds if kind], False
    return found, False


def noise_gap_of(target: StartDensity, g: GaussianApproximation, judge: Tensor) -> float:
    """KL(q || p) of a Gaussian in nats, by half the variance of its log weights."""
    return float(log_weights(target, g, judge).double().var() / 2)


def _narrow_until_finite(
    target: StartDensity, g: GaussianApproximation, judge: Tensor
) -> GaussianApproximation:
    """A normal around a point of finite density, so narrow that its draws have one too."""
    if math.isfinite(g.elbo) or not evaluate(target, g.loc[None]).isfinite().all():
        return g
    for _ in range(TIMES):
        g = with_elbo(target, replace(g, scale_tril=NARROWER * g.scale_tril), judge)
        if math.isfinite(g.elbo):
            break
    return g


def _one_mode(target: StartDensity, ends: list[Tensor]) -> bool:
    """Whether several ascents have all ended in one mode."""
    heights = evaluate(target, torch.stack(ends)).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    top = converged_peak(target, ends[int(heights.argmax())])
    return top is not None and all(connected_place(target, z, [top.loc]) is not None for z in ends)


def _try_diagonal(
    target: StartDensity,
    g: GaussianApproximation,
    generator: torch.Generator,
    judge: Tensor,
    out_of_time: Callable[[], bool],
) -> GaussianApproximation:
    """The best Gaussian without correlations from the same place, if that is better.

    In many dimensions, as with the weights of a network, the curvature at one point can give a
    worse covariance matrix than a diagonal.
    """
    flat = with_elbo(target, diagonal_of(g), judge)
    flat = refine(target, flat, generator, judge, True, TRY_ROUNDS, out_of_time)
    if not flat.elbo > g.elbo:
        return g
    return replace(flat, scale_tril=flat.scale_tril.diag(), name=f"{g.name}, without correlations")


def refine_fully(
    target: StartDensity,
    g: GaussianApproximation,
    generator: torch.Generator,
    judge: Tensor,
    out_of_time: Callable[[], bool],
    rounds: int,
    *,
    diagonal: bool = False,
) -> GaussianApproximation:
    """Refine a Gaussian until its ELBO stops rising, for at most `rounds` rounds."""
    kept, dense = [g], not diagonal and g.scale_tril.dim() == 2
    with suppress(Interrupted), abort_on_interrupt():
        if LARGE < target.dim <= FULL_RANK_DIM and dense and not g.overshot:
            found = refine_by_newton(target, g, generator, judge, rounds // 2, out_of_time)
            if not found.overshot:
                return found
            g = replace(g, overshot=True)
        return refine(target, g, generator, judge, diagonal, rounds, out_of_time, kept.append)
    return kept[-1]


def candidates(
    target: StartDensity,
    generator: torch.Generator,
    median: Tensor | None = None,
    diagonal: bool = False,
    places: Tensor | None = None,
    points: Tensor | None = None,
) -> Iterator[StartCandidates]:
    """Normals to start from: for each start point, guesses of several kinds."""
    dense = target.dim <= (LARGE if diagonal else FULL_RANK_DIM)
    identity = torch.ones(target.dim, dtype=target.dtype, device=target.device)
    identity = identity.diag() if dense else identity
    starts = points
    if starts is None:
        starts = _finite_starts(target, target.starts(generator), median, places)
        if target.dim > LARGE:
            # A Hessian costs 2 D gradients: only two starts of different kinds are used.
            starts = starts[[0, -3]]
    for i, (z, path) in enumerate(zip(starts, _paths(target, starts), strict=True)):
        group = [
            GaussianApproximation(z, 0.1 * identity, f"narrow normal at start {i}", blind=True),
            GaussianApproximation(z, identity, f"standard normal at start {i}"),
            GaussianApproximation(path[-1], 0.1 * identity, f"narrow normal at mode {i}"),
        ]
        with suppress(Interrupted), abort_on_interrupt():
            group += _pathfinder(target, [z, *path], f"on the path to mode {i}", dense)
            if dense:
                few = path[:-1] if target.dim <= 100 else []
                for k, point in enumerate(_thin(few, PATH_POINTS)):
                    group.append(laplace(target, point, f"Laplace {k} on the path to mode {i}"))
                group.append(_newton(target, path[-1], f"Laplace at mode {i}"))
        yield StartCandidates(group, path[-1])


def _paths(target: StartDensity, starts: Tensor) -> Iterator[list[Tensor]]:
    """The ascents from all start points: the first alone, as a start where time is short."""
    yield ascend(target, starts[0])
    if len(starts) > 1:
        yield from ascend_together(target, list(starts[1:]))


def _finite_starts(
    target: StartDensity, starts: Tensor, median: Tensor | None, places: Tensor | None
) -> Tensor:
    """Start points of finite density; the last one is the median of the prior, if it is known."""
    if median is not None and evaluate(target, median[None]).isfinite().all():
        # The last start is random; the median replaces it.
        starts[-1] = median
    spare = [] if places is None else list(places)
    for i, value in enumerate(evaluate(target, starts)):
        if not value.isfinite() and spare:
            starts[i] = spare.pop(0)
    return starts


def _pathfinder(
    target: StartDensity, path: list[Tensor], where: str, dense: bool
) -> list[GaussianApproximation]:
    """Normals from the curvature along the path itself, at some of its points."""
    points = torch.stack(path)
    _, gradients = scores_in_chunks(target, points)
    found = []
    for k, e in enumerate(_thin(list(normals_along_path(points, gradients)), PATH_POINTS)):
        variances = e.inverse.variances()
        if e.loc.isfinite().all() and bool((variances > 0).all()):
            scale = factor_of(e.inverse.dense()) if dense else variances.sqrt()
            found.append(GaussianApproximation(e.loc, scale, f"Pathfinder {k} {where}"))
    return found


def laplace(target: StartDensity, z: Tensor, name: str) -> GaussianApproximation:
    r"""The normal with precision :math:`|-\nabla^2 \log p(z)|` and its Newton step's mean.

    Absolute eigenvalues make it a density where the log density is not concave.
    """
    width, values, vectors = curvature(target, z)
    size = values.abs().clamp_min(1e-10)
    _, gradient = value_and_score(target, z)
    covariance = width[:, None] * ((vectors / size) @ vectors.mT) * width
    step = covariance @ gradient
    # A step is limited to the region in which the quadratic model holds.
    length = (step @ gradient).clamp_min(0).sqrt()
    step = step / (length / math.sqrt(len(z))).clamp_min(1.0)
    return GaussianApproximation(z + step, factor_of(covariance), name)


def _newton(target: StartDensity, z: Tensor, name: str) -> GaussianApproximation:
    """Laplace's approximation after a few more Newton steps."""
    value, _ = value_and_score(target, z)
    found = laplace(target, z, name)
    for _ in range(NEWTON_STEPS if target.dim <= SMALL else 2 * (target.dim <= LARGE)):
        tries = torch.stack([z + t * (found.loc - z) for t in (1.0, 0.5, 0.1, 0.01)])
        higher, _ = value_and_score(target, tries)
        best = int(higher.nan_to_num(-torch.inf, -torch.inf, -torch.inf).argmax())
        if not higher[best] > value + 1e-6 * (1 + value.abs()):
            break
        z, value = tries[best], higher[best]
        found = laplace(target, z, name)
    return replace(found, loc=z)


def _thin(path: list[Any], n: int) -> list[Any]:
    if len(path) <= n:
        return path
    return [path[int(i)] for i in np.linspace(0, len(path) - 1, n)]
