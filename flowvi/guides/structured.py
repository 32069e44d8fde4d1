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
    marginal: MarginalTarget

    def __init__(self, marginal: MarginalTarget, theta: Guide) -> None:
        super().__init__()
        self.__dict__["marginal"] = marginal
        self.theta, self.dim = theta, marginal.whole.dim

    @torch.no_grad()
    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        """Draw theta, then one draw of each unit's latents. (*S, D), (*S)."""
        theta, log_q = self.theta.sample(shape)
        generator = torch.Generator(theta.device).manual_seed(int(torch.randint(2**62, ())))
        pieces = theta.reshape(log_q.numel(), self.marginal.dim).split(self.marginal.chunk())
        points, log_local = zip(
            *(self.marginal.correction.draw(one, generator) for one in pieces), strict=True
        )
        z = torch.cat(points).reshape(*theta.shape[:-1], self.dim)
        return Draw(z, log_q + torch.cat(log_local).reshape(log_q.shape))

    @torch.no_grad()
    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Score points. (*S, D) -> (*S)."""
        shared, parts = self.marginal.laplace.shared, []
        for one in z.reshape(z.shape[:-1].numel(), self.dim).split(self.marginal.chunk()):
            local = self.marginal.correction.log_density(one)
            parts.append(self.theta.log_prob(one[:, shared]) + local)
        return torch.cat(parts).reshape(z.shape[:-1])


class NoLatents(Guide):
    """The guide of no latents: the shared ones of a model that has none."""

    kind: ClassVar[str] = "none"
    dim = 0

    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        """Draw points without columns. (*S, 0), (*S)."""
        zero = torch.zeros(shape, dtype=torch.get_default_dtype())
        return Draw(zero.unsqueeze(-1)[..., :0], zero)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return z.new_zeros(z.shape[:-1])

    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        """There is nothing to start."""


# Guides that a fit builds from the structure of a model, by name.
STRUCTURED_GUIDES: dict[str, type[Guide]] = {"structured": StructuredGuide}
