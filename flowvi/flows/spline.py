"""Monotone splines, one for each coordinate."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad, softmax, softplus

from flowvi.flows.layer import Layer
from flowvi.flows.nets import Amortised

# Floors for bin widths, bin heights (in units of the whole range) and slopes keep the map solvable.
FLOOR = 1e-3


class Spline(Layer):
    r"""A monotone rational-quadratic spline of each coordinate, the identity far out.

    In a bin of width w and height h from the knot :math:`(x_k, y_k)`, with
    slopes :math:`d_0, d_1` at its ends, :math:`s = h / w` and
    :math:`\xi = (x - x_k) / w`,

    .. math::
        y = y_k + \frac{h (s \xi^2 + d_0 \xi (1 - \xi))}{s + (d_1 + d_0 - 2 s) \xi (1 - \xi)},
        \qquad \frac{dy}{dx} =
        \frac{s^2 (d_1 \xi^2 + 2 s \xi (1 - \xi) + d_0 (1 - \xi)^2)}
             {(s + (d_1 + d_0 - 2 s) \xi (1 - \xi))^2}.

    The inverse is the root of a quadratic. Both directions cost O(D) with a
    constant of the number of bins. All knots may depend on the context.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional layer.
        bins: Number of bins on [-bound, bound].
        bound: Where the spline ends and the identity begins.

    References:
        Durkan, Bekasov, Murray and Papamakarios (2019), "Neural Spline Flows",
        arXiv:1906.04032, section 3.1.
    """

    def __init__(self, dim: int, context_dim: int = 0, bins: int = 8, bound: float = 5.0) -> None:
        super().__init__()
        self.bins = bins
        self.bound = bound
        self.shape = (dim, 3 * bins - 1)
        self.params = Amortised(torch.zeros(dim * (3 * bins - 1)), context_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inside = x.clamp(-self.bound, self.bound)
        x0, w, y0, h, d0, d1 = self._bins(inside, context, by_height=False)
        s, xi = h / w, (inside - x0) / w
        y = y0 + h * (s * xi * xi + d0 * xi * (1 - xi)) / _denominator(s, d0, d1, xi)
        ladj = _log_slope(s, d0, d1, xi)
        return self._outside(x, y, ladj)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inside = y.clamp(-self.bound, self.bound)
        x0, w, y0, h, d0, d1 = self._bins(inside, context, by_height=True)
        s, rise = h / w, inside - y0
        bend = rise * (d1 + d0 - 2 * s)
        a, b, c = h * (s - d0) + bend, h * d0 - bend, -s * rise
        xi = 2 * c / (-b - (b * b - 4 * a * c).clamp_min(0).sqrt())
        ladj = -_log_slope(s, d0, d1, xi)
        return self._outside(y, x0 + w * xi, ladj)

    def _bins(self, x: Tensor, context: Tensor | None, *, by_height: bool) -> tuple[Tensor, ...]:
        """The bin that each x lies in: its corner, width, height and end slopes."""
        raw = self.params(context).unflatten(-1, self.shape)
        widths, heights, slopes = raw.split([self.bins, self.bins, self.bins - 1], dim=-1)
        w, h = self._steps(widths), self._steps(heights)
        x0, y0 = self._corners(w), self._corners(h)
        # Slope 1 at zero, and at both ends, where the identity takes over.
        shift = math.log(math.expm1(1.0 - FLOOR))
        d = pad(FLOOR + softplus(slopes + shift), (1, 1), value=1.0)
        table = torch.stack([x0, w, y0, h, d[..., :-1], d[..., 1:]], dim=-1)
        knots = (y0 if by_height else x0)[..., 1:]
        index = (x.unsqueeze(-1) >= knots).sum(-1)[..., None, None]
        shape = (*torch.broadcast_shapes(index.shape[:-2], table.shape[:-2]), self.bins, 6)
        row = table.expand(shape).gather(-2, index.expand(*shape[:-2], 1, 6))
        return row.squeeze(-2).unbind(-1)

    def _steps(self, raw: Tensor) -> Tensor:
        return 2 * self.bound * (FLOOR + (1 - FLOOR * self.bins) * softmax(raw, dim=-1))

    def _corners(self, steps: Tensor) -> Tensor:
        return pad(steps.cumsum(-1)[..., :-1], (1, 0)) - self.bound

    def _outside(self, old: Tensor, new: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        far = old.abs() >= self.bound
        return torch.where(far, old, new), ladj.masked_fill(far, 0.0).sum(-1)


def _denominator(s: Tensor, d0: Tensor, d1: Tensor, xi: Tensor) -> Tensor:
    return s + (d1 + d0 - 2 * s) * xi * (1 - xi)


def _log_slope(s: Tensor, d0: Tensor, d1: Tensor, xi: Tensor) -> Tensor:
    top = d1 * xi * xi + 2 * s * xi * (1 - xi) + d0 * (1 - xi) * (1 - xi)
    return 2 * (s.log() - _denominator(s, d0, d1, xi).log()) + top.log()
