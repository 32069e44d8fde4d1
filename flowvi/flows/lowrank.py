"""Affine layers whose image of a standard normal has a low-rank plus diagonal covariance."""

import torch
from torch import Tensor
from torch.linalg import cholesky, solve_triangular

from flowvi.flows.affine import Scaled
from flowvi.flows.nets import ContextParameter, times

# Initial size of V. At V = 0, the identity, the gradient is zero. The first steps of Adam do not
# depend on the size.
SMALL = 1e-5


class LowRank(Scaled):
    r"""Shift, scale, and stretch along a few directions.

    With V of shape (D, R) and L the Cholesky factor of :math:`I + V^T V`,

    .. math::
        y = o + r \odot (m + e^{s} \odot A x), \qquad A = I + V (I + L)^{-1} V^T, \qquad
        \log|\det \partial y / \partial x| = \sum_i (s_i + \log r_i) + \sum_r \log L_{rr}.

    Any V gives a bijection, and :math:`A A^T = I + V V^T`: the image of a
    standard normal has covariance :math:`r e^s (I + V V^T) e^s r`, a diagonal plus a
    matrix of rank R. By Woodbury's identity
    :math:`A^{-1} = I - V (I + L)^{-T} L^{-1} V^T`. Both directions cost O(D R).
    m, s and V may depend on the context; the origin o and widths r are constants,
    0 and 1 until `set_` is called.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional layer.
        rank: Number of directions R.
    """

    def __init__(self, dim: int, context_dim: int = 0, rank: int = 8) -> None:
        super().__init__(dim)
        self.shape = (dim, min(rank, dim))
        v = SMALL * torch.randn(dim * self.shape[1])
        self.params = ContextParameter(torch.cat([torch.zeros(2 * dim), v]), context_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale, v, lower, one = self._params(context)
        along = times(solve_triangular(one + lower, v.mT, upper=False), x)
        y = self.origin + self.width * (shift + log_scale.exp() * (x + times(v, along)))
        return y, self._ladj(log_scale, lower).expand(y.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale, v, lower, one = self._params(context)
        t = ((y - self.origin) / self.width - shift) * (-log_scale).exp()
        factor = solve_triangular(lower, v.mT, upper=False)
        along = times(solve_triangular((one + lower).mT, factor, upper=True), t)
        x = t - times(v, along)
        return x, -self._ladj(log_scale, lower).expand(x.shape[:-1])

    def _reset(self) -> None:
        super()._reset()
        v = self.params.value[2 * self.shape[0] :]
        v.copy_(SMALL * torch.randn_like(v))

    def _ladj(self, log_scale: Tensor, lower: Tensor) -> Tensor:
        inner = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (log_scale + self.width.log()).sum(-1) + inner

    def _params(self, context: Tensor | None) -> tuple[Tensor, ...]:
        """The shift, log-scale, V, L and the unit matrix of L's size."""
        dim, rank = self.shape
        shift, log_scale, v = self.params(context).split([dim, dim, dim * rank], dim=-1)
        v = v.unflatten(-1, self.shape)
        one = torch.eye(rank, dtype=v.dtype, device=v.device)
        return shift, log_scale, v, cholesky(one + v.mT @ v), one
