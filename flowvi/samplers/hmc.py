"""Hamiltonian Monte Carlo of many points at a time, between a guide and its target."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowvi.guides.guide import Guide
from flowvi.guides.pushforward import Pushforward
from flowvi.targets import Target

# Draws of the guide for the scales of its coordinates.
SCALE_DRAWS = 1000


class Point(NamedTuple):
    """Points of the space in which the chains move, with densities and gradients.

    Attributes:
        u: Points, (n, D).
        z: Their images in the space of the target, (n, D).
        log_det: log|det dz/du|, (n).
        log_q: Log density of the guide with respect to u, (n).
        log_w: Log p - log q, (n); -inf where one of them is not finite.
        grad_log_q: Gradient of log_q, (n, D); zero where it is not finite.
        grad_log_p: Gradient of log p, (n, D).
    """

    u: Tensor
    z: Tensor
    log_det: Tensor
    log_q: Tensor
    log_w: Tensor
    grad_log_q: Tensor
    grad_log_p: Tensor

    def density(self, order: float) -> Tensor:
        """Log density of a rung, (n), up to a constant."""
        return self.log_q if order == 0 else self.log_q + order * self.log_w

    def gradient(self, order: float) -> Tensor:
        """Its gradient, (n, D)."""
        return (1 - order) * self.grad_log_q + order * self.grad_log_p


class SamplingSpace:
    """Coordinates in which the guide is approximately standard normal.

    Abstract: a space is a map from u to z, and the density of the guide in terms of u.
    """

    def __init__(self, target: Target, guide: Guide) -> None:
        self.target, self.guide = target, guide
        self.chunk = target.chunk()

    def start(self, n: int) -> Tensor:
        """Draws of the guide as u, (n, D)."""
        raise NotImplementedError

    def map(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map u to z (n, D), log|det dz/du| (n) and log q with respect to u (n)."""
        raise NotImplementedError

    def slope(self, u: Tensor, log_q: Tensor) -> Tensor:
        """Gradient of log q with respect to u, (n, D)."""
        (found,) = torch.autograd.grad(log_q.sum(), u, retain_graph=True)
        return found

    def draw(self, n: int) -> Point:
        """Draws of the guide."""
        return self.at(self.start(n))

    def at(self, u: Tensor) -> Point:
        """Evaluate both densities and their gradients."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            z, volume, log_q = self.map(u)
            log_p = self.target.log_prob(z) + volume
            slope_q = self.slope(u, log_q)
            (slope_p,) = torch.autograd.grad(log_p.sum(), u)
        known = log_p.isfinite() & log_q.isfinite()
        log_q = torch.where(known, log_q, 0.0)
        log_w = torch.where(known, log_p - log_q, -torch.inf)
        # Any force that depends on the position alone keeps the chain exact; here it is zero.
        slopes = (g.nan_to_num(0.0, 0.0, 0.0) for g in (slope_q, slope_p))
        found = (u, z, volume, log_q, log_w, *slopes)
        return Point(*(t.detach() for t in found))


class _BaseSpace(SamplingSpace):
    """The base space of a guide that pushes noise through a map."""

    guide: Pushforward

    def start(self, n: int) -> Tensor:
        return self.guide.base.sample((n,))

    def map(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, volume = self.guide.transport(u)
        return z, volume, self.guide.base.log_prob(u)

    def slope(self, u: Tensor, log_q: Tensor) -> Tensor:
        return self.guide.base.score(u)


class _WhitenedSpace(SamplingSpace):
    """The space of z itself, in units of the standard deviations of the guide's draws."""

    def __init__(self, target: Target, guide: Guide) -> None:
        super().__init__(target, guide)
        with torch.no_grad():
            z = guide.sample((SCALE_DRAWS,)).z
        z = z[z.isfinite().all(-1)]
        self.loc, self.scale = z.mean(0), z.std(0)

    def start(self, n: int) -> Tensor:
        with torch.no_grad():
            return (self.guide.sample((n,)).z - self.loc) / self.scale

    def map(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.loc + self.scale * u
        volume = self.scale.log().sum().expand(len(u))
        return z, volume, self.guide.log_prob(z) + volume


def sampling_space(target: Target, guide: Guide) -> SamplingSpace:
    """The base space of a guide that has one, else that of z in the guide's units."""
    if isinstance(guide, Pushforward):
        return _BaseSpace(target, guide)
    return _WhitenedSpace(target, guide)


def hmc_transition(
    space: SamplingSpace, point: Point, order: float, step: float, leapfrog: int
) -> tuple[Point, float]:
    """One transition of Hamiltonian Monte Carlo, and the average acceptance probability."""
    momentum = torch.randn_like(point.u)
    before = point.density(order) - 0.5 * momentum.square().sum(-1)
    # Random step sizes avoid periodic orbits.
    size = step * (0.8 + 0.4 * torch.rand_like(point.u[:, :1]))
    end = point
    for _ in range(leapfrog):
        momentum = momentum + 0.5 * size * end.gradient(order)
        end = space.at(end.u + size * momentum)
        momentum = momentum + 0.5 * size * end.gradient(order)
    after = end.density(order) - 0.5 * momentum.square().sum(-1)
    # If both points have density zero, the difference is NaN, and the move is rejected.
    chance = (after - before).exp().clamp_max(1.0).nan_to_num(0.0)
    taken = torch.rand_like(chance) < chance
    pairs = zip(end, point, strict=True)
    new = Point(*(torch.where(taken if a.dim() == 1 else taken[:, None], a, b) for a, b in pairs))
    return new, float(chance.mean())
