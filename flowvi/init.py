"""Where a fit starts: candidate Gaussians, and the best of them refined."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from flowvi.gaussians import (
    Gaussian,
    curvature,
    diagonal_of,
    distinct,
    factor_of,
    refine,
    score,
    scores_in_chunks,
    value_and_score,
)
from flowvi.guides import FULL_RANK_DIM
from flowvi.pathfinder import estimates
from flowvi.stopping import Interrupted, droppable, up_to_now
from flowvi.sweeps import swept
from flowvi.target import Target

Say = Callable[[str], None]

PATH_POINTS = 6
LBFGS_STEPS = 300
NEWTON_STEPS = 12
SMALL = 50
LARGE = 300
TRY_ROUNDS = 8
REFINE_ROUNDS = 30
JUDGE_DRAWS = 400


def best_gaussian(
    target: Target,
    seed: int,
    diagonal: bool,
    say: Say,
    over: Callable[[], bool] = lambda: False,
    median: Tensor | None = None,
) -> tuple[Gaussian, list[Gaussian]]:
    """Find a normal density with a high ELBO, without a step size to choose.

    Candidates are narrow normals at start points, and Laplace approximations
    along and at the end of L-BFGS paths to a mode: where the density has no
    mode, as in a centred hierarchy, an earlier point of the path wins. The
    best ELBO on common draws is refined by `refine`.

    Args:
        target: The log density.
        seed: Of the start points and draws.
        diagonal: Restrict the covariance to a diagonal, of which there are only the scales, (D).
        say: Takes a sentence about every decision.
        over: Asked now and then whether to make do with what there is.
        median: Of the prior, (D), another point to start from.

    Returns:
        The best, and what became of the other candidates.
    """
    generator = torch.Generator(device=target.device).manual_seed(seed)
    judge = torch.randn(
        JUDGE_DRAWS, target.dim, generator=generator, dtype=target.dtype, device=target.device
    )
    blind, aware = [], []
    for group in up_to_now(candidates(target, generator, median, diagonal)):
        scored = [score(target, g, judge) for g in group]
        blind.append(scored[0])
        aware.append(max(scored[1:], key=lambda g: g.elbo if math.isfinite(g.elbo) else -math.inf))
        if over():
            break
    # The best start need not lead to the best Gaussian, for a spike flatters its neighbourhood
    # where the density is unbounded: of each start, the normal that knows nothing of modes is
    # tried beside the best of those that do, unless another start led to the same.
    found = [g for g in blind if math.isfinite(g.elbo)] + distinct(aware, len(aware))
    if not found:
        raise ValueError(
            f"The log density of {target.name} is not finite around any start point; "
            "rescale the data or narrow the priors."
        )
    if diagonal:
        found = [score(target, diagonal_of(g), judge) for g in found]
    found = sorted(found, key=lambda g: -g.elbo)
    if over():
        kinds = ([g for g in found if g.blind == kind] for kind in (True, False))
        found = [kind[0] for kind in kinds if kind]

    first = found if target.dim <= LARGE else found[:2]
    if target.dim > LARGE and not diagonal:
        first = [_flat_first(target, g, generator, judge, over) for g in first]
    tried = [
        settled(target, g, generator, judge, over, TRY_ROUNDS, diagonal=diagonal) for g in first
    ]
    best = max(tried, key=lambda g: g.elbo)
    refined = settled(target, best, generator, judge, over, diagonal=diagonal)
    say(f"start: {best.name}, the best of {len(tried)}")
    say(f"Gaussian: ELBO {refined.elbo:.3f} on {JUDGE_DRAWS} draws")
    return refined, [g for g in tried if g is not best]


def _flat_first(
    target: Target,
    g: Gaussian,
    generator: torch.Generator,
    judge: Tensor,
    over: Callable[[], bool],
) -> Gaussian:
    """The best Gaussian without correlations from the same place, if that is better.

    Of many dimensions, as of a network's weights, a matrix from one place can be worse than none.
    """
    flat = score(target, diagonal_of(g), judge)
    flat = refine(target, flat, generator, judge, True, TRY_ROUNDS, over)
    if not flat.elbo > g.elbo:
        return g
    return replace(flat, scale_tril=flat.scale_tril.diag(), name=f"{g.name}, without correlations")


def settled(
    target: Target,
    g: Gaussian,
    generator: torch.Generator,
    judge: Tensor,
    over: Callable[[], bool],
    rounds: int = REFINE_ROUNDS,
    *,
    diagonal: bool = False,
) -> Gaussian:
    """A Gaussian after as many rounds as it takes, at most so many; a few where time is over."""
    try:
        with droppable():
            return _settled(target, g, generator, judge, over, rounds, diagonal)
    except Interrupted:
        return g


def _settled(
    target: Target,
    g: Gaussian,
    generator: torch.Generator,
    judge: Tensor,
    over: Callable[[], bool],
    rounds: int,
    diagonal: bool,
) -> Gaussian:
    dense = not diagonal and g.scale_tril.dim() == 2
    if LARGE < target.dim <= FULL_RANK_DIM and dense and not g.overshot:
        found = swept(target, g, generator, judge, rounds // 2, over)
        if not found.overshot:
            return found
        g = replace(g, overshot=True)
    return refine(target, g, generator, judge, diagonal, rounds, over)


def candidates(
    target: Target,
    generator: torch.Generator,
    median: Tensor | None = None,
    diagonal: bool = False,
) -> Iterator[list[Gaussian]]:
    """Normals to start from: for each start point, guesses of several kinds."""
    dense = target.dim <= (LARGE if diagonal else FULL_RANK_DIM)
    identity = torch.ones(target.dim, dtype=target.dtype, device=target.device)
    identity = identity.diag() if dense else identity
    starts = target.starts(generator)
    if median is not None:
        # The last of them is random.
        starts[-1] = median
    if target.dim > LARGE:
        # A Hessian costs 2 D gradients: two starts of different kinds have to do.
        starts = starts[[0, -3]]
    for i, z in enumerate(starts):
        path = ascend(target, z)
        group = [
            Gaussian(z, 0.1 * identity, f"narrow normal at start {i}", blind=True),
            Gaussian(z, identity, f"standard normal at start {i}"),
            Gaussian(path[-1], 0.1 * identity, f"narrow normal at mode {i}"),
        ]
        with suppress(Interrupted), droppable():
            group += _pathfinder(target, [z, *path], f"on the way to mode {i}", dense)
            if dense:
                few = path[:-1] if target.dim <= 100 else []
                for k, point in enumerate(_thinned(few, PATH_POINTS)):
                    group.append(laplace(target, point, f"Laplace {k} on the way to mode {i}"))
                group.append(_newton(target, path[-1], f"Laplace at mode {i}"))
        yield group


def _pathfinder(target: Target, path: list[Tensor], where: str, dense: bool) -> list[Gaussian]:
    """Normals from the curvature along the path itself, at some of its points."""
    points = torch.stack(path)
    _, gradients = scores_in_chunks(target, points)
    found = []
    for k, e in enumerate(_thinned(list(estimates(points, gradients)), PATH_POINTS)):
        variances = e.inverse.variances()
        if e.loc.isfinite().all() and bool((variances > 0).all()):
            scale = factor_of(e.inverse.dense()) if dense else variances.sqrt()
            found.append(Gaussian(e.loc, scale, f"Pathfinder {k} {where}"))
    return found


def ascend(target: Target, start: Tensor) -> list[Tensor]:
    """Points of an L-BFGS ascent of the log density (SciPy), the last the highest."""
    path: list[Tensor] = []

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_score(target, start.new_tensor(x))
        if not (value.isfinite() and gradient.isfinite().all()):
            return 1e30, np.zeros_like(x)
        return -value.item(), -gradient.cpu().numpy().astype(np.float64)

    def keep(x: np.ndarray) -> None:
        path.append(start.new_tensor(x))

    with suppress(Interrupted), droppable():
        minimize(
            objective,
            start.cpu().numpy().astype(np.float64),
            jac=True,
            method="L-BFGS-B",
            callback=keep,
            options={"maxiter": LBFGS_STEPS, "maxcor": 20},
        )
    return path or [start]


def laplace(target: Target, z: Tensor, name: str) -> Gaussian:
    r"""The normal with precision :math:`|-\nabla^2 \log p(z)|` and its Newton step's mean.

    Absolute eigenvalues make it a density where the log density is not concave.
    """
    width, values, vectors = curvature(target, z)
    size = values.abs().clamp_min(1e-10)
    _, gradient = value_and_score(target, z)
    covariance = width[:, None] * ((vectors / size) @ vectors.mT) * width
    step = covariance @ gradient
    # A step beyond the region that the curvature describes is cut to its edge.
    length = (step @ gradient).clamp_min(0).sqrt()
    step = step / (length / math.sqrt(len(z))).clamp_min(1.0)
    return Gaussian(z + step, factor_of(covariance), name)


def _newton(target: Target, z: Tensor, name: str) -> Gaussian:
    """Laplace's approximation after the Newton steps that L-BFGS left undone."""
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


def _thinned(path: list[Any], n: int) -> list[Any]:
    if len(path) <= n:
        return path
    return [path[int(i)] for i in np.linspace(0, len(path) - 1, n)]
