"""Monotone maps of single coordinates, for couplings and autoregressive layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from flowvi.flows.autograd import gradients
from flowvi.flows.clamps import BOUND, tanh_clamp


class Linearised(NamedTuple):
    """Derivatives of a map f of single coordinates at a point.

    Attributes:
        log_slope: log f' of each coordinate, (..., D).
        change: Derivative of log f' with respect to the coordinate, (..., D).
        pull: For given g (..., D), the gradient of the sum of log f' + g f with respect to
            the parameters, (..., size, D).
    """

    log_slope: Tensor
    change: Tensor
    pull: Callable[[Tensor], Tensor]


class Elementwise(ABC):
    """An increasing map of each coordinate, told how by parameters from elsewhere.

    Parameters are (..., size, D): `size` numbers for each of D coordinates.
    When they are zero the map is the identity.

    Attributes:
        single: Whether single precision is enough for training: see `Layer.single`.
    """

    single: ClassVar[bool] = False

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

    def linearised(self, x: Tensor, params: Tensor) -> Linearised:
        """Derivatives at a point, all of them constants."""
        with torch.enable_grad():
            x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
            y, ladj = self.forward(x, params)
        change, own = gradients(ladj, (x, params), retain=True)
        (moves,) = gradients(y, (params,))
        # Coordinates are independent: the gradient of the sum has the derivative of each one.
        return Linearised(
            ladj.detach(), change, lambda g: torch.addcmul(own, g.unsqueeze(-2), moves)
        )


@dataclass(frozen=True)
class Affine(Elementwise):
    r"""Shift and scale: :math:`y = x \, e^{c(s)} + m` with a clamp c."""

    clamp: Callable[[Tensor], Tensor] = tanh_clamp
    single: ClassVar[bool] = True

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

    def linearised(self, x: Tensor, params: Tensor) -> Linearised:
        if self.clamp is not tanh_clamp:
            return super().linearised(x, params)
        x, log_scale = x.detach(), self.clamp(params.detach().select(-2, 1))
        slope, scaled = 1 - (log_scale / BOUND).square(), x * log_scale.exp()

        def pull(g: Tensor) -> Tensor:
            return torch.stack([g, (1 + g * scaled) * slope], dim=-2)

        return Linearised(log_scale, torch.zeros_like(x), pull)


@dataclass(frozen=True)
class Shift(Elementwise):
    """Shift alone: y = x + m, which preserves volume."""

    single: ClassVar[bool] = True

    @property
    def size(self) -> int:
        return 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return x + params.squeeze(-2), torch.zeros_like(x)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return y - params.squeeze(-2), torch.zeros_like(y)

    def linearised(self, x: Tensor, params: Tensor) -> Linearised:
        zero = torch.zeros_like(x)
        return Linearised(zero, zero, lambda g: g.unsqueeze(-2))
