"""Planar layers: bend space along one direction."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from flowvi.flows.layer import Chain, Layer
from flowvi.flows.nets import ContextParameter, times

# softplus(UNIT) = 1
UNIT = math.log(math.e - 1.0)
# Newton steps from `_start` to rounding error, for every slope up to 1e6.
STEPS = 5


class Planar(Layer):
    r"""Move along one direction by a tanh of the position along another.

    .. math::
        y = x + \hat u \tanh(w^T x + b), \qquad
        \hat u = u + (\kappa - w^T u) \frac{w}{|w|^2}, \qquad
        \kappa = \mathrm{softplus}(w^T u + \log(e - 1)) - 1

    so that :math:`w^T \hat u = \kappa > -1`, the condition for a bijection; u = 0
    gives the identity. With :math:`t = \tanh(w^T x + b)`,

    .. math::
        |\det \partial y / \partial x| = 1 + \kappa (1 - t^2) = t^2 + (1 + \kappa)(1 - t^2).

    Forwards costs O(D). Backwards, the position :math:`w^T x + b` is the root of
    a monotone function of one variable; it is found to rounding by Newton's
    method and differentiated by the implicit function theorem (first
    derivatives only). u, w and b may depend on the context.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional layer.

    References:
        Rezende and Mohamed (2015), "Variational Inference with Normalizing
        Flows", arXiv:1505.05770, equation 10 and appendix A.1.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.dim = dim
        # Random directions of length about 1 make stacked layers different.
        w = torch.randn(dim) / math.sqrt(dim)
        self.params = ContextParameter(
            torch.cat([torch.zeros(dim), w, torch.zeros(1)]), context_dim
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w, b, slope = self._params(context)
        t = torch.tanh(times(w.unsqueeze(-2), x) + b)
        return x + times(u.unsqueeze(-1), t), bend(t, slope).log().squeeze(-1)

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        u, w, b, slope = self._params(context)
        t = torch.tanh(times(w.unsqueeze(-2), x) + b)
        det = bend(t, slope)
        with torch.no_grad():
            # J = I + (1 - t^2) u w^T (Sherman and Morrison), and d log det = ... w.
            flat = 1 - t.square()
            score = score + (2 * (slope - 1) * t * flat / det) * w
            score = score - w * (flat / det * (u * score).sum(-1, keepdim=True))
        return x + times(u.unsqueeze(-1), t), det.log().squeeze(-1), score

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w, b, slope = self._params(context)
        t = torch.tanh(solve_planar((y * w).sum(-1, keepdim=True) + b, slope))
        return y - u * t, -bend(t, slope).log().squeeze(-1)

    def _params(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The constrained u, w, b, and 1 + kappa, the slope at the bend."""
        u, w, b = self.params(context).split([self.dim, self.dim, 1], dim=-1)
        along = (u * w).sum(-1, keepdim=True)
        slope = softplus(along + UNIT)
        norm = w.square().sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        return u + (slope - 1 - along) * (w / norm), w, b, slope


def planar(dim: int, context_dim: int = 0, depth: int = 8) -> Chain:
    """Planar layers, one after the other."""
    return Chain(Planar(dim, context_dim) for _ in range(depth))


def solve_planar(c: Tensor, slope: Tensor) -> Tensor:
    r"""Solve :math:`a + \kappa \tanh a = c` for a, with :math:`\kappa = slope - 1 > -1`."""
    a, fixed = _start(c.detach().abs(), slope.detach()), slope.detach()
    for _ in range(STEPS):
        a = _newton(a, c.detach().abs(), fixed, fixed)
    # One step from the detached root keeps the value, with the implicit function's derivative.
    return _newton(a * c.detach().sign(), c, slope, fixed)


def _newton(a: Tensor, c: Tensor, slope: Tensor, fixed: Tensor) -> Tensor:
    t = torch.tanh(a)
    return a - (a + (slope - 1) * t - c) / bend(t, fixed)


def _start(c: Tensor, slope: Tensor) -> Tensor:
    """A point from which Newton's method approaches the root monotonically, for c >= 0.

    The left side is increasing, concave for kappa > 0 and convex for kappa < 0,
    so the start must lie below the root in the first case, above in the second.
    """
    kappa = slope - 1
    # tanh a <= a and tanh a <= 1.
    linear, shifted = c / slope, c - kappa
    # kappa < 0: tanh a <= a - a^3 / 4.2 up to a = 1 bounds the root by a cube root.
    cubic = (4.2 * c / kappa.abs()).pow(1 / 3)
    cubic = torch.where(cubic <= 1, cubic, shifted)
    above = torch.minimum(torch.minimum(linear, shifted), cubic)
    # kappa > 0: 1 - tanh a >= e^(-2a), and Lambert's W(x) >= log x - log log x from x = e on.
    log_x = (2 * kappa).log() - 2 * shifted
    tail = ((2 * kappa).log() - log_x.clamp_min(1).log()) / 2
    tail = torch.where(log_x >= 1, tail, linear)
    below = torch.maximum(torch.maximum(linear, shifted), tail)
    return torch.where(kappa > 0, below, above)


def bend(t: Tensor, slope: Tensor) -> Tensor:
    """The slope 1 + kappa (1 - t^2) where tanh is t."""
    # A sum of positive terms: 1 + kappa (1 - t^2) would cancel near kappa = -1.
    square = t * t
    return torch.addcmul(square, slope, 1 - square)
