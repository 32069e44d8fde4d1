"""A guide of shared latents, with a conditional of each unit's latents given them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from flowvi.guides.guide import Draw, Guide
from flowvi.targets.structure import MarginalTarget


class StructuredGuide(Guide):
    r"""The density q(theta) prod_i q(u_i | theta) of shared and local latents.

    q(u_i | theta) is Laplace's normal approximation at theta, or a cubic map of it. It is
    found by Newton's method and has no gradient by theta.

    Args:
        marginal: The density of theta, with the conditionals of the units.
        theta: The guide of theta.
    """

    kind: ClassVar[str] = "structured"

    def __init__(self, marginal: MarginalTarget, theta: Guide) -> None:
        super().__init__()
        self.__dict__["marginal"] = marginal
        self.theta, self.dim = theta, marginal.whole.dim

    @torch.no_grad()
    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        """Draw theta, then one draw of each unit's latents. (*S, D), (*S)."""
        marginal: MarginalTarget = self.marginal
        theta, log_q = self.theta.sample(shape)
        flat = theta.reshape(-1, marginal.dim)
        points, log_local = [], []
        for one in flat.split(marginal.chunk()):
            found = marginal.laplace.at(one)
            white, log_density = marginal.shape.forward(torch.randn_like(found.mode))
            mode = found.mode + found.factor.spread(white)
            points.append(marginal.laplace.points(one, mode))
            log_local.append((log_density + 0.5 * found.factor.log_det).sum(-1))
        z = torch.cat(points).reshape(*theta.shape[:-1], self.dim)
        return Draw(z, log_q + torch.cat(log_local).reshape(log_q.shape))

    @torch.no_grad()
    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        marginal: MarginalTarget = self.marginal
        flat = z.reshape(-1, self.dim)
        parts = []
        for one in flat.split(marginal.chunk()):
            theta = one[:, marginal.laplace.shared]
            found = marginal.laplace.at(theta)
            mode = one[:, marginal.laplace.columns]
            local = marginal.correction.log_density(found, mode).sum(-1)
            parts.append(self.theta.log_prob(theta) + local)
        return torch.cat(parts).reshape(z.shape[:-1])
