"""Monotone splines, one for each coordinate."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad, softmax, softplus

from flowvi.flows.affine import Triangular
from flowvi.flows.autograd import in_graph
from flowvi.flows.elementwise import Elementwise
from flowvi.flows.layer import Chain, Layer
from flowvi.flows.nets import ContextParameter
from flowvi.flows.permute import Flip
from flowvi.flows.score import through_elementwise

# Lower limits of bin widths and heights (relative to the range) and of slopes.
FLOOR = 1e-3
# FLOOR + softplus(UNIT_SLOPE) = 1
UNIT_SLOPE = math.log(math.expm1(1.0 - FLOOR))


@dataclass(frozen=True)
class RationalQuadratic(Elementwise):
    r"""A monotone rational-quadratic spline, the identity far out.

    In a bin of width w and height h from the knot :math:`(x_k, y_k)`, with
    slopes :math:`d_0, d_1` at its ends, :math:`s = h / w` and
    :math:`\xi = (x - x_k) / w`,

    .. math::
        y = y_k + \frac{h (s \xi^2 + d_0 \xi (1 - \xi))}{s + (d_1 + d_0 - 2 s) \xi (1 - \xi)},
        \qquad \frac{dy}{dx} =
        \frac{s^2 (d_1 \xi^2 + 2 s \xi (1 - \xi) + d_0 (1 - \xi)^2)}
             {(s + (d_1 + d_0 - 2 s) \xi (1 - \xi))^2}.

    The inverse is the root of a quadratic.

    Args:
        bins: Number of bins on [-bound, bound].
        bound: Where the spline ends and the identity begins.

    References:
        Durkan, Bekasov, Murray and Papamakarios (2019), "Neural Spline Flows",
        arXiv:1906.04032, section 3.1.
    """

    single: ClassVar[bool] = True

    bins: int = 8
    bound: float = 5.0

    @property
    def size(self) -> int:
        """Widths, heights, and the slopes at the inner knots."""
        return 3 * self.bins - 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.clamp(-self.bound, self.bound)
        w, h, x0, y0, d0, d1 = self._bin(inside, params, axis=0)
        s, xi = h / w, (inside - x0) / w
        share, ladj = _rise(s, d0, d1, xi)
        return self._outside(x, torch.addcmul(y0, h, share), ladj)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside = y.clamp(-self.bound, self.bound)
        w, h, x0, y0, d0, d1 = self._bin(inside, params, axis=1)
        s, rise = h / w, inside - y0
        bend = rise * (d1 + d0 - 2 * s)
        a, b, c = h * (s - d0) + bend, h * d0 - bend, -s * rise
        square = b * b
        # The discriminant is positive; at zero by rounding, its root would have an infinite slope.
        least = torch.finfo(y.dtype).eps * square
        xi = 2 * c / (-b - torch.maximum(square - 4 * a * c, least).sqrt())
        return self._outside(y, torch.addcmul(x0, w, xi), -_rise(s, d0, d1, xi)[1])

    def _bin(self, x: Tensor, params: Tensor, axis: int) -> tuple[Tensor, ...]:
        """Width, height, corner and end slopes of the bin in which each x lies."""
        raw, slopes = params.split([2 * self.bins, self.bins - 1], dim=-2)
        steps = softmax(raw.unflatten(-2, (2, self.bins)), dim=-2)
        steps = 2 * self.bound * (FLOOR + (1 - FLOOR * self.bins) * steps)  # (..., 2, bins, D)
        ends = steps.cumsum(-2) - self.bound
        index = (x.unsqueeze(-2) >= ends[..., axis, :-1, :]).sum(-2, keepdim=True)
        # Slope 1 at zero, and at both ends, where the identity takes over.
        d = pad(FLOOR + softplus(slopes + UNIT_SLOPE), (0, 0, 1, 1), value=1.0)
        boxes = _pick(torch.cat([steps, ends - steps], dim=-3), index.unsqueeze(-3))
        slopes = _pick(d, torch.cat([index, index + 1], dim=-2))
        return (*boxes.squeeze(-2).unbind(-2), *slopes.unbind(-2))

    def _outside(self, old: Tensor, new: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        far = old.abs() >= self.bound
        return torch.where(far, old, new), ladj.masked_fill(far, 0.0)


class Spline(Layer):
    r"""A rational-quadratic spline of each coordinate.

    The map is that of `RationalQuadratic`. Both directions cost O(D) with a
    constant of the number of bins. All knots may depend on the context.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional layer.
        bins: Number of bins on [-bound, bound].
        bound: Where the spline ends and the identity begins.
    """

    def __init__(self, dim: int, context_dim: int = 0, bins: int = 8, bound: float = 5.0) -> None:
        super().__init__()
        self.map = RationalQuadratic(bins, bound)
        self.shape = (self.map.size, dim)
        self.params = ContextParameter(torch.zeros(dim * self.map.size), context_dim)

    @property
    def single(self) -> bool:
        return self.map.single

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = self.map.forward(x, self.params(context).unflatten(-1, self.shape))
        return y, ladj.sum(-1)

    def push(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = in_graph(x)
        y, ladj = self.map.forward(x, self.params(context).unflatten(-1, self.shape))
        return y, ladj.sum(-1), through_elementwise(x, ladj, score)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, ladj = self.map.inverse(y, self.params(context).unflatten(-1, self.shape))
        return x, ladj.sum(-1)


def spline(dim: int, context_dim: int = 0, depth: int = 4, bins: int = 8) -> Chain:
    """Splines of each coordinate and triangular affine maps in turn, in alternating order."""
    layers: list[Layer] = []
    for _ in range(depth):
        layers += [Spline(dim, context_dim, bins), Triangular(dim, context_dim), Flip()]
    return Chain(layers)


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """Gather along the second last dimension, after both have been broadcast over the others."""
    lead = torch.broadcast_shapes(table.shape[:-2], index.shape[:-2])
    return table.expand(*lead, -1, -1).gather(-2, index.expand(*lead, -1, -1))


def _rise(s: Tensor, d0: Tensor, d1: Tensor, xi: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a bin's height is reached at xi, and the log slope there."""
    rest = 1 - xi
    square, mixed = xi * xi, xi * rest
    scaled = s * square
    denominator = torch.addcmul(s, d1 + d0 - 2 * s, mixed)
    share = torch.addcmul(scaled, d0, mixed) / denominator
    top = torch.addcmul(torch.addcmul(d1 * square, d0, rest * rest), s, mixed, value=2)
    return share, (top * (s / denominator).square()).log()
