"""Sylvester layers: planar layers of many directions at once."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.linalg import solve_triangular
from torch.nn.functional import softplus

from flowvi.flows.householder import Reflections
from flowvi.flows.layer import Chain, Layer
from flowvi.flows.nets import ContextParameter, times
from flowvi.flows.permute import Flip
from flowvi.flows.planar import UNIT, bend, solve_planar

# R has the diagonal kappa / S_ii: S_ii must stay away from zero.
FLOOR = 1e-3


class TriangularSylvester(Layer):
    r"""Add a tanh layer between triangular matrices.

    With R and S upper triangular, :math:`S_{ii} > 0` and
    :math:`R_{ii} S_{ii} = \kappa_i = \mathrm{softplus}(k_i + \log(e - 1)) - 1 > -1`, the
    condition for a bijection,

    .. math::
        y = x + R \tanh(S x + b), \qquad
        |\det \partial y / \partial x| = \prod_i (1 + \kappa_i (1 - t_i^2)), \quad
        t = \tanh(S x + b).

    Forwards costs O(D^2). Backwards, the coordinates follow from the last to the
    first: each is the root of a planar layer, found to rounding; one Newton step
    of the whole system then carries the derivative of the implicit function
    (first derivatives only). R, S and b may depend on the context.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional layer.

    References:
        Van den Berg, Hasenclever, Tomczak and Welling (2018), "Sylvester
        Normalizing Flows for Variational Inference", arXiv:1803.05649,
        theorem 2. Their diagonals are tanh, which is the case :math:`|\kappa| < 1`.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.shape = (dim, dim)
        # Random offsets make stacked layers different.
        initial = torch.cat([torch.zeros(2 * dim * dim), torch.randn(dim)])
        self.params = ContextParameter(initial, context_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r, s, b, slope = self._params(context)
        t = torch.tanh(times(s, x) + b)
        return x + times(r, t), bend(t, slope).log().sum(-1)

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r, s, b, slope = self._params(context)
        t = torch.tanh(times(s, x) + b)
        det = bend(t, slope)
        with torch.no_grad():
            flat = 1 - t.square()
            score = score + times(s.mT, 2 * (slope - 1) * t * flat / det)
            one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
            transposed = one + s.mT @ (flat.unsqueeze(-1) * r.mT)
            score = solve_triangular(transposed, score.unsqueeze(-1), upper=False).squeeze(-1)
        return x + times(r, t), det.log().sum(-1), score

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r, s, b, slope = self._params(context)
        fixed_r, fixed_s, fixed_b = r.detach(), s.detach(), b.detach()
        root = _solve(y.detach(), fixed_r, fixed_s, fixed_b, slope.detach())
        t = torch.tanh(times(fixed_s, root) + fixed_b)
        one = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
        derivative = one + fixed_r @ ((1 - t * t).unsqueeze(-1) * fixed_s)
        error = root + times(r, torch.tanh(times(s, root) + b)) - y
        step = solve_triangular(derivative, error.unsqueeze(-1), upper=True).squeeze(-1)
        x = root - step
        return x, -bend(torch.tanh(times(s, x) + b), slope).log().sum(-1)

    def _params(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """R, S, b, and 1 + kappa, the slope at each bend."""
        size = self.shape[0] ** 2
        r, s, b = self.params(context).split([size, size, self.shape[0]], dim=-1)
        r, s = r.unflatten(-1, self.shape), s.unflatten(-1, self.shape)
        slope = softplus(r.diagonal(dim1=-2, dim2=-1) + UNIT)
        width = FLOOR + softplus(s.diagonal(dim1=-2, dim2=-1) + UNIT)
        r = r.triu(1) + torch.diag_embed((slope - 1) / width)
        return r, s.triu(1) + torch.diag_embed(width), b, slope


def _solve(y: Tensor, r: Tensor, s: Tensor, b: Tensor, slope: Tensor) -> Tensor:
    """Solve x + R tanh(S x + b) = y, coordinate by coordinate from the last."""
    found: list[Tensor] = []
    for i in reversed(range(y.shape[-1])):
        # y minus the terms of R tanh, and b plus those of S x, for the coordinates solved so far.
        width = s[..., i, i]
        a = solve_planar(width * y[..., i] + b[..., i], slope[..., i])
        t = torch.tanh(a)
        x = y[..., i] - r[..., i, i] * t
        y = y - r[..., :, i] * t.unsqueeze(-1)
        b = b + s[..., :, i] * x.unsqueeze(-1)
        found.append(x)
    return torch.stack(found[::-1], dim=-1)


class Sylvester(Layer):
    r"""A triangular Sylvester layer in a subspace with an orthonormal basis.

    With Q of shape (D, M), :math:`Q^T Q = I`, and g the map of
    `TriangularSylvester` in R^M,

    .. math:: y = x + Q (g(Q^T x) - Q^T x) = x + Q R \tanh(S Q^T x + b),

    with the determinant of g. Forwards costs O(D M + M^2) and the basis;
    backwards, g is inverted in the same place. Everything may depend on the
    context.

    Args:
        basis: Module that maps a context to Q, (*B, D, M).
        rank: Number of directions M.
        context_dim: Length C of the context; 0 for an unconditional layer.
    """

    def __init__(self, basis: nn.Module, rank: int, context_dim: int = 0) -> None:
        super().__init__()
        self.basis = basis
        self.inner = TriangularSylvester(rank, context_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q = self.basis(context)
        u = times(q.mT, x)
        v, ladj = self.inner(u, context)
        return x + times(q, v - u), ladj

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = self.basis(context)
        u = times(q.mT, x)
        fixed = q.detach()
        part = times(fixed.mT, score)
        v, ladj, pushed = self.inner.push(u, part, context)
        return x + times(q, v - u), ladj, score + times(fixed, pushed - part)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q = self.basis(context)
        v = times(q.mT, y)
        u, ladj = self.inner.inverse(v, context)
        return y + times(q, u - v), ladj


class GramSchmidt(nn.Module):
    """An orthonormal basis: the QR factor of a matrix with the sign that makes it continuous.

    Args:
        dim: Length D of the vectors.
        rank: Number of vectors M.
        context_dim: Length C of the context that the matrix depends on; 0 for none.
    """

    def __init__(self, dim: int, rank: int, context_dim: int = 0) -> None:
        super().__init__()
        self.shape = (dim, rank)
        self.params = ContextParameter(torch.randn(dim * rank), context_dim)

    def forward(self, context: Tensor | None) -> Tensor:
        q, r = torch.linalg.qr(self.params(context).unflatten(-1, self.shape))
        return cast(Tensor, q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))


class Reflected(nn.Module):
    """The image of the unit vectors under a product of reflections.

    Args:
        dim: Length D of the vectors, and their number.
        reflections: Number of reflections.
        context_dim: Length C of the context that they depend on; 0 for none.
    """

    def __init__(self, dim: int, reflections: int, context_dim: int = 0) -> None:
        super().__init__()
        self.reflections = Reflections(torch.randn(dim, reflections), context_dim)

    def forward(self, context: Tensor | None) -> Tensor:
        w, v = self.reflections(context)
        return torch.eye(v.shape[-2], dtype=v.dtype, device=v.device) - w @ v.mT


def sylvester(dim: int, context_dim: int = 0, depth: int = 4, rank: int = 8) -> Chain:
    """Sylvester layers in subspaces of `rank` directions with orthonormal bases.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional flow.
        depth: Number of layers.
        rank: Number of directions of each, at most D.
    """
    rank = min(rank, dim)
    return Chain(
        Sylvester(GramSchmidt(dim, rank, context_dim), rank, context_dim) for _ in range(depth)
    )


def sylvester_householder(
    dim: int, context_dim: int = 0, depth: int = 4, reflections: int = 8
) -> Chain:
    """Sylvester layers of all D directions, each in a basis made by reflections."""
    return Chain(
        Sylvester(Reflected(dim, reflections, context_dim), dim, context_dim) for _ in range(depth)
    )


def sylvester_triangular(dim: int, context_dim: int = 0, depth: int = 4) -> Chain:
    """Triangular Sylvester layers with the coordinates reversed in between."""
    return Chain(m for _ in range(depth) for m in (TriangularSylvester(dim, context_dim), Flip()))
