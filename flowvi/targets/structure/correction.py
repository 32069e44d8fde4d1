"""Importance weights of the shared latents, by draws of each unit's latents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvi.runtime import memory
from flowvi.targets.structure.factors import normal_log_density
from flowvi.targets.structure.laplace import Conditional, Laplace
from flowvi.targets.structure.noise import normal_noise
from flowvi.targets.structure.shape import Shape

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
    """

    log_p: Tensor
    z: Tensor
    log_joint: Tensor
    log_weights: Tensor


class Correction:
    r"""Unbiased estimates of the density of theta.

    .. math::
        \hat p(\theta) = p(\theta) \prod_i \frac{1}{K} \sum_k
        \frac{p(u_{ik}, y_i \mid \theta)}{q(u_{ik} \mid \theta)}, \qquad u_{ik} \sim q

    Products of independent unbiased estimates are unbiased (Andrieu and Roberts, 2009,
    doi:10.1214/07-AOS574). With one u_i of each unit picked by its weight, (theta, u) is a
    properly weighted draw of the posterior.

    Args:
        laplace: Normal approximations of the units' latents.
        shape: Map of the noise of each unit.
    """

    def __init__(self, laplace: Laplace, shape: Shape) -> None:
        self.laplace, self.shape = laplace, shape

    @torch.no_grad()
    def __call__(self, theta: Tensor, particles: int, generator: torch.Generator) -> Weighted:
        """Estimate the density of values of theta, (S, p), by K draws of each unit."""
        found = self.laplace.at(theta)
        white, log_q = self._noise(found, particles, generator)
        mode = found.mode + found.factor.spread(white)
        z = self.laplace.points(theta, mode)
        parts = self.laplace.derivatives.by_unit(z)
        units, shared = parts[..., :-1], parts[0, :, -1]
        log_w = (units - log_q).nan_to_num(nan=-torch.inf)
        log_mean = torch.logsumexp(log_w, 0) - math.log(particles)
        picked = self._picked(log_w, generator)
        chosen = units.gather(0, picked.unsqueeze(0))[0]
        mode = mode.gather(0, picked[None, ..., None].expand(1, *mode.shape[1:]))[0]
        return Weighted(
            (shared + log_mean.sum(-1)).nan_to_num(nan=-torch.inf),
            self.laplace.points(theta, mode),
            shared + chosen.sum(-1),
            log_w - log_mean,
        )

    def weighted_noise(
        self, theta: Tensor, particles: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Whitened draws of each unit and their log weights, (K, S, G, d) and (K, S, G)."""
        found = self.laplace.at(theta)
        white, log_q = self._noise(found, particles, generator)
        z = self.laplace.points(theta, found.mode + found.factor.spread(white))
        parts = self.laplace.derivatives.by_unit(z)[..., :-1]
        return white, (parts - log_q).nan_to_num(nan=-torch.inf)

    def pieces(self, particles: int) -> int:
        """Number of values of theta in one call; draws do not depend on `max_memory`."""
        numbers = particles * (self.laplace.target.dim + len(self.laplace.structure.element))
        return max(1, min(MOST_POINTS, memory.PIECE // (8 * max(1, numbers))))

    def _noise(
        self, found: Conditional, particles: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Whitened draws and their log density on the scale of u. (K, S, G, d), (K, S, G)."""
        noise = normal_noise(particles, tuple(found.mode.shape), generator, found.mode)
        white, log_density = self.shape.forward(noise)
        return white, log_density + 0.5 * found.factor.log_det

    def log_density(self, found: Conditional, mode: Tensor) -> Tensor:
        """Log density of local latents under the conditional. (S, G, d) -> (S, G)."""
        white = found.factor.whiten(mode - found.mode)
        if not self.shape.bent:
            return normal_log_density(white, found.factor)
        return self.shape.inverse(white)[1] + 0.5 * found.factor.log_det

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
