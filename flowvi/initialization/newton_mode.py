"""Laplace's approximation by few evaluations, for a density that is dear to evaluate."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from flowvi.initialization.gaussian import (
    GaussianApproximation,
    LogDensityProtocol,
    evaluate,
    scores_in_chunks,
)

# Steps with the curvature of fewer rows, and Newton steps.
CHEAP_STEPS, STEPS = 2, 20
# Nats that the last step may still promise, and the width by which gradients are differenced.
PROMISE, WIDTH = 1e-4, 1e-2
SIZES = (1.0, 0.5, 0.1, 0.01)
# Eigenvalues of a curvature, in units of the one before, below which there is no mode.
FLAT = 1e-6


def newton_mode(
    target: LogDensityProtocol, start: GaussianApproximation, name: str
) -> GaussianApproximation | None:
    r"""Laplace's approximation at the mode near a normal; None if Newton's steps do not converge.

    In the normal's own coordinates, z = m + L e, all widths are near one. The first steps take
    the curvature from the normal itself, and each of the others from 2 D gradients. They end with
    one that promises less than :math:`10^{-4}` nats,

    .. math:: \tfrac{1}{2} g^T H^{-1} g,

    by which the mode moves less than 0.015 of its widths.

    Args:
        target: The log density.
        start: A normal near a mode.
        name: Name of the result.

    Returns:
        The approximation, with Laplace's estimate of the log evidence as its ELBO.

    References:
        Boyd and Vandenberghe (2004), Convex Optimization, section 9.5.
    """
    scale = start.scale_tril.diag() if start.scale_tril.dim() == 1 else start.scale_tril
    z, values = start.loc, torch.ones_like(start.loc)
    vectors = torch.eye(len(z), dtype=z.dtype, device=z.device)
    for i in range(CHEAP_STEPS + STEPS):
        value, gradient = (x[0] for x in scores_in_chunks(target, z[None]))
        if not (value.isfinite() and gradient.isfinite().all()):
            return None
        slope = scale.mT @ gradient
        # The normal's own curvature needs no evaluation, until it leads near a mode or no further.
        cheap = i < CHEAP_STEPS and float(slope.square().sum()) > 1
        if not cheap:
            values, vectors = torch.linalg.eigh(_curvature(target, z, scale))
        size = values.abs().clamp_min(FLAT)
        step = vectors @ ((vectors.mT @ slope) / size)
        promised = float(slope @ step) / 2
        if not cheap and promised < PROMISE:
            if not values.min() > FLAT:
                return None
            factor = scale @ _root(size, vectors)
            found = GaussianApproximation(z + scale @ step, _triangle(factor), name)
            volume = found.log_det + len(z) / 2 * math.log(2 * math.pi)
            return replace(found, elbo=float(value) + promised + float(volume))
        tries = torch.stack([z + t * (scale @ step) for t in SIZES])
        heights = evaluate(target, tries).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        best = int(heights.argmax())
        if not heights[best] > value:
            if not cheap:
                return None
        else:
            z = tries[best]
        if not cheap and values.min() > FLAT:
            scale = _triangle(scale @ _root(size, vectors))
    return None


def _curvature(target: LogDensityProtocol, z: Tensor, scale: Tensor) -> Tensor:
    """The negative Hessian in the coordinates of a scale, (D, D), by differences of gradients."""
    shifts = WIDTH * scale.mT
    _, gradients = scores_in_chunks(target, torch.cat([z + shifts, z - shifts]))
    up, down = gradients.nan_to_num(0.0, 0.0, 0.0).chunk(2)
    slope = (down - up) @ scale / (2 * WIDTH)
    return 0.5 * (slope + slope.mT)


def _root(size: Tensor, vectors: Tensor) -> Tensor:
    """A root of the inverse of a matrix, given by its eigenvalues and vectors."""
    return vectors * size.rsqrt()


def _triangle(factor: Tensor) -> Tensor:
    """The lower triangular factor of F F^T with a positive diagonal."""
    upper = torch.linalg.qr(factor.mT).R
    return (upper * upper.diagonal().sign()[:, None]).mT.contiguous()
