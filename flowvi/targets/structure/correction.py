"""Importance weights of the shared latents, by draws of each unit's latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvi.runtime import memory
from flowvi.runtime.clock import drop_if_late
from flowvi.targets.structure.annealed import Moved, Path, moved
from flowvi.targets.structure.laplace import Laplace
from flowvi.targets.structure.noise import is_wide, normal_noise, wide_log_density, wide_noise
from flowvi.targets.structure.shape import Shape
from flowvi.targets.structure.structure import FIELD

# Largest number of values of theta in one call.
MOST_POINTS = 256


@dataclass
class Weighted:
    """Draws of local latents at values of theta, and the likelihoods that they estimate.

    Attributes:
        log_p: Log of an unbiased estimate of the density of theta, (S).
        z: A point for each theta, its local latents picked by their weights, (S, D).
        log_joint: Log density of all latents at z, (S).
        log_weights: Log weights of the draws of each unit, less the log of their mean,
            (K, S, G).
        by_unit: Log of the estimated likelihood of each unit, (S, G).
    """

    log_p: Tensor
    z: Tensor
    log_joint: Tensor
    log_weights: Tensor
    by_unit: Tensor


class Correction:
    r"""Unbiased estimates of the density of theta.

    .. math::
        \hat p(\theta) = p(\theta) \prod_i \frac{1}{K} \sum_k
        \frac{p(u_{ik}, y_i \mid \theta)}{q(u_{ik} \mid \theta)}, \qquad u_{ik} \sim q

    Products of independent unbiased estimates are unbiased (Andrieu and Roberts, 2009,
    doi:10.1214/07-AOS574). With one u_i of each unit picked by its weight, (theta, u) is a
    properly weighted draw of the posterior. Units of one to three latents are drawn by a lattice
    of wide noise around their mode; others by normal noise through the map of each unit.

    Args:
        laplace: Normal approximations of the units' latents.
        shape: Map of the noise of each unit.
        path: Steps of the draws of a chain or a field; draws of units make none.
        others: Normal approximations at further modes of units. The wide noise is a mixture with
            as many draws at each (Owen and Zhou, 2000, doi:10.1080/01621459.2000.10473909).
    """

    def __init__(
        self,
        laplace: Laplace,
        shape: Shape,
        path: Path | None = None,
        others: Sequence[Laplace] = (),
    ) -> None:
        self.laplace, self.shape, self.path = laplace, shape, path or Path()
        self.others = others

    @torch.no_grad()
    def __call__(self, theta: Tensor, particles: int, generator: torch.Generator) -> Weighted:
        """Estimate the density of values of theta, (S, p), by K draws of each unit."""
        drop_if_late()
        if self.path.steps > 1:
            return self._annealed(theta, particles, generator)
        mode, _, log_q = self._drawn(theta, particles, generator)
        parts = self.laplace.derivatives.by_unit(self.laplace.points(theta, mode))
        units, shared = parts[..., :-1], parts[0, :, -1]
        log_w = (units - log_q).nan_to_num(nan=-torch.inf)
        log_mean = torch.logsumexp(log_w, 0) - math.log(particles)
        picked = self._picked(log_w, generator)
        chosen = units.gather(0, picked.unsqueeze(0))[0]
        mode = mode.gather(0, picked[None, ..., None].expand(1, *mode.shape[1:]))[0]
        z, filling = self.laplace.derivatives.to_target(self.laplace.points(theta, mode))
        return Weighted(
            (shared + log_mean.sum(-1)).nan_to_num(nan=-torch.inf),
            z,
            shared + chosen.sum(-1) - filling,
            log_w - log_mean,
            log_mean,
        )

    @torch.no_grad()
    def draw(self, theta: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One draw of all units at each value of theta: points (S, D), log density (S)."""
        mode, _, log_q = self._drawn(theta, 1, generator)
        points = self.laplace.points(theta, mode[0])
        z, filling = self.laplace.derivatives.to_target(points)
        return z, log_q[0].sum(-1) - filling

    @torch.no_grad()
    def log_density(self, z: Tensor) -> Tensor:
        """Log density of the local latents of points given the shared ones. (S, D) -> (S)."""
        derivatives = self.laplace.derivatives
        z = derivatives.from_target(z)
        theta, mode = z[:, self.laplace.shared], z[:, self.laplace.columns]
        normal = self.laplace.centred(self.laplace.at(theta))
        white = self._by_unit(normal.factor.whiten, mode - normal.centre)
        _, log_density = self.shape.inverse(white)
        _, filling = derivatives.to_target(z)
        return (log_density + 0.5 * normal.factor.log_det).sum(-1) - filling

    @torch.no_grad()
    def weighted_noise(
        self, theta: Tensor, particles: int, generator: torch.Generator, wide: bool
    ) -> tuple[Tensor, Tensor]:
        """Whitened draws of each unit and their log weights, (K, S, G, d) and (K, S, G).

        Args:
            theta: Values of theta, (S, p).
            particles: Number of draws K.
            generator: Generator of the noise.
            wide: Whether the noise is wide, or normal through the map of each unit.
        """
        mode, white, log_q = self._drawn(theta, particles, generator, wide)
        parts = self.laplace.derivatives.by_unit(self.laplace.points(theta, mode))[..., :-1]
        return white, (parts - log_q).nan_to_num(nan=-torch.inf)

    def pieces(self, particles: int) -> int:
        """Number of values of theta in one call; draws do not depend on `max_memory`."""
        numbers = particles * (self.laplace.derivatives.dim + len(self.laplace.structure.element))
        if self.laplace.structure.kind == FIELD and len(self.laplace.shared):
            # A matrix for each value of theta.
            numbers += 3 * self.laplace.structure.size**2
        return max(1, min(MOST_POINTS, memory.PIECE // (8 * max(1, numbers))))

    def _drawn(
        self, theta: Tensor, particles: int, generator: torch.Generator, wide: bool | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """K draws of each unit, whitened draws, and log density. (K, S, G, d) twice, (K, S, G)."""
        shape = (len(theta), *self.laplace.columns.shape)
        if self.others and wide is None and particles > 1:
            return self._mixed(theta, particles, generator)
        if is_wide(particles, shape[-1]) if wide is None else wide:
            found = self.laplace.near(theta)
            noise, log_density = wide_noise(particles, shape, generator, found.mode)
            white, log_density = self.shape.spread(noise, log_density)
        else:
            normal = self.laplace.centred(self.laplace.at(theta))
            white, log_density = self.shape.forward(self._noise(theta, particles, generator))
            mode = normal.centre + self._by_unit(normal.factor.spread, white)
            return mode, white, log_density + 0.5 * normal.factor.log_det
        mode = found.mode + found.factor.spread(white)
        return mode, white, log_density + 0.5 * found.factor.log_det

    def _mixed(
        self, theta: Tensor, particles: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `_drawn`, by wide noise at each mode; the density is that of the mixture."""
        shape = (len(theta), *self.laplace.columns.shape)
        parts = [one.near(theta) for one in (self.laplace, *self.others)]
        plain = Shape(Shape.identity(self.laplace.mode))
        shapes = [self.shape, *(plain for _ in self.others)]
        modes = []
        for found, map_ in zip(parts, shapes, strict=True):
            noise, density = wide_noise(particles // len(parts), shape, generator, found.mode)
            modes.append(found.mode + found.factor.spread(map_.spread(noise, density)[0]))
        mode = torch.cat(modes)
        densities = []
        for found, map_ in zip(parts, shapes, strict=True):
            noise, log_scale = map_.gathered(found.factor.whiten(mode - found.mode))
            densities.append(wide_log_density(noise) - log_scale + 0.5 * found.factor.log_det)
        log_q = torch.logsumexp(torch.stack(densities), 0) - math.log(len(parts))
        return mode, parts[0].factor.whiten(mode - parts[0].mode), log_q

    def _noise(self, theta: Tensor, particles: int, generator: torch.Generator) -> Tensor:
        shape = (len(theta), *self.laplace.columns.shape)
        return normal_noise(particles, shape, generator, self.laplace.mode)

    def moved(self, theta: Tensor, particles: int, generator: torch.Generator) -> Moved:
        """Draws of a chain or a field at the end of the path, (K, S, 1, N)."""
        normal = self.laplace.centred(self.laplace.at(theta))
        # Draws that move need no opposite ones.
        noise = torch.cat([self._noise(theta, 1, generator) for _ in range(particles)])
        if len(self.laplace.shared):
            return moved(self.laplace, normal, noise, self.path, generator)
        # One conditional for all values of no shared latents.
        lead = noise.shape[:2]
        found = moved(self.laplace, normal, noise.flatten(0, 1).unsqueeze(1), self.path, generator)
        flat = (found.log_weight, found.log_ratio)
        log_weight, log_ratio = (x.view(lead) for x in flat)
        return found._replace(
            white=found.white.view(noise.shape), log_weight=log_weight, log_ratio=log_ratio
        )

    def _annealed(self, theta: Tensor, particles: int, generator: torch.Generator) -> Weighted:
        normal = self.laplace.centred(self.laplace.at(theta))
        found = self.moved(theta, particles, generator)
        log_w = found.log_weight.unsqueeze(-1)
        log_mean = torch.logsumexp(log_w, 0) - math.log(particles)
        picked = self._picked(log_w, generator)
        log_ratio = found.log_ratio.gather(0, picked.T)[0]
        index = picked[None, ..., None].expand(1, *found.white.shape[1:])
        white = found.white.gather(0, index)[0]
        mode = normal.centre + self._by_unit(normal.factor.spread, white)
        log_q = 0.5 * (normal.factor.log_det - white.square().sum(-1))[..., 0]
        log_q = log_q - 0.5 * white.shape[-1] * math.log(2 * math.pi)
        return Weighted(
            log_mean.sum(-1).nan_to_num(nan=-torch.inf),
            self.laplace.derivatives.to_target(self.laplace.points(theta, mode))[0],
            log_ratio + log_q,
            log_w - log_mean,
            log_mean,
        )

    def _by_unit(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a function of a factor, which is one for all values of no shared latents."""
        if len(self.laplace.shared):
            return function(x)
        return function(x.reshape(-1, 1, *x.shape[-2:])).reshape(x.shape)

    def _picked(self, log_w: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of each unit by its weights, (S, G)."""
        if len(log_w) == 1:
            return torch.zeros(log_w.shape[1:], dtype=torch.long, device=log_w.device)
        total = torch.softmax(log_w.nan_to_num(neginf=-1e300), 0).cumsum(0)
        at = torch.rand(
            log_w.shape[1:], generator=generator, dtype=log_w.dtype, device=log_w.device
        )
        below: Tensor = (total < at * total[-1:]).sum(0)
        return below.clamp(max=len(log_w) - 1)
