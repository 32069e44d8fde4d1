"""Normal densities on R^D: how good they are, and how to make them better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flowvi.flows.affine import nearest_scales
from flowvi.runtime.clock import drop_if_late

REFINE_STEPS = 10
FIRST_RATE = 0.5
# Rounds that are run even after the time limit: the initial Gaussian may be far too narrow.
LEAST_ROUNDS = 3
LAST_RATE = 0.01
# Least and largest number of antithetic pairs of draws in a natural-gradient step.
FEWEST_PAIRS, MOST_PAIRS = 32, 256
# Largest element of a Hessian that is scaled to a unit diagonal.
LARGEST_CURVATURE = 1e30


class LogDensityProtocol(Protocol):
    """What a normal is fitted to: a target, or one at another temperature."""

    dim: int

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density. (*S, D) -> (*S)."""

    def chunk(self) -> int:
        """How many points to evaluate at a time."""


@dataclass(frozen=True)
class GaussianApproximation:
    """A normal density on R^D and how good it is.

    Args:
        loc: Mean, (D).
        scale_tril: Lower triangular L with covariance L L^T, (D, D); or the standard
            deviations alone, (D), where the covariance is diagonal and D is large.
        name: Where it came from.
        elbo: Its evidence lower bound, on the same noise for all candidates.
        blind: Whether it is centred at a start point, not on the way to a mode.
        overshot: Whether Newton's steps from it went too far.
        mass: Log of the posterior mass around it, if it stands for a mode; NaN otherwise.
        mass_se: Standard error of the mass.
        searched: Whether mass outside of it was looked for, as on some rows of the data.
        doubtful: Whether it may be far from the posterior, as the moments of draws may be.
    """

    loc: Tensor
    scale_tril: Tensor
    name: str
    elbo: float = -math.inf
    blind: bool = False
    overshot: bool = False
    mass: float = math.nan
    mass_se: float = math.nan
    searched: bool = False
    doubtful: bool = False

    def state(self) -> dict[str, Any]:
        """All fields, as `write_state` takes them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def at(self, eps: Tensor) -> Tensor:
        """Map standard normal noise to draws. (..., D) -> (..., D)."""
        if self.scale_tril.dim() == 1:
            return self.loc + eps * self.scale_tril
        return self.loc + eps @ self.scale_tril.mT

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Draws (n, D) and their log density (n)."""
        eps = torch.randn(n, len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        log_density = -0.5 * (eps.square() + math.log(2 * math.pi)).sum(-1)
        return self.at(eps), log_density - self.log_det

    @property
    def widths(self) -> Tensor:
        """Standard deviations, (D)."""
        return self.scale_tril if self.scale_tril.dim() == 1 else self.scale_tril.norm(dim=1)

    @property
    def log_det(self) -> Tensor:
        """Log determinant of the scale, ()."""
        flat = self.scale_tril.dim() == 1
        return (self.scale_tril if flat else self.scale_tril.diagonal()).log().sum()


def refine(
    target: LogDensityProtocol,
    start: GaussianApproximation,
    generator: torch.Generator,
    judge: Tensor,
    diagonal: bool,
    rounds: int,
    out_of_time: Callable[[], bool] = lambda: False,
    keep: Callable[[GaussianApproximation], None] = lambda best: None,
    worth: float | None = None,
) -> GaussianApproximation:
    r"""Raise a normal's ELBO by natural-gradient steps on path gradients.

    In its own coordinates, z = m + L eps, the path gradient of the ELBO at a
    draw is :math:`h = L^T \nabla \log p(z) + \epsilon`. The step is

    .. math:: m \mathrel{+}= \rho L\, E[h], \qquad
        L \leftarrow L (I + \rho\, \mathrm{tril}'(E[h \epsilon^T])),

    tril' with half the diagonal: at rho = 1 a Newton step on a Gaussian target,
    and without noise once the target is reached. Rounds with falling rho
    are kept if they improve the ELBO on the judging draws; once time is over, three have to do.
    `keep` is told of each improvement, for when the work is interrupted. With `worth`, the first
    round that gains fewer nats is the last one.

    References:
        Roeder, Wu and Duvenaud (2017), arXiv:1703.09194: the path gradient.
        Tan (2021), "Analytic natural gradient updates for Cholesky factor in
        Gaussian variational approximation", arXiv:2109.00375: the step.
    """
    best = current = start if math.isfinite(start.elbo) else with_elbo(target, start, judge)
    # A full matrix needs as many draws as it has rows; a diagonal one does not.
    flat = start.scale_tril.dim() == 1
    pairs = FEWEST_PAIRS if flat else int(np.clip(target.dim, FEWEST_PAIRS, MOST_PAIRS))
    rate, stale = FIRST_RATE, 0
    for i in range(rounds):
        if rate < LAST_RATE or (i >= LEAST_ROUNDS and out_of_time()):
            break
        for _ in range(REFINE_STEPS):
            current = _natural_step(target, current, rate, pairs, generator, diagonal)
        current = with_elbo(target, current, judge)
        gain = current.elbo - best.elbo
        rate *= 0.85
        done = worth is not None and abs(gain) < worth
        if gain > 0:
            best = current
            keep(best)
        elif not gain > -1.0:
            # The step failed: return to the best Gaussian, with smaller steps.
            current, rate = best, 0.5 * rate
            continue
        stale = 0 if gain > 1e-3 else stale + 1
        if stale == 3 or done:
            break
    return best


def _natural_step(
    target: LogDensityProtocol,
    g: GaussianApproximation,
    rate: float,
    pairs: int,
    generator: torch.Generator,
    diagonal: bool,
) -> GaussianApproximation:
    half = torch.randn(
        pairs, target.dim, generator=generator, dtype=g.loc.dtype, device=g.loc.device
    )
    eps = torch.cat([half, -half])
    log_p, gradient = scores_in_chunks(target, g.at(eps))
    good = log_p.isfinite() & gradient.isfinite().all(-1)
    if good.sum() < len(eps) / 2:
        return replace(g, scale_tril=0.5 * g.scale_tril)
    flat = g.scale_tril.dim() == 1
    eps, gradient = eps[good], gradient[good]
    h = (gradient * g.scale_tril if flat else gradient @ g.scale_tril) + eps
    # A single draw in a region with extreme gradients must not dominate the step.
    norm = h.norm(dim=-1, keepdim=True)
    h = h * (10 * norm.median() / norm.clamp_min(1e-30)).clamp_max(1.0)
    shift = h.mean(0)
    shift = rate * shift / (rate * shift.norm() / math.sqrt(target.dim)).clamp_min(1.0)
    if flat:
        spread = 0.5 * rate * (h * eps).mean(0)
        spread = spread / (2 * spread.norm() / math.sqrt(target.dim)).clamp_min(1.0)
        scale = g.scale_tril * spread.exp()
        return replace(g, loc=g.loc + g.scale_tril * shift, scale_tril=scale)
    spread = (h.mT @ eps / len(eps)).tril()
    spread = spread.diagonal().diag() if diagonal else spread
    spread = rate * (spread.tril(-1) + 0.5 * spread.diagonal().diag())
    spread = spread / (2 * torch.linalg.matrix_norm(spread) / math.sqrt(target.dim)).clamp_min(1.0)
    factor = spread.tril(-1) + spread.diagonal().exp().diag()
    return replace(g, loc=g.loc + g.scale_tril @ shift, scale_tril=(g.scale_tril @ factor).tril())


def with_elbo(
    target: LogDensityProtocol, g: GaussianApproximation, eps: Tensor
) -> GaussianApproximation:
    """The same Gaussian with its ELBO on given noise, (S, D).

    The ELBO is minus infinity if the density of some draw is zero or not finite.
    """
    elbo = float(log_weights(target, g, eps).mean())
    return replace(g, elbo=elbo if math.isfinite(elbo) else -math.inf)


def log_weights(target: LogDensityProtocol, g: GaussianApproximation, eps: Tensor) -> Tensor:
    """Log p - log q of a Gaussian at its draws from given noise. (S, D) -> (S)."""
    log_p = evaluate(target, g.at(eps))
    log_q = -0.5 * (eps.square().sum(-1) + len(g.loc) * math.log(2 * math.pi))
    return log_p - (log_q - g.log_det)


def evaluate(target: LogDensityProtocol, z: Tensor) -> Tensor:
    """The log density of many points, in chunks that fit memory. (S, D) -> (S)."""
    found = []
    with torch.no_grad():
        for part in z.split(target.chunk()):
            drop_if_late()
            found.append(target.log_prob(part))
    return torch.cat(found)


def distinct_candidates(
    candidates: Sequence[GaussianApproximation], most: int
) -> list[GaussianApproximation]:
    """The best candidates of which no two lie in the same place.

    Args:
        candidates: Gaussians with their ELBOs.
        most: Largest number of candidates.
    """
    found: list[GaussianApproximation] = []
    for g in sorted(candidates, key=lambda g: -g.elbo):
        if math.isfinite(g.elbo) and not any(overlap(g, f) for f in found):
            found.append(g)
    return found[:most]


def overlap(a: GaussianApproximation, b: GaussianApproximation) -> bool:
    """Whether two Gaussians lie within two of the wider one's widths of each other."""
    width = torch.maximum(a.widths, b.widths)
    return bool((((a.loc - b.loc) / width).abs() < 2.0).all())


def scores_in_chunks(target: LogDensityProtocol, z: Tensor) -> tuple[Tensor, Tensor]:
    """The log density and its gradient at many points. (S, D) -> (S), (S, D)."""
    parts = [value_and_score(target, part) for part in z.split(target.chunk())]
    values, gradients = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(gradients)


def value_and_score(target: LogDensityProtocol, z: Tensor) -> tuple[Tensor, Tensor]:
    """The log density and its gradient, (*S, D) -> (*S), (*S, D)."""
    drop_if_late()
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        log_p = target.log_prob(z)
        (gradient,) = torch.autograd.grad(log_p.sum(), z)
    return log_p.detach(), gradient


def diagonal_of(g: GaussianApproximation) -> GaussianApproximation:
    """The diagonal Gaussian nearest in KL(q || p), with its scales alone, (D)."""
    return replace(g, scale_tril=nearest_scales(g.scale_tril))


def factor_of(covariance: Tensor) -> Tensor:
    """A Cholesky factor, with as little added to the diagonal as it takes."""
    scale = covariance.diagonal().sqrt()
    correlation = covariance / scale[:, None] / scale
    identity = torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
    for jitter in (0.0, 1e-12, 1e-9, 1e-6, 1e-3):
        factor, info = torch.linalg.cholesky_ex(correlation + jitter * identity)
        if info == 0:
            break
    return scale[:, None] * factor


def curvature(target: LogDensityProtocol, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Eigenvalues of :math:`-\nabla^2 \log p(z)` in units of each coordinate's own width.

    Returns:
        The widths w (D), eigenvalues (D) and eigenvectors (D, D) of w H w^T.
    """
    precision = -hessian(target, z)
    width = precision.diagonal().abs().clamp(1e-20, 1e20).rsqrt()
    # Without scaling, the rounding errors of narrow coordinates would exceed the entries of wide
    # ones. Extreme entries come from steps that ended where the density overflows.
    unit = (
        (width[:, None] * precision * width)
        .nan_to_num(0.0)
        .clamp(-LARGEST_CURVATURE, LARGEST_CURVATURE)
    )
    values, vectors = torch.linalg.eigh(unit)
    return width, values, vectors


def hessian(target: LogDensityProtocol, z: Tensor) -> Tensor:
    """Second derivatives by central differences of the gradient, with two sets of step sizes."""
    step = 1e-4 * z.abs().clamp_min(1.0)
    for _ in range(2):
        shifts = step.diag()
        points = torch.cat([z + shifts, z - shifts])
        parts = [value_and_score(target, p)[1] for p in points.split(max(2, target.chunk()))]
        up, down = torch.cat(parts).nan_to_num(0.0, 0.0, 0.0).chunk(2)
        hessian = (up - down) / (2 * step[:, None])
        hessian = 0.5 * (hessian + hessian.mT)
        # The second pass uses step sizes in units of the sds of the density.
        step = 1e-3 / hessian.diagonal().abs().clamp(1e-20, 1e20).sqrt()
    return hessian
