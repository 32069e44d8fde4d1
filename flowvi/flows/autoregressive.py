"""Autoregressive layers: the map of each coordinate depends on the coordinates before it."""

from typing import cast

import torch
from torch import Tensor

from flowvi.flows.elementwise import Affine, Elementwise
from flowvi.flows.layer import Chain, Inverse, Layer
from flowvi.flows.masked import MaskedPerceptron
from flowvi.flows.spline import RationalQuadratic


class Autoregressive(Layer):
    r"""Map each coordinate with parameters from a network of the coordinates before it.

    With a monotone map f of one coordinate and a masked network h,

    .. math::
        y_i = f(x_i; h_i(x_{<i}, c)), \qquad
        \log|\det \partial y / \partial x| = \sum_i \log f'(x_i; h_i(x_{<i}, c)).

    Forwards costs one network call, backwards D of them, one coordinate at a time:
    fast to sample, slow to score. `Inverse` of the layer is the other way round.

    Args:
        dim: Length D of the vector.
        map: The map f.
        context_dim: Length C of the context; 0 for an unconditional layer.
        hidden: Width of the network's two hidden layers.
        reverse: Take the coordinates from the last to the first.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016),
        "Improving Variational Inference with Inverse Autoregressive Flow",
        arXiv:1606.04934.
    """

    def __init__(
        self,
        dim: int,
        map: Elementwise,
        context_dim: int = 0,
        hidden: int = 64,
        *,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        self.map = map
        self.net = MaskedPerceptron(dim, map.size, context_dim, hidden, reverse=reverse)

    @property
    def single(self) -> bool:
        return self.map.single

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = self.map.forward(x, self.net(x, context))
        return y, ladj.sum(-1)

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        params, pull = self.net.linearised(x, context)
        y, ladj = self.map.forward(x, params)
        f = self.map.linearised(x, params)
        own, scale = score - f.change, (-f.log_slope).exp()
        # J^T is triangular: each pass makes at least one more coordinate exact, from the last to
        # the first, and the errors of the others decrease meanwhile.
        score = own * scale
        for _ in range(x.shape[-1] - 1):
            last, score = score, (own - pull(f.pull(score))) * scale
            if torch.allclose(score, last, rtol=4 * torch.finfo(score.dtype).eps, atol=0.0):
                break
        return y, ladj.sum(-1), score

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def solve(i: int, params: Tensor) -> Tensor:
            found[i] = self.map.inverse(y[..., i : i + 1], params)
            return found[i][0]

        self.net.visit(solve, context, y.shape[:-1])
        x, ladj = (torch.cat([found[i][k] for i in range(len(found))], dim=-1) for k in (0, 1))
        return x, ladj.sum(-1)


def iaf(dim: int, context_dim: int = 0, depth: int = 4, hidden: int = 64) -> Chain:
    """Inverse autoregressive flow: one pass to sample, D to score. For posteriors.

    Affine autoregressive layers with a bounded log-scale; the order of the
    coordinates is reversed from layer to layer. One coordinate has splines in their place.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional flow.
        depth: Number of layers.
        hidden: Width of the two hidden layers of each network.
    """
    return _alternating(_affine(dim), dim, context_dim, depth, hidden)


def maf(dim: int, context_dim: int = 0, depth: int = 4, hidden: int = 64) -> Chain:
    """Masked autoregressive flow: one pass to score, D to sample. For priors.

    The layers of `iaf`, inverted.

    References:
        Papamakarios, Pavlakou and Murray (2017), "Masked Autoregressive Flow
        for Density Estimation", arXiv:1705.07057.
    """
    layers = _alternating(_affine(dim), dim, context_dim, depth, hidden).layers
    return Chain(Inverse(cast(Layer, layer)) for layer in layers)


def nsf_autoregressive(
    dim: int, context_dim: int = 0, depth: int = 2, hidden: int = 64, bins: int = 8
) -> Chain:
    """Rational-quadratic spline autoregressive flow: one pass to sample, D to score.

    References:
        Durkan, Bekasov, Murray and Papamakarios (2019), "Neural Spline Flows",
        arXiv:1906.04032.
    """
    return _alternating(RationalQuadratic(bins), dim, context_dim, depth, hidden)


def _affine(dim: int) -> Elementwise:
    """An affine map, whose coefficients the others determine; alone a coordinate has a spline."""
    return RationalQuadratic() if dim == 1 else Affine()


def _alternating(map: Elementwise, dim: int, context_dim: int, depth: int, hidden: int) -> Chain:
    return Chain(
        Autoregressive(dim, map, context_dim, hidden, reverse=i % 2 == 1) for i in range(depth)
    )
