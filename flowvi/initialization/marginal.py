"""The start of a fit of shared latents whose density is found by Newton's method for the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flowvi.diagnostics import psis
from flowvi.initialization.gaussian import (
    GaussianApproximation,
    curvature,
    evaluate,
    factor_of,
    refine,
    value_and_score,
)
from flowvi.runtime.clock import Interrupted, abort_on_interrupt
from flowvi.targets import ModelError
from flowvi.targets.structure import MarginalTarget

# Ascents, and steps of each.
ASCENTS, STEPS = 3, 100
# Standard deviation of a normal around a place whose curvature is not known.
WIDTH = 0.1
# Draws by which normals are compared, and rounds of their refinement.
JUDGE, ROUNDS = 200, 3
# Shared latents whose normal needs more rounds.
FEW, MANY_ROUNDS = 10, 12
# Smallest eigenvalue of a precision, in units of each coordinate's own width.
FLATTEST = 0.02
# A gap that needs no refinement: for a density of few elements, and for others, where weighted
# draws correct the moments for less.
NEARLY, ROUGHLY, FEW_ELEMENTS = 0.005, 0.3, 3000
# Nats that a round of refinement of these others has to gain for another one to follow.
WORTH = 1.0
# Fewest effective draws for each latent whose moments a normal takes.
FEWEST = 10
# Numbers of a density beyond which a normal is not refined.
LARGE = 100_000


def marginal_start(
    target: MarginalTarget,
    seed: int,
    say: Callable[[str], object],
    out_of_time: Callable[[], bool] = lambda: False,
    given: GaussianApproximation | None = None,
) -> list[GaussianApproximation]:
    """Find normal approximations of the density of the shared latents, the best first.

    Args:
        target: The density; its reference is changed in place.
        seed: Seed of the start points and draws.
        say: Function that takes a line of the log.
        out_of_time: Returns whether the time for the search is spent.
        given: A normal whose mean is the only point to start from.
    """
    say(str(target.structure))
    if not target.dim:
        empty = torch.zeros(0, dtype=target.dtype, device=target.device)
        target.laplace.centre(empty)
        return [GaussianApproximation(empty, empty.new_zeros(0, 0), "no shared latents")]
    best = _Best()
    try:
        with abort_on_interrupt():
            return [_search(target, seed, say, out_of_time, given, best.keep)]
    except Interrupted:
        if best.found is None:
            point = target.starts(torch.Generator(target.device).manual_seed(seed))[0]
            best.keep(_narrow(point if given is None else given.loc))
        say("start: interrupted")
        assert best.found is not None
        return [best.found]


@dataclass
class _Best:
    """The best normal so far."""

    found: GaussianApproximation | None = None

    def keep(self, found: GaussianApproximation) -> None:
        self.found = found


def _narrow(place: Tensor) -> GaussianApproximation:
    """A normal around a place whose curvature is not known."""
    scale = WIDTH * torch.eye(len(place), dtype=place.dtype, device=place.device)
    return GaussianApproximation(place, scale, "the end of an interrupted search", blind=True)


def _search(
    target: MarginalTarget,
    seed: int,
    say: Callable[[str], object],
    out_of_time: Callable[[], bool],
    given: GaussianApproximation | None,
    keep: Callable[[GaussianApproximation], None],
) -> GaussianApproximation:
    """As `marginal_start`; `keep` is told of each improvement, for when the work is interrupted."""
    generator = torch.Generator(target.device).manual_seed(seed)
    points = target.starts(generator)
    if given is not None:
        say(f"start: {given.name}; no other places are searched")
        points = given.loc.unsqueeze(0)
    values = evaluate(target, points)
    order = values.nan_to_num(nan=-torch.inf).argsort(descending=True)[:ASCENTS]
    ends: list[tuple[float, Tensor]] = []
    for i in order:
        if out_of_time() and ends:
            break
        if values[i].isfinite():
            target.laplace.centre(points[i])
            ends.append(_ascend(target, points[i]))
            keep(_narrow(max(ends, key=lambda end: end[0])[1]))
    if not ends:
        raise ModelError(
            f"The log density of {target.name} is not finite at the modes of its local latents."
        )
    best = max(ends, key=lambda end: end[0])[1]
    target.laplace.centre(best)
    width, eigenvalues, vectors = curvature(target, best)
    # A direction without curvature is as wide as the coordinates of its units.
    spread = vectors * eigenvalues.clamp(min=FLATTEST).rsqrt()
    scale = torch.linalg.cholesky((width[:, None] * spread) @ (width[:, None] * spread).mT)
    found = GaussianApproximation(best, scale, "Laplace at the mode")
    keep(found)
    judge = torch.randn(
        JUDGE, target.dim, generator=generator, dtype=target.dtype, device=target.device
    )
    found, left = _judged(target, found, judge)
    cheap = len(target.structure.element) <= FEW_ELEMENTS
    enough = NEARLY if cheap else ROUGHLY
    if target.dense:
        found, left = _matched(target, found, left, judge)
    elif left > enough and target.whole.dim <= LARGE and not out_of_time():
        rounds = ROUNDS if target.dim <= FEW else MANY_ROUNDS
        worth = None if cheap else WORTH
        found = refine(target, found, generator, judge, False, rounds, out_of_time, keep, worth)
    say(f"start: {found.name} of the shared latents, ELBO {found.elbo:.3f}, KL about {left:.2g}")
    return found


def _matched(
    target: MarginalTarget, found: GaussianApproximation, left: float, eps: Tensor
) -> tuple[GaussianApproximation, float]:
    """The normal with the weighted moments of its draws, as long as that raises its ELBO.

    It takes no gradients.
    """
    for _ in range(ROUNDS):
        log_w = _log_weights(target, found, eps).double().cpu().numpy()
        smoothed, _ = psis(log_w)
        weight = torch.as_tensor(np.exp(smoothed)).to(eps)
        if left <= NEARLY or float(1 / weight.square().sum()) < FEWEST * target.dim:
            break
        z = found.at(eps)
        loc = weight @ z
        covariance = (weight[:, None] * (z - loc)).mT @ (z - loc)
        name = "weighted moments"
        new = replace(found, loc=loc, scale_tril=factor_of(covariance), name=name)
        new, after = _judged(target, new, eps)
        if not new.elbo > found.elbo:
            break
        found, left = new, after
    return found, left


def _log_weights(target: MarginalTarget, g: GaussianApproximation, eps: Tensor) -> Tensor:
    square = eps.square().sum(-1) + target.dim * math.log(2 * math.pi)
    return evaluate(target, g.at(eps)) + 0.5 * square + g.log_det


def _judged(
    target: MarginalTarget, g: GaussianApproximation, eps: Tensor
) -> tuple[GaussianApproximation, float]:
    """The normal with its ELBO on given noise, and an estimate of KL(q || p)."""
    log_w = _log_weights(target, g, eps)
    elbo, whole = float(log_w.mean()), float(log_w.logsumexp(0)) - math.log(len(eps))
    if not math.isfinite(elbo):
        return g, math.inf
    return replace(g, elbo=elbo), whole - elbo


def _ascend(target: MarginalTarget, start: Tensor) -> tuple[float, Tensor]:
    """Value and place of the end of an ascent by L-BFGS."""

    def negative(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_score(target, torch.as_tensor(x).to(start).unsqueeze(0))
        if not (value.isfinite() and gradient.isfinite().all()):
            return 1e100, np.zeros_like(x)
        return -float(value), -gradient[0].double().cpu().numpy()

    from scipy.optimize import minimize  # slow to import

    x0 = start.double().cpu().numpy()
    found = minimize(negative, x0, jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
    return -float(found.fun), torch.as_tensor(found.x).to(start)
