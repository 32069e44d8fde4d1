"""Coupling layers: one part of the vector moves, told how by the part that stays."""

import torch
from torch import Tensor

from flowvi.flows.layer import Layer
from flowvi.flows.nets import Perceptron

# An unbounded log-scale overflows in the first steps of a bad fit.
BOUND = 3.0


class AffineCoupling(Layer):
    r"""Shift and scale one half of the vector by functions of the other half.

    With :math:`x = (a, b)` and a network :math:`(m, s) = h(a, c)`,

    .. math:: y = (a,\; b \, e^{s} + m), \qquad \log|\det \partial y / \partial x| = \sum_i s_i.

    The log-scale is bounded, :math:`|s| < 3`, by a tanh. Both directions cost
    one network call, so the layer suits every gradient estimator.

    Args:
        dim: Length D of the vector. At least 2.
        context_dim: Length C of the context; 0 for an unconditional layer.
        hidden: Width of the network's two hidden layers.
        swap: Move the first half instead of the second.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), "Density estimation using
        Real NVP", arXiv:1605.08803, section 3.
    """

    def __init__(
        self, dim: int, context_dim: int = 0, hidden: int = 64, *, swap: bool = False
    ) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"A coupling splits its input in two: dim must be >= 2, got {dim}.")
        self.sizes = [dim // 2, dim - dim // 2]
        self.swap = swap
        kept, moved = reversed(self.sizes) if swap else self.sizes
        self.net = Perceptron(kept, 2 * moved, context_dim, hidden)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self._split(x)
        shift, log_scale = self._params(a, context)
        return self._join(a, b * log_scale.exp() + shift), log_scale.sum(-1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self._split(y)
        shift, log_scale = self._params(a, context)
        return self._join(a, (b - shift) * (-log_scale).exp()), -log_scale.sum(-1)

    def _params(self, a: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.net(a, context).chunk(2, dim=-1)
        return shift, BOUND * torch.tanh(log_scale / BOUND)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.split(self.sizes, dim=-1)
        return (second, first) if self.swap else (first, second)

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([b, a] if self.swap else [a, b], dim=-1)
