"""Affine layers whose image of a standard normal has a low-rank plus diagonal covariance."""

import torch
from torch import Tensor
from torch.linalg import cholesky, solve_triangular

from flowvi.flows.layer import Layer
from flowvi.flows.nets import Amortised, times


class LowRank(Layer):
    r"""Shift, scale, and stretch along a few directions.

    With V of shape (D, R) and L the Cholesky factor of :math:`I + V^T V`,

    .. math::
        y = m + e^{s} \odot A x, \qquad A = I + V (I + L)^{-1} V^T, \qquad
        \log|\det \partial y / \partial x| = \sum_i s_i + \sum_r \log L_{rr}.

    Any V gives a bijection, and :math:`A A^T = I + V V^T`: the image of a
    standard normal has covariance :math:`e^s (I + V V^T) e^s`, a diagonal plus a
    matrix of rank R. By Woodbury's identity
    :math:`A^{-1} = I - V (I + L)^{-T} L^{-1} V^T`. Both directions cost O(D R).
    m, s and V may depend on the context.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional layer.
        rank: Number of directions R.
    """

    def __init__(self, dim: int, context_dim: int = 0, rank: int = 8) -> None:
        super().__init__()
        self.shape = (dim, min(rank, dim))
        # V = 0 is the identity, but its gradient is zero there; Adam's first steps do not see how
        # small V is.
        v = 1e-5 * torch.randn(dim * self.shape[1])
        self.params = Amortised(torch.cat([torch.zeros(2 * dim), v]), context_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale, v, lower, one = self._params(context)
        along = times(solve_triangular(one + lower, v.mT, upper=False), x)
        y = shift + log_scale.exp() * (x + times(v, along))
        return y, _ladj(log_scale, lower).expand(y.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale, v, lower, one = self._params(context)
        t = (y - shift) * (-log_scale).exp()
        factor = solve_triangular(lower, v.mT, upper=False)
        along = times(solve_triangular((one + lower).mT, factor, upper=True), t)
        x = t - times(v, along)
        return x, -_ladj(log_scale, lower).expand(x.shape[:-1])

    def _params(self, context: Tensor | None) -> tuple[Tensor, ...]:
        """The shift, log-scale, V, L and the unit matrix of L's size."""
        dim, rank = self.shape
        shift, log_scale, v = self.params(context).split([dim, dim, dim * rank], dim=-1)
        v = v.unflatten(-1, self.shape)
        one = torch.eye(rank, dtype=v.dtype, device=v.device)
        return shift, log_scale, v, cholesky(one + v.mT @ v), one


def _ladj(log_scale: Tensor, lower: Tensor) -> Tensor:
    return log_scale.sum(-1) + lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
