"""Radial layers: pull towards a point, or push away from it."""

import math

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import softplus

from flowvi.flows.layer import Chain, Layer
from flowvi.flows.nets import ContextParameter


class Radial(Layer):
    r"""Contract or expand around a point.

    With :math:`r = |x - x_0|`, :math:`\alpha = \mathrm{softplus}(a)` and
    :math:`\beta = \gamma - \alpha`, :math:`\gamma = \mathrm{softplus}(g)`, which is
    the condition :math:`\beta > -\alpha` for a bijection,

    .. math::
        y = x + \frac{\beta}{\alpha + r} (x - x_0)
          = x_0 + \frac{r + \gamma}{r + \alpha} (x - x_0), \qquad
        \left|\det \frac{\partial y}{\partial x}\right| =
        \frac{(r + \gamma)^{D - 1} (r^2 + 2 \alpha r + \alpha \gamma)}{(r + \alpha)^{D + 1}}.

    The inverse is in closed form: r is the positive root of
    :math:`r^2 + (\gamma - |y - x_0|) r - \alpha |y - x_0| = 0`. Both directions
    cost O(D). The centre, a and g may depend on the context.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional layer.

    References:
        Rezende and Mohamed (2015), "Variational Inference with Normalizing
        Flows", arXiv:1505.05770, equation 14 and appendix A.2.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.dim = dim
        # alpha = gamma = 1 is the identity; random centres make stacked layers different.
        one = math.log(math.e - 1.0)
        self.params = ContextParameter(
            torch.cat([torch.randn(dim), torch.full((2,), one)]), context_dim
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        center, alpha, gamma = self._params(context)
        diff = x - center
        r = vector_norm(diff, dim=-1, keepdim=True)
        stretch, along = _stretches(r, alpha, gamma)
        return torch.addcmul(center, diff, stretch), self._ladj(stretch, along)

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        center, alpha, gamma = self._params(context)
        diff = x - center
        r = vector_norm(diff, dim=-1, keepdim=True)
        stretch, along = _stretches(r, alpha, gamma)
        with torch.no_grad():
            slope = (
                (self.dim - 1) / (r + gamma)
                + 2 * (r + alpha) / (r * (r + 2 * alpha) + alpha * gamma)
                - (self.dim + 1) / (r + alpha)
            )
            unit = diff / r.clamp_min(torch.finfo(r.dtype).tiny)
            part = (unit * score).sum(-1, keepdim=True)
            score = (score - unit * part) / stretch + unit * ((part - slope) / along)
        return torch.addcmul(center, diff, stretch), self._ladj(stretch, along), score

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        center, alpha, gamma = self._params(context)
        diff = y - center
        length = vector_norm(diff, dim=-1, keepdim=True)
        # The root without cancellation, for both signs of the linear term.
        linear, constant = length - gamma, alpha * length
        larger = (linear.abs() + (linear.square() + 4 * constant).sqrt()) / 2
        r = torch.where(linear >= 0, larger, constant / larger)
        stretch, along = _stretches(r, alpha, gamma)
        return center + diff / stretch, -self._ladj(stretch, along)

    def _params(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        center, a, g = self.params(context).split([self.dim, 1, 1], dim=-1)
        return center, softplus(a), softplus(g)

    def _ladj(self, stretch: Tensor, along: Tensor) -> Tensor:
        return torch.add(along.log(), stretch.log(), alpha=self.dim - 1).squeeze(-1)


def _stretches(r: Tensor, alpha: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Factors by which J stretches across the direction from the centre, and along it."""
    far = r + alpha
    # Sums of positive terms have no cancellation.
    return (r + gamma) / far, torch.addcmul(alpha * gamma, r, far + alpha) / far.square()


def radial(dim: int, context_dim: int = 0, depth: int = 8) -> Chain:
    """Radial layers, one after the other."""
    return Chain(Radial(dim, context_dim) for _ in range(depth))
