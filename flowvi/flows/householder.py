"""Householder reflections: rotations of space, told how by vectors."""

import torch
from torch import Tensor, nn
from torch.linalg import solve_triangular, vector_norm

from flowvi.flows.affine import Diagonal
from flowvi.flows.layer import Chain, Layer
from flowvi.flows.nets import ContextParameter, times


class Reflections(nn.Module):
    r"""A product of Householder reflections, as an orthogonal matrix in factored form.

    With unit vectors :math:`V = (v_1 \dots v_H)`,

    .. math::
        (I - 2 v_1 v_1^T) \cdots (I - 2 v_H v_H^T) = I - W V^T, \qquad W = V T, \qquad
        T^{-1} = \mathrm{striu}(V^T V) + \tfrac12 I.

    Args:
        initial: The vectors at the start, of any length but zero, (D, H).
        context_dim: Length C of the context that the vectors depend on; 0 for none.

    References:
        Schreiber and Van Loan (1989), "A storage-efficient WY representation
        for products of Householder transformations": the factored form.
        Joffrain et al. (2006), "Accumulating Householder transformations,
        revisited": the triangular factor.
    """

    def __init__(self, initial: Tensor, context_dim: int = 0) -> None:
        super().__init__()
        self.shape = initial.shape
        self.params = ContextParameter(initial.flatten(), context_dim)

    def forward(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Context (*B, C) -> W and V, each (*B, D, H)."""
        v = self.params(context).unflatten(-1, self.shape)
        v = v / vector_norm(v, dim=-2, keepdim=True)
        half = 0.5 * torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
        return solve_triangular((v.mT @ v).triu(1) + half, v, upper=True, left=False), v


class Householder(Layer):
    r"""Rotate by a product of reflections, :math:`y = Q x`; volume is preserved.

    Q is that of `Reflections`. The vectors start in equal pairs, which cancel.
    Both directions cost O(D) for each reflection. The vectors may depend on the
    context.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional layer.
        reflections: Number of reflections; even.

    References:
        Tomczak and Welling (2016), "Improving Variational Auto-Encoders using
        Householder Flow", arXiv:1611.09630.
    """

    def __init__(self, dim: int, context_dim: int = 0, reflections: int = 8) -> None:
        super().__init__()
        if reflections % 2:
            raise ValueError(
                f"reflections must be even, so that they cancel at the start; got {reflections}."
            )
        pairs = torch.randn(dim, reflections // 2).repeat_interleave(2, dim=-1)
        self.reflections = Reflections(pairs, context_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        w, v = self.reflections(context)
        return x - times(w, times(v.mT, x)), x.new_zeros(x.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        w, v = self.reflections(context)
        return y - times(v, times(w.mT, y)), y.new_zeros(y.shape[:-1])


def householder(dim: int, context_dim: int = 0, reflections: int = 8) -> Chain:
    """Scales of each coordinate, then a rotation by reflections: a correlated Gaussian."""
    return Chain([Diagonal(dim, context_dim), Householder(dim, context_dim, reflections)])
