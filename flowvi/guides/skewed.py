"""A Gaussian guide whose coordinates are skewed."""

import copy
from typing import cast

import torch
from torch import Tensor

from flowvi.flows import FLOWS, Chain, Diagonal, Layer, LowRank, SinhArcsinh, Triangular
from flowvi.guides.guide import FULL_RANK_DIM, Guide, mixed_precision_copy
from flowvi.guides.pushforward import Pushforward
from flowvi.runtime.arguments import check_integer

# Largest dimension in which the triangular matrix is trained. Adam moves each of its entries by
# about the step size, whatever the gradient, and the noise of many entries costs nats.
HELD_DIM = 300


class SkewedNormal(Pushforward):
    r"""A normal that is skewed, coordinate by coordinate, before and after these are mixed.

    .. math:: z = m + \sigma \odot S_2(R \, S_1(\epsilon))

    with sinh-arcsinh maps :math:`S_i` of each coordinate and a lower triangular R, of low rank
    beyond D = 2000. :math:`S_2` alone is a Gaussian copula with marginals of its own;
    :math:`S_1` skews what is left of each coordinate given those before it. Beside the normal
    that it starts at it trains 8 D numbers: a guide for posteriors of hundreds of dimensions,
    each a little skewed, where the networks of a flow have far too many. Up to D = 300, R is
    trained too. With a depth, so many couplings come before :math:`S_1`.

    Args:
        dim: Length D of the latent vector.
        context_dim: Length C of the context that all but R depend on; 0 for none.
        depth: Number of couplings.

    Raises:
        ValueError: The depth is no whole number from 0 on.
    """

    def __init__(self, dim: int, context_dim: int = 0, depth: int = 0) -> None:
        inner: Triangular | LowRank
        if dim <= FULL_RANK_DIM:
            inner = Triangular(dim, context_dim, held=dim > HELD_DIM)
        else:
            inner = LowRank(dim, context_dim)
        skews = [SinhArcsinh(dim, context_dim) for _ in range(2)]
        depth = check_integer("depth", depth, 0)
        couplings = [FLOWS["realnvp"](dim, context_dim, depth)] if depth else []
        flow = Chain([*couplings, skews[0], inner, skews[1]])
        super().__init__(dim, flow, Diagonal(dim, context_dim))

    def mixed_precision_copy(self) -> Guide | None:
        layers = cast(Chain, self.flow).layers
        inner = None if len(layers) < 4 else mixed_precision_copy(cast(Layer, layers[0]))
        if inner is None:
            return None
        new = copy.deepcopy(self)
        cast(Chain, new.flow).layers[0] = inner
        return new

    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        flat = scale_tril.dim() == 1
        widths = scale_tril if flat else scale_tril.norm(dim=1)
        unit = torch.ones_like(widths) if flat else scale_tril / widths[:, None]
        inner = cast(Triangular, cast(Chain, self.flow).layers[-2])
        inner.set_(torch.zeros_like(loc), unit)
        self.affine.set_(loc, widths)
