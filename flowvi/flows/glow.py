"""Glow: normalisation, an invertible matrix, and a coupling, in turn."""

import torch
from torch import Tensor, nn

from flowvi.flows.affine import Diagonal, solve_rows
from flowvi.flows.coupling import AffineCoupling
from flowvi.flows.layer import Chain, Layer
from flowvi.flows.permute import Permutation, random_order
from flowvi.flows.spline import Spline


class ActNorm(Layer):
    r"""Shift and scale every coordinate, from a start that data may choose.

    .. math:: y = m + e^{s} \odot x, \qquad \log|\det \partial y / \partial x| = \sum_i s_i

    It is the identity until `initialise` is called. Both directions cost O(D).

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context that m and s depend on; 0 for none.

    References:
        Kingma and Dhariwal (2018), "Glow: Generative Flow with Invertible 1x1
        Convolutions", arXiv:1807.03039, section 3.1.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.affine = Diagonal(dim, context_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.affine(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.affine.inverse(y, context)

    @torch.no_grad()
    def initialise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Become the map whose inverse gives these data mean 0 and variance 1.

        A coordinate that does not vary keeps the scale 1.
        """
        rows = y.reshape(-1, y.shape[-1])
        scale = rows.std(0, correction=0)
        self.affine.set_(rows.mean(0), torch.where(scale > 0, scale, 1.0).diag())
        return self.inverse(y, context)[0]


class InvertibleLinear(Layer):
    r"""Multiply by a matrix in its PLU form; on the channels of a pixel, a 1x1 convolution.

    With P a fixed permutation, L unit lower and U strictly upper triangular,

    .. math:: y = P L (U + \mathrm{diag}(e^s)) \, x, \qquad
        \log|\det \partial y / \partial x| = \sum_i s_i.

    It starts at the permutation. The determinant costs O(D), both directions
    O(D^2): products forwards, triangular solves backwards.

    Args:
        dim: Length D of the vector.
        order: The permutation P, as coordinate of the input that each
            coordinate of the output is, (D); none by default.

    References:
        Kingma and Dhariwal (2018), arXiv:1807.03039, sections 3.2 and 3.3.
    """

    def __init__(self, dim: int, order: Tensor | None = None) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.zeros(dim, dim))
        self.upper = nn.Parameter(torch.zeros(dim, dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.permutation = Permutation(torch.arange(dim) if order is None else order)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.log_scale.exp() * x + x @ self.upper.triu(1).mT
        x = x + x @ self.lower.tril(-1).mT
        return self.permutation(x)[0], self.log_scale.sum().expand(x.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = solve_rows(self.lower, self.permutation.inverse(y)[0], unit=True)
        upper = self.upper.triu(1) + self.log_scale.exp().diag()
        return solve_rows(upper, y, upper=True), -self.log_scale.sum().expand(y.shape[:-1])


def glow(dim: int, context_dim: int = 0, depth: int = 8, hidden: int = 64) -> Chain:
    """Steps of Glow: an affine coupling, an invertible matrix, and a normalisation in turn.

    One coordinate has no halves: at D = 1 splines take the place of couplings.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional flow.
        depth: Number of steps.
        hidden: Width of the two hidden layers of each coupling's network.
    """
    layers: list[Layer] = []
    mixers, back = mixing(dim, depth, context_dim)
    for i, mixer in enumerate(mixers):
        if dim == 1:
            layers.append(Spline(dim, context_dim))
        else:
            layers.append(AffineCoupling(dim, context_dim, hidden, swap=i % 2 == 1))
        layers.append(mixer)
    return Chain([*layers, back])


def mixing(dim: int, depth: int, context_dim: int = 0) -> tuple[list[Chain], Permutation]:
    """The matrix and normalisation of every step, and the permutation that undoes their orders."""
    mixers = []
    where = torch.arange(dim)
    for seed in range(depth):
        order = random_order(dim, seed)
        where = where[order]
        mixers.append(Chain([InvertibleLinear(dim, order), ActNorm(dim, context_dim)]))
    return mixers, Permutation(where.argsort())
