"""Checks of a target before a fit: finite density, conditioning, integrability, memory."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowvi.initialization.gaussian import (
    GaussianApproximation,
    curvature,
    evaluate,
    scores_in_chunks,
)
from flowvi.initialization.unbounded import data_cause, find_collapse
from flowvi.targets import ModelError, Target
from flowvi.targets.vectors import label

PRIOR_DRAWS = 200
# Distances of evaluations along the longest axes of a Gaussian, in sds.
REACH = (1.0, 10.0, 100.0, 1e3, 1e4)
DIRECTIONS = 3
# Largest distance, in units of the shortest axis of the Gaussian.
FARTHEST = 1e10
# Least decrease over the last distance of a density with an integral, in nats; 1 / r has 9.2.
LEAST_DECREASE = 3.0
# A site belongs to a direction if its largest coordinate is at least this share of the largest.
SHARE = 0.1
# Changes of the log density below this many nats count as zero.
NO_CHANGE = 1e-3
# Rounding error of the log density above which it cannot be fitted, in nats.
ROUNDING_NATS = 0.1
# Largest D for a test of the curvature with improper priors, and the least curvature that counts.
CURVED, FLAT = 200, 1e-10
# Coordinates named for a direction, and the share of the largest loading that each has.
NAMED, LOADING = 6, 0.2
# Double-precision numbers in memory per entry of a full-rank matrix, which has D^2 / 2 entries.
NUMBERS_PER_ENTRY = 12
# Guides with a full matrix for every D; flows use a matrix of low rank for D > 2000.
FULL_RANK = ("fullrank", "affine", "spline")
MOST_BYTES = 16e9


@dataclass(frozen=True)
class Preflight:
    """Evaluations of a target before it is fitted.

    Attributes:
        dim: Length D of the latent vector.
        points: Number of points looked at: draws from the prior, or random ones.
        of_prior: Whether they are draws from the prior.
        finite: Share of the points with a finite log density.
        smooth: Share of the points whose gradient is finite too.
        places: Points with a finite log density, (N, D).
        median: Median of draws from the prior, (D); None if the prior is not proper.
    """

    dim: int
    points: int
    of_prior: bool
    finite: float
    smooth: float
    places: Tensor
    median: Tensor | None = None

    def __str__(self) -> str:
        what = "draws from the prior" if self.of_prior else "random points"
        words = f"D = {self.dim}; log density finite at {self.finite:.0%} of {self.points} {what}"
        if self.smooth < self.finite:
            words += f", its gradient at {self.smooth:.0%}"
        return words


def preflight(target: Target, seed: int) -> Preflight:
    """Evaluate a target at draws from its prior, or at random points where it has none.

    Raises:
        ModelError: The log density is finite at none of them, nor at a start point.
    """
    generator = torch.Generator(device=target.device).manual_seed(seed)
    try:
        many = target.sum_of_rows is not None
        draws = target.prior_of_latents if many else target.prior
        values = draws(PRIOR_DRAWS, seed)
        points = target.unconstrain({name: values[name] for name in target.sites})
        of_prior = True
    except (ModelError, ValueError, RuntimeError):
        # The prior is improper, or the data cannot be simulated at some prior draws, or a matrix
        # has no factor there.
        shape = (PRIOR_DRAWS, target.dim)
        points = torch.randn(shape, generator=generator, dtype=target.dtype, device=target.device)
        of_prior = False
    log_p, gradients = scores_in_chunks(target, points)
    finite = log_p.isfinite()
    smooth = finite & gradients.isfinite().all(-1)
    if not finite.any() and not evaluate(target, target.starts(generator)).isfinite().any():
        raise ModelError(
            f"The log density of {target.name} is finite at none of {len(points)} points: check "
            "that the data lie in the supports, and rescale data or priors that are far apart."
        )
    median = points.median(0).values.to(target.dtype) if of_prior else None
    whole, even = (float(mask.double().mean()) for mask in (finite, smooth))
    places = points[finite].to(target.dtype)
    return Preflight(target.dim, len(points), of_prior, whole, even, places, median)


def check_integrable(target: Target, g: GaussianApproximation) -> str:
    """Describe the conditioning of a Gaussian approximation; refuse a density without integral.

    Along the longest directions of the Gaussian the density is looked up at
    1 to 10^4 of its widths, on either side. The density of a Cauchy variable
    falls by 18 nats on that way, that of a flat direction not at all. Before that, scales
    near zero are made smaller still, to see whether the density has no bound.

    Args:
        target: The log density.
        g: The best Gaussian that was found for it.

    Raises:
        ModelError: The density does not fall, or has no bound: the posterior is improper.
    """
    _check_precision(target, g)
    if words := find_collapse(target, g):
        raise ModelError(words)
    widths = g.widths
    if g.scale_tril.dim() == 1:
        # The axes of a diagonal covariance are the coordinates.
        lengths, order = g.scale_tril.sort(descending=True)
        axes = torch.nn.functional.one_hot(order[:DIRECTIONS], target.dim).to(widths)
    else:
        vectors, lengths, _ = torch.linalg.svd(g.scale_tril)
        axes = vectors.mT[:DIRECTIONS]
    # At larger distances, rounding of the direction looks like a decrease. The shortest axis of an
    # ill-conditioned matrix is itself a rounding error.
    known = bool(lengths[-1] > sys.float_info.epsilon * lengths[0])
    shortest = torch.minimum(lengths[-1], widths.min()) if known else widths.min()
    reached = lengths.clamp_max(FARTHEST * float(shortest))
    steps = [width * axis for axis, width in zip(axes, reached, strict=False)]
    if (target.improper or target.masked) and target.dim <= CURVED:
        # Axes of a diagonal Gaussian are not enough: a - b may be unidentified where a is not.
        steps += _flattest_directions(target, g)
    for step in steps:
        falls = {sign: density_drop(target, g.loc, sign * step) for sign in (1, -1)}
        sign = min(falls, key=lambda sign: falls[sign])
        if falls[sign] < LEAST_DECREASE:
            far = g.loc + REACH[-1] * sign * step
            raise ModelError(
                f"The posterior of {target.name} is improper, or as good as that: along "
                f"{describe_direction(target, step)} its log density {_describe_drop(falls[sign])} "
                f"over {REACH[-1] * float(step.norm()):.2g} units.{data_cause(target, g.loc, far)} "
                f"{_remedy(target, step)}"
            )
    condition = float(lengths[0] / lengths[-1].clamp_min(1e-300))
    return (
        f"widths from {float(widths.min()):.2g} to {float(widths.max()):.2g}, "
        f"longest axis {condition:.2g} times the shortest"
    )


def _remedy(target: Target, step: Tensor) -> str:
    """What to do if the density does not fall along a step; names masks that are the cause."""
    largest = {name: step[part].abs().max() for name, part in target.slices.items()}
    most = max(largest.values())
    behind = [words for name, words in target.masked.items() if largest[name] > SHARE * most]
    return " ".join(behind) or "Give these a proper prior, or fix one of them."


def _describe_drop(fall: float) -> str:
    """Describe a change of the log density along a line: it falls by so many nats."""
    if abs(fall) < NO_CHANGE:
        return "does not fall"
    return f"rises by {-fall:.2g} nats" if fall < 0 else f"falls by no more than {fall:.2g} nats"


def _check_precision(target: Target, g: GaussianApproximation) -> None:
    """Refuse a log density of such a size that a nat is lost in its rounding."""
    size = abs(float(evaluate(target, g.loc[None])[0]))
    if math.isfinite(size) and size * sys.float_info.epsilon > ROUNDING_NATS:
        largest = {n: float(v.abs().max()) for n, v in target.observed.items() if v.numel()}
        name = max(largest, key=lambda n: largest[n], default="")
        words = f" Site '{name}' has values up to {largest[name]:.2g}." if name else ""
        raise ModelError(
            f"The log density of {target.name} is of the size {size:.2g} where it is best, so that "
            f"rounding hides the posterior.{words} Rescale the data, or widen the priors."
        )


def _flattest_directions(target: Target, g: GaussianApproximation) -> list[Tensor]:
    """Steps of one width along the directions in which the density curves least."""
    unit, values, vectors = curvature(target, g.loc)
    widths = values.clamp_min(FLAT).rsqrt()
    return [width * unit * v for width, v in zip(widths, vectors.mT[:DIRECTIONS], strict=False)]


def density_drop(target: Target, loc: Tensor, step: Tensor) -> float:
    """Nats by which the log density falls from one step to the farthest; inf if it is not known."""
    reach = torch.tensor(REACH, dtype=loc.dtype, device=loc.device)
    log_p = evaluate(target, loc + reach[:, None] * step).cpu().double().numpy()
    # At large distances, rounding can make the difference of two large numbers infinite.
    if np.isnan(log_p).any() or np.isposinf(log_p).any() or not np.isfinite(log_p[0]):
        return math.inf
    return float(log_p[0] - log_p[-1])


def describe_direction(target: Target, direction: Tensor) -> str:
    """A direction of R^D in the names of the sites, such as ``a - b``."""
    size = direction.abs()
    top = torch.argsort(size, descending=True)[:NAMED].tolist()
    top = [i for i in top if size[i] > LOADING * size.max()]
    flip = -1 if direction[top[0]] < 0 else 1
    words = ""
    for i in top:
        sign = "-" if flip * direction[i] < 0 else "+"
        words += f" {sign} {label(target, i)}" if words else label(target, i)
    return f"'{words}'"


def check_size(dim: int, guide: str) -> None:
    """Refuse a covariance matrix that would not fit into memory."""
    need = NUMBERS_PER_ENTRY * dim * dim / 2 * 8
    if guide in FULL_RANK and need > MOST_BYTES:
        raise ValueError(
            f"guide '{guide}' has a covariance matrix of {dim} x {dim} numbers, and would take "
            f"about {need / 1e9:.0f} GB: choose 'lowrank' or 'meanfield', or leave "
            "the guide to 'auto'."
        )
