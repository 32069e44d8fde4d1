"""Newton steps for a Gaussian of many dimensions, with the expected Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flowvi.initialization.gaussian import (
    LARGEST_CURVATURE,
    GaussianApproximation,
    LogDensityProtocol,
    factor_of,
    scores_in_chunks,
    with_elbo,
)

# Gain of a step in nats above which the optimum is far, and below which the iteration ends.
FAR_GAIN, LEAST_GAIN = 2.0, 0.01
# Number of points of a step that are drawn in one call.
CHUNK = 1000
# Lower limit for the eigenvalues of a precision matrix, relative to the previous matrix.
FLATTEST = 0.05


def refine_by_newton(
    target: LogDensityProtocol,
    start: GaussianApproximation,
    generator: torch.Generator,
    judge: Tensor,
    steps: int,
    out_of_time: Callable[[], bool] = lambda: False,
) -> GaussianApproximation:
    """Raise a normal's ELBO: a few Newton steps on the way to the optimum, averaged ones around it.

    If one of the first steps goes too far, the result is marked `overshot` and the steps end.

    Args:
        target: The log density.
        start: A Gaussian with a dense scale.
        generator: Generator of the draws.
        judge: Noise on which ELBOs are compared, (S, D).
        steps: Largest number of steps.
        out_of_time: Returns whether the time for the steps is spent.
    """
    best = current = start if math.isfinite(start.elbo) else with_elbo(target, start, judge)
    settled, stale, damping = 0, 0, 1.0
    for _ in range(steps):
        if out_of_time():
            break
        if settled:
            tried = averaged_step(target, current, generator, damping / (1 + settled))
        else:
            tried = newton_step(target, current, generator)
        current = with_elbo(target, tried, judge)
        gain = current.elbo - best.elbo
        settled += gain < FAR_GAIN
        stale = 0 if gain > LEAST_GAIN else stale + 1
        if gain > 0:
            best = current
        elif not gain > -FAR_GAIN:
            if settled <= 1:
                # The density is far from normal: the quadratic model does not hold over a step.
                return replace(best, overshot=True)
            current, damping = best, 0.5 * damping
        if stale == 3:
            break
    return best


def newton_step(
    target: LogDensityProtocol, g: GaussianApproximation, generator: torch.Generator
) -> GaussianApproximation:
    r"""A Newton step with the expected Hessian, one column after the other.

    In the Gaussian's own coordinates, z = m + L eps, the path gradient of the
    ELBO is :math:`h = L^T \nabla \log p(z) + \epsilon`. With :math:`\epsilon_{-i}` a
    draw of its own whose coordinate i is replaced, column i of
    :math:`S = E[\partial h]` is about

    .. math:: \tfrac{1}{4} \sum_{\pm} h(\pm\epsilon_{-i}, 1) - h(\pm\epsilon_{-i}, -1),

    exact in coordinate i for quadratic h, and without noise of odd order. A
    Gaussian target is reached by the first step, at the cost of 4 D gradients.

    Args:
        target: The log density.
        g: A Gaussian with a dense scale.
        generator: Of the draws.
    """
    dim, unit = target.dim, torch.eye(target.dim, dtype=g.loc.dtype, device=g.loc.device)
    columns, total = [], torch.zeros_like(g.loc)
    for up in unit.split(CHUNK // 4):
        eps = torch.randn(up.shape, generator=generator, dtype=up.dtype, device=up.device)
        eps = eps * (1 - up)
        noise = torch.cat([eps + up, eps - up, up - eps, -eps - up])
        parts = _path_gradients(target, g, noise).view(4, -1, dim)
        columns.append((parts[0] - parts[1] + parts[2] - parts[3]) / 4)
        total = total + parts.sum((0, 1))
    return _apply_step(g, torch.cat(columns), total / (4 * dim), 1.0)


def averaged_step(
    target: LogDensityProtocol, g: GaussianApproximation, generator: torch.Generator, rate: float
) -> GaussianApproximation:
    r"""A natural-gradient step with :math:`S = E[h \epsilon^T]` over 4 D draws.

    Rates of 1 / n in a row average the precisions that n steps find. Close to
    the optimum, where h is small, this has less noise than `newton_step`, and no bias.

    Args:
        target: The log density.
        g: A Gaussian with a dense scale.
        generator: Of the draws.
        rate: Size of the step, up to 1 for that of Newton.
    """
    slope, total, count = torch.zeros_like(g.scale_tril), torch.zeros_like(g.loc), 0
    while count < 4 * target.dim:
        shape = (CHUNK // 2, target.dim)
        half = torch.randn(shape, generator=generator, dtype=g.loc.dtype, device=g.loc.device)
        eps = torch.cat([half, -half])
        h = _path_gradients(target, g, eps)
        slope, total, count = slope + h.mT @ eps, total + h.sum(0), count + len(eps)
    return _apply_step(g, slope / count, total / count, rate)


def _path_gradients(target: LogDensityProtocol, g: GaussianApproximation, eps: Tensor) -> Tensor:
    """The path gradient h at each draw, (S, D); zero where the density is not finite."""
    log_p, gradient = scores_in_chunks(target, g.at(eps))
    h = gradient @ g.scale_tril + eps
    good = log_p.isfinite() & h.isfinite().all(-1)
    return torch.where(good[:, None], h, 0.0)


def _apply_step(
    g: GaussianApproximation, slope: Tensor, mean: Tensor, rate: float
) -> GaussianApproximation:
    r"""The Gaussian of precision :math:`I - \rho S` in the coordinates of g, after a Newton step.

    References:
        Khan and Rue (2023), "The Bayesian learning rule", arXiv:2107.04562,
        section 4: the step.
    """
    unit = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    precision = (unit - 0.5 * rate * (slope + slope.mT)).nan_to_num(0.0)
    values, vectors = torch.linalg.eigh(precision.clamp(-LARGEST_CURVATURE, LARGEST_CURVATURE))
    values = values.clamp_min(FLATTEST)
    shift = rate * (vectors @ ((vectors.mT @ mean) / values))
    shift = shift / (shift.norm() / math.sqrt(len(mean))).clamp_min(1.0)
    scale = (g.scale_tril @ factor_of((vectors / values) @ vectors.mT)).tril()
    return replace(g, loc=g.loc + g.scale_tril @ shift, scale_tril=scale)
