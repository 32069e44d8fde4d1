"""Neural autoregressive flows: the map of each coordinate is a monotone network."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from flowvi.flows.autoregressive import Autoregressive
from flowvi.flows.clamps import tanh_clamp
from flowvi.flows.elementwise import Elementwise
from flowvi.flows.layer import Chain

# Least slope at a bend, relative to the asymptotic slope: the inverse stays well conditioned.
FLOOR = 1e-3
# softplus(UNIT) = 1
UNIT = math.log(math.expm1(1.0))
# Initial bends are in [-SPREAD, SPREAD].
SPREAD = 3.0
# Steps until the solver converges to rounding error, for all parameters up to size 300.
STEPS = 20


@dataclass(frozen=True)
class MonotoneNetwork(Elementwise):
    r"""A line with J smooth bends: a monotone network with one hidden layer.

    .. math::
        y = m + e^{s} \Big( x + \frac{1}{J} \sum_{j=1}^J
            \frac{\kappa_j}{a_j} \tanh(a_j (x - b_j)) \Big), \qquad a_j > 0,\; \kappa_j > -1

    increases, with slope :math:`e^s \frac{1}{J} \sum_j (1 + \kappa_j (1 - t_j^2))`
    where :math:`t_j` is the j-th tanh. Steep bends make steps, so that with
    enough of them every increasing map of an interval is approached. Far out it
    is a line of slope :math:`e^s`. Forwards costs O(J).

    The inverse is found by Newton's method, kept within a bracket by bisection,
    and differentiated by the implicit function theorem (first derivatives only).

    Args:
        units: Number J of bends.

    References:
        Huang, Krueger, Lacoste and Courville (2018), "Neural Autoregressive
        Flows", arXiv:1804.00779, section 3: monotone networks with parameters
        from an autoregressive one, and why they are universal.
        Sill (1998), "Monotonic Networks": sums of bends.
    """

    units: int = 8

    @property
    def size(self) -> int:
        return 2 + 3 * self.units

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale, bends = self._unpack(params)
        rise, slope = _bend(x, *bends)
        return shift + log_scale.exp() * (x + rise), log_scale + slope.log()

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale, bends = self._unpack(params)
        target = (y - shift) * (-log_scale).exp()
        root = _solve(target.detach(), *(p.detach() for p in bends))
        # One step from the detached root keeps the value, and has the derivative of the implicit
        # function.
        rise, slope = _bend(root, *bends)
        x = root - (root + rise - target) / slope.detach()
        return x, -log_scale - _bend(x, *bends)[1].log()

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Shift and log-scale (..., D); sharpness a, place b and 1 + kappa of bends (..., J, D)."""
        units = self.units
        shift, log_scale, log_sharp, place, height = params.split([1, 1, units, units, units], -2)
        places = torch.linspace(-SPREAD, SPREAD, units, dtype=params.dtype, device=params.device)
        sharp = tanh_clamp(log_sharp).exp()
        # The height of a bend is kappa / (J a): its parameter is on the scale of the map.
        slope = FLOOR + (1 - FLOOR) * softplus(units * sharp * height + UNIT)
        bends = (sharp, place + places.unsqueeze(-1), slope)
        return shift.squeeze(-2), tanh_clamp(log_scale).squeeze(-2), bends


def _bend(x: Tensor, sharp: Tensor, place: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the nonlinear terms, and the slope of the whole map, both (..., D)."""
    t = torch.tanh(sharp * (x.unsqueeze(-2) - place))
    rise = (slope - 1) / sharp * t
    # A sum of positive terms has no cancellation, as in `planar`.
    return rise.mean(-2), (t * t + slope * (1 - t * t)).mean(-2)


def _solve(target: Tensor, sharp: Tensor, place: Tensor, slope: Tensor) -> Tensor:
    """Solve x + rise(x) = target by Newton's method within a bracket that shrinks."""
    most = ((slope - 1).abs() / sharp).mean(-2)
    low, high = target - most, target + most
    x, last = target, 2 * most
    # Steps below this size are the last Newton steps, or rounding.
    small = torch.finfo(target.dtype).eps ** 0.5 * (target.abs() + most)
    for _ in range(STEPS):
        rise, steepness = _bend(x, sharp, place, slope)
        excess = x + rise - target
        low, high = torch.where(excess > 0, low, x), torch.where(excess > 0, x, high)
        newton, middle = x - excess / steepness, (low + high) / 2
        # Newton's steps must stay within the bracket and shrink by half each time.
        shrinks = (newton - x).abs() <= torch.maximum(last / 2, small)
        good = (newton >= low) & (newton <= high) & shrinks
        following = torch.where(good, newton, middle)
        x, last = following, (following - x).abs()
    return x


def naf(dim: int, context_dim: int = 0, depth: int = 2, hidden: int = 64, units: int = 8) -> Chain:
    """Neural autoregressive flow: universal; one pass to sample, D to score.

    Args:
        dim: Length D of the vector.
        context_dim: Length C of the context; 0 for an unconditional flow.
        depth: Number of layers; the order of the coordinates is reversed in between.
        hidden: Width of the two hidden layers of each network.
        units: Number of bends in the map of each coordinate.
    """
    return Chain(
        Autoregressive(dim, MonotoneNetwork(units), context_dim, hidden, reverse=i % 2 == 1)
        for i in range(depth)
    )
