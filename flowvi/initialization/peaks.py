"""Modes as points: ascents that have converged, and the saddles between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowvi.initialization.gaussian import (
    GaussianApproximation,
    LogDensityProtocol,
    curvature,
    evaluate,
    factor_of,
    scores_in_chunks,
    value_and_score,
)

# Largest number of Newton steps after an ascent, and largest predicted gain of the last, in nats.
STEPS, LAST_GAIN = 20, 0.01
# Rounding error of a log density, in units of its size and its precision.
ROUNDING = 30.0
# Depth of the saddle between two modes below the lower mode, in nats.
SADDLE = 1.0
# Points of a path between two modes, rounds of its optimisation, and evaluations per segment.
NODES, ROUNDS, FINE = 16, 40, 4
SIZES = (1.0, 0.5, 0.1, 0.01)


class Peak(NamedTuple):
    """A point where an ascent has converged: a local maximum of a density.

    Attributes:
        loc: The point, (D).
        height: Its log density.
        scale_tril: Factor of the inverse of the negative Hessian there, (D, D).
    """

    loc: Tensor
    height: float
    scale_tril: Tensor

    def laplace(self, name: str) -> GaussianApproximation:
        """Laplace's approximation."""
        return GaussianApproximation(self.loc, self.scale_tril, name)


def converged_peak(target: LogDensityProtocol, z: Tensor) -> Peak | None:
    r"""What Newton steps make of the end of an ascent, if they converge.

    They have where the negative Hessian H is positive definite, to rounding, and the step
    left to do promises

    .. math:: \tfrac{1}{2} g^T H^{-1} g < 0.01

    nats: half the square of the Newton decrement, in which the units of the coordinates cancel.
    A density without bound, as of a hierarchy in which a scale goes to zero with what it scales,
    never gets there. From a saddle they go on to its higher side.

    Args:
        target: The log density.
        z: Where an ascent has ended, (D).

    References:
        Boyd and Vandenberghe (2004), Convex Optimization, section 9.5.
    """
    rounding = torch.finfo(z.dtype).eps
    for _ in range(STEPS):
        value, gradient = value_and_score(target, z)
        if not (value.isfinite() and gradient.isfinite().all()):
            return None
        width, values, vectors = curvature(target, z)
        slope = vectors.mT @ (width * gradient)
        size = values.abs().clamp_min(math.sqrt(rounding))
        promised = float((slope.square() / size).sum() / 2)
        there = promised <= LAST_GAIN + ROUNDING * rounding * abs(float(value))
        if there and values.min() > math.sqrt(rounding):
            covariance = width[:, None] * ((vectors / size) @ vectors.mT) * width
            return Peak(z, float(value), factor_of(covariance))
        if there:
            # At a saddle or plateau, step by one sd in the direction of largest upward curvature.
            steps = [sign * width * vectors[:, 0] / size[0].sqrt() for sign in (1.0, -1.0)]
        else:
            steps = [width * (vectors @ (slope / size))]
        # A step is limited to the region in which the quadratic model holds.
        longest = max(1.0, math.sqrt(2 * promised / len(z)))
        tries = torch.stack([z + t * step / longest for step in steps for t in SIZES])
        heights = evaluate(target, tries).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        best = int(heights.argmax())
        if not heights[best] > value:
            return None
        z = tries[best]
    return None


def are_separate(target: LogDensityProtocol, a: Tensor, b: Tensor, scale_tril: Tensor) -> bool:
    r"""Whether every path found between two points falls a nat below the lower one.

    The straight one is tried first, then paths that climb: their points move by
    :math:`L L^T \nabla \log p` across the path, and are spread evenly along it again.

    Args:
        target: The log density.
        a: A point, (D).
        b: Another, (D).
        scale_tril: L, a scale of the density near one of them, (D, D).

    References:
        E, Ren and Vanden-Eijnden (2007), "Simplified and improved string method for computing
        the minimum energy paths in barrier-crossing events", J. Chem. Phys. 126.
    """
    path = _straight_path(a, b)
    least = _lowest_allowed(target, path)
    if not _falls_below(target, path, least):
        return False
    size = path.new_full((NODES - 1, 1), 0.5)
    for i in range(ROUNDS):
        path, size = _string_step(target, path, scale_tril, size)
        path = _redistribute(path, scale_tril)
        if i % 4 == 3 and not _falls_below(target, path, least):
            return False
    return True


def connected_place(target: LogDensityProtocol, z: Tensor, places: Sequence[Tensor]) -> int | None:
    """First place that a straight path of nearly constant or rising density leads to, or None."""
    for i, place in enumerate(places):
        path = _straight_path(z, place)
        if not _falls_below(target, path, _lowest_allowed(target, path)):
            return i
    return None


def _straight_path(a: Tensor, b: Tensor) -> Tensor:
    share = torch.linspace(0.0, 1.0, NODES + 1, dtype=a.dtype, device=a.device)[:, None]
    return a + share * (b - a)


def _lowest_allowed(target: LogDensityProtocol, path: Tensor) -> float:
    return float(evaluate(target, path[[0, -1]]).min()) - SADDLE


def _falls_below(target: LogDensityProtocol, path: Tensor, least: float) -> bool:
    """Whether a path falls below a height, looked up at its points and between them."""
    share = torch.arange(FINE, dtype=path.dtype, device=path.device)[:, None, None] / FINE
    between = path[:-1] + share * (path[1:] - path[:-1])
    points = torch.cat([between.transpose(0, 1).reshape(-1, path.shape[1]), path[-1:]])
    return not bool((evaluate(target, points) >= least).all())


def _string_step(
    target: LogDensityProtocol, path: Tensor, scale_tril: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """A path after a step uphill across itself, where that leads higher; and the next sizes."""
    inner = path[1:-1]
    before, gradient = scores_in_chunks(target, inner)
    up = gradient.nan_to_num(0.0, 0.0, 0.0) @ scale_tril
    along = _normalize(_whiten(path[2:] - path[:-2], scale_tril))
    up = size * (up - (up * along).sum(-1, keepdim=True) * along)
    # A step is not longer than the distance to the next point.
    longest = _whiten(path[1:] - path[:-1], scale_tril).norm(dim=-1).mean()
    up = up * (longest / up.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
    tried = inner + up @ scale_tril.mT
    higher = (evaluate(target, tried) > before)[:, None]
    size = torch.where(higher, (1.5 * size).clamp_max(0.5), 0.4 * size)
    return torch.cat([path[:1], torch.where(higher, tried, inner), path[-1:]]), size


def _redistribute(path: Tensor, scale_tril: Tensor) -> Tensor:
    """The same path with its points spread evenly."""
    lengths = _whiten(path[1:] - path[:-1], scale_tril).norm(dim=-1)
    place = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    wanted = torch.linspace(0.0, 1.0, len(path), dtype=path.dtype, device=path.device) * place[-1]
    left = torch.searchsorted(place, wanted[1:-1].contiguous()).clamp(1, len(path) - 1) - 1
    share = (wanted[1:-1] - place[left]) / lengths[left].clamp_min(1e-30)
    inner = path[left] + share[:, None] * (path[left + 1] - path[left])
    return torch.cat([path[:1], inner, path[-1:]])


def _whiten(steps: Tensor, scale_tril: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(scale_tril, steps.mT, upper=False).mT


def _normalize(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
