"""Affine layers whose image of a standard normal is a matrix-variate normal."""

import math

import torch
from torch import Tensor, nn

from flowvi.flows.affine import Scaled, solve_rows
from flowvi.flows.nets import ContextParameter


class Kronecker(Scaled):
    r"""Shift, and multiply a matrix by triangular matrices from both sides.

    With x read as a matrix X of R rows and C columns, and A and B lower triangular with
    the positive diagonals :math:`e^{a}` and :math:`e^{b}`,

    .. math::
        y = o + r \odot (m + A X B^T), \qquad
        \log|\det \partial y / \partial x| = C \sum_i a_i + R \sum_j b_j + \sum_k \log r_k.

    The image of a standard normal has covariance
    :math:`\mathrm{diag}(r)\,(A A^T \otimes B B^T)\,\mathrm{diag}(r)`: for r = 1, a matrix
    normal. It has R^2 + C^2 numbers instead of R^2 C^2, and both directions cost O(D (R + C)).
    The shift m may depend on the context; the origin o and widths r are constants, 0 and
    1 until `set_` is called.

    Args:
        dim: Length D = R C of the vector.
        context_dim: Length C of the context; 0 for an unconditional layer.
        rows: Number of rows R; the largest divisor of D up to its square root by default.

    References:
        Louizos and Welling (2016), "Structured and Efficient Variational Deep Learning with
        Matrix Gaussian Posteriors", arXiv:1603.04733.
    """

    def __init__(self, dim: int, context_dim: int = 0, rows: int | None = None) -> None:
        super().__init__(dim)
        if rows is None:
            rows = next(r for r in range(math.isqrt(dim), 0, -1) if dim % r == 0)
        if rows < 1 or dim % rows:
            raise ValueError(f"rows must divide D = {dim}; got {rows}.")
        self.shape = (rows, dim // rows)
        self.params = ContextParameter(torch.zeros(dim), context_dim)
        self.lowers = nn.ParameterList(torch.zeros(n, n) for n in self.shape)
        self.logs = nn.ParameterList(torch.zeros(n) for n in self.shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        left, right = self._factors()
        middle = (left @ x.unflatten(-1, self.shape) @ right.mT).flatten(-2)
        y = self.origin + self.width * (self.params(context) + middle)
        return y, self._ladj().expand(y.shape[:-1])

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            left, right = self._factors()
            s = solve_rows(right.mT, score.unflatten(-1, self.shape), upper=True)
            score = solve_rows(left.mT, s.mT, upper=True).mT.flatten(-2) / self.width
        return *self(x, context), score

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        left, right = self._factors()
        t = ((y - self.origin) / self.width - self.params(context)).unflatten(-1, self.shape)
        x = solve_rows(left, solve_rows(right, t).mT).mT.flatten(-2)
        return x, -self._ladj().expand(x.shape[:-1])

    def _factors(self) -> tuple[Tensor, Tensor]:
        made = [u.tril(-1) + s.exp().diag() for u, s in zip(self.lowers, self.logs, strict=True)]
        return made[0], made[1]

    def _ladj(self) -> Tensor:
        rows, columns = self.shape
        return columns * self.logs[0].sum() + rows * self.logs[1].sum() + self.width.log().sum()
