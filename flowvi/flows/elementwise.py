"""Monotone maps of single coordinates, for couplings and autoregressive layers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# An unbounded log-scale overflows in the first steps of a bad fit.
BOUND = 3.0


class Elementwise(ABC):
    """An increasing map of each coordinate, told how by parameters from elsewhere.

    Parameters are (..., size, D): `size` numbers for each of D coordinates.
    When they are zero the map is the identity.
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of parameters of each coordinate."""

    @abstractmethod
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Map base to target. (..., D) -> (..., D), log dy/dx of each coordinate (..., D)."""

    @abstractmethod
    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Map target to base. (..., D) -> (..., D), log dx/dy of each coordinate (..., D)."""


def tanh_clamp(s: Tensor) -> Tensor:
    r"""Bound a log-scale symmetrically, :math:`|c(s)| < 3`."""
    return BOUND * torch.tanh(s / BOUND)


def asymmetric_clamp(s: Tensor) -> Tensor:
    r"""Let a log-scale shrink by up to 2 and grow by no more than 0.1.

    .. math:: c(s) = \frac{2 a}{\pi} \arctan\frac{s}{a}, \qquad a = 2 \;(s < 0),\; 0.1 \;(s \ge 0)

    Many layers then cannot blow up a sample, however deep the flow.

    References:
        Andrade (2024), "Stable Training of Normalizing Flows for
        High-dimensional Variational Inference", arXiv:2402.16408, section 4.
    """
    a = torch.where(s < 0, 2.0, 0.1).to(s.dtype)
    return (2 / math.pi) * a * torch.atan(s / a)


@dataclass(frozen=True)
class Affine(Elementwise):
    r"""Shift and scale: :math:`y = x \, e^{c(s)} + m` with a clamp c."""

    clamp: Callable[[Tensor], Tensor] = tanh_clamp

    @property
    def size(self) -> int:
        return 2

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-2)
        log_scale = self.clamp(raw)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-2)
        ladj = -self.clamp(raw)
        return (y - shift) * ladj.exp(), ladj


@dataclass(frozen=True)
class Shift(Elementwise):
    """Shift alone: y = x + m, which preserves volume."""

    @property
    def size(self) -> int:
        return 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return x + params.squeeze(-2), torch.zeros_like(x)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return y - params.squeeze(-2), torch.zeros_like(y)
