"""Multiplicative normalizing flows: weights whose rows are scaled by noise from a flow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from flowvi.flows import FLOWS, Diagonal
from flowvi.flows.affine import nearest_scales
from flowvi.guides.guide import Draw, Guide, LogDensity, ScoredSample
from flowvi.guides.pushforward import FlowGuide
from flowvi.runtime.rng import isolated_rng

# Largest initial share of a weight's standard deviation that is due to its multiplier.
SHARE = 0.3
# Largest initial sd of the multipliers, for weights with a mean near zero.
WIDEST = 0.3
# Draws of the multipliers for an estimate of the marginal density of z.
DRAWS = 64
LOG_2PI = math.log(2 * math.pi)


class MultiplicativeGuide(Guide):
    r"""Normals whose means are scaled, unit by unit, by draws of a flow.

    With t from a flow of as many dimensions as there are units,

    .. math:: t \sim q(t), \qquad
        z_i \mid t \sim N\big((1 + c_{u(i)} t_{u(i)})\, \mu_i,\; \sigma_i^2\big),

    coordinates without a unit have :math:`z_i \sim N(\mu_i, \sigma_i^2)`. The density of
    z alone is an integral. An auxiliary density r(t | z) stands in for the law of t given z:
    the log density that comes with a draw is

    .. math:: \log \hat q = \log q(t) + \log q(z \mid t) - \log r(t \mid z),

    whose mean is :math:`E \log q(z)` plus the divergence of r from the law of t. Weights
    :math:`p(z) / \hat q` average to the evidence, so every bound and diagnosis made of them holds.
    The ELBO is below that of q(z) itself, and r is trained to close the gap.

    The information of z on :math:`t_u` is one number, a weighted sum of the coordinates of the
    unit. So r is a flow in units of

    .. math:: t_u \approx b_u + \sum_{i \in u} a_i (z_i - o_i) / r_i

    whose context are all these sums. At the start, a, b and the scales of r make it exact.
    (Louizos and Welling take the hyperbolic tangent of a projection instead.)

    Args:
        units: Number of the unit of each coordinate, (D); -1 for none.
        flow: Row of `FLOWS`, for q(t) and for r(t | z).
        sizes: Of both flows, such as their depth.
        spec: Arguments with which `multiplicative_guide` makes the same guide, if it can.

    References:
        Louizos and Welling (2017), "Multiplicative Normalizing Flows for Variational Bayesian
        Neural Networks", arXiv:1703.01961.
        Ranganath, Tran and Blei (2016), "Hierarchical Variational Models", arXiv:1511.02386: r.
        Sobolev and Vetrov (2019), "Importance Weighted Hierarchical Variational Inference",
        arXiv:1905.03290: the estimate of the density of z alone.
    """

    flat = True
    joint: ClassVar[bool] = True
    kind: ClassVar[str] = "multiplicative"

    units: Tensor
    origin: Tensor
    width: Tensor
    spread: Tensor

    def __init__(
        self,
        units: np.ndarray,
        flow: str = "realnvp",
        sizes: Mapping[str, Any] | None = None,
        spec: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.many, self.spec = len(units), int(units.max()) + 1, spec
        if self.many < 1:
            raise ValueError("A multiplicative guide needs a unit of at least one coordinate.")
        made = dict(sizes or {})
        # The last index is for coordinates without a unit.
        self.register_buffer("units", torch.as_tensor(np.where(units < 0, self.many, units)))
        self.register_buffer("origin", torch.zeros(self.dim))
        self.register_buffer("width", torch.ones(self.dim))
        self.register_buffer("spread", torch.full((self.many,), WIDEST))
        self.shift = nn.Parameter(torch.zeros(self.dim))
        self.log_scale = nn.Parameter(torch.zeros(self.dim))
        self.outer = FlowGuide(self.many, FLOWS[flow](self.many, **made), Diagonal(self.many))
        self.slope = nn.Parameter(torch.zeros(self.dim))
        self.centre = nn.Parameter(torch.zeros(self.many))
        self.log_width = nn.Parameter(torch.zeros(self.many))
        flow_back = FLOWS[flow](self.many, self.many, **made)
        self.inner = FlowGuide(self.many, flow_back, Diagonal(self.many, self.many))

    def sample(self, shape: tuple[int, ...], context: Tensor | None = None) -> Draw:
        """Draw z, each with the log of a density q hat as above."""
        t, log_q = self.outer.sample(shape)
        z, log_given, _, _ = self._given(t)
        return Draw(z, log_q + log_given - self.log_auxiliary(t, z))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """An estimate of log q(z), below it on average, from fixed draws of r. (*S, D) -> (*S)."""
        if z.shape[-1] != self.dim:
            raise ValueError(f"z has {z.shape[-1]} columns but the guide has D = {self.dim}.")
        sums = self._sums(z)
        with isolated_rng(0):
            y, log_r = self.inner.sample((DRAWS,), sums)
        t = self.centre + sums + self.log_width.exp() * y
        mean, scale = self._normal(t)
        log_q = self.outer.log_prob(t) + _log_normal((z - mean) / scale, scale)
        ratio = log_q - log_r + self.log_width.sum()
        return torch.logsumexp(ratio, 0) - math.log(DRAWS)

    def sample_with_score(
        self, shape: tuple[int, ...], context: Tensor | None = None
    ) -> ScoredSample:
        """Draws of z and, behind them, of t, with the score of both together."""
        t, log_q, log_share, score = self.outer.sample_with_score(shape)
        z, log_given, eps, scale = self._given(t)
        with torch.no_grad():
            pull = eps / scale
            score = score + self.spread * self._added(pull * self._means())
        both, scores = torch.cat([z, t], -1), torch.cat([-pull, score], -1)
        return ScoredSample(both, log_q + log_given, log_share, scores)

    def joint_density(self, log_p: LogDensity) -> LogDensity:
        """The density of z and t together: log p(z) + log r(t | z)."""

        def joint(both: Tensor) -> Tensor:
            z, t = both.split([self.dim, self.many], dim=-1)
            return log_p(z) + self.log_auxiliary(t, z)

        return joint

    def log_auxiliary(self, t: Tensor, z: Tensor) -> Tensor:
        """Log density r(t | z). (*S, Z), (*S, D) -> (*S)."""
        sums = self._sums(z)
        y = (t - self.centre - sums) * (-self.log_width).exp()
        return self.inner.log_prob(y, sums) - self.log_width.sum()

    def advance_rng(self, shape: tuple[int, ...]) -> None:
        self.outer.advance_rng(shape)
        torch.randn((*shape, self.dim), dtype=self.origin.dtype, device=self.origin.device)

    @torch.no_grad()
    def start(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Become nearly the diagonal normal that is nearest to N(loc, L L^T).

        A small part of each variance comes from the multipliers, which correlate the coordinates
        of a unit.
        """
        fresh = [self.shift, self.log_scale, self.slope, self.centre, self.log_width]
        for p in fresh:
            p.zero_()
        for guide in (self.outer, self.inner):
            one = torch.ones(self.many).to(loc)
            guide.start(0 * one, one)
        self.origin.copy_(loc)
        self.width.copy_(nearest_scales(scale_tril))
        ratio = SHARE * self.width / loc.abs().clamp_min(1e-30)
        least = ratio.new_full((self.many + 1,), WIDEST)
        least.scatter_reduce_(0, self.units, ratio, "amin")
        self.spread.copy_(least[:-1])
        share = self._padded(self.spread, 0.0)[self.units] * loc / self.width
        left = (1 - share.square()).sqrt()
        self.log_scale.copy_(left.log())
        # The distribution of t given z if q(t) is standard normal.
        signal = share / left
        precision = 1 + self._added(signal.square())
        self.slope.copy_(signal / left / self._padded(precision, 1.0)[self.units])
        self.log_width.copy_(-0.5 * precision.log())

    def _given(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A draw of z given t, its log density, the noise behind it, and the scales."""
        mean, scale = self._normal(t)
        # A compiled step supports noise of a given size only.
        eps = torch.randn((*t.shape[:-1], self.dim), dtype=t.dtype, device=t.device)
        return torch.addcmul(mean, scale, eps), _log_normal(eps, scale), eps, scale

    def _normal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Means and scales of z given t, (*S, D) and (D)."""
        factors = self._padded(1 + self.spread * t, 1.0).index_select(-1, self.units)
        return factors * self._means(), self.width * self.log_scale.exp()

    def _means(self) -> Tensor:
        return self.origin + self.width * self.shift

    def _sums(self, z: Tensor) -> Tensor:
        """The weighted sum of the coordinates of each unit, (*S, Z)."""
        return self._added(self.slope * (z - self.origin) / self.width)

    def _added(self, values: Tensor) -> Tensor:
        """Sums over the coordinates of each unit. (*S, D) -> (*S, Z)."""
        total = values.new_zeros((*values.shape[:-1], self.many + 1))
        return total.index_add(-1, self.units, values)[..., :-1]

    def _padded(self, values: Tensor, number: float) -> Tensor:
        """Values of units with one for coordinates without. (*S, Z) -> (*S, Z + 1)."""
        return torch.cat([values, values.new_full((*values.shape[:-1], 1), number)], -1)


def _log_normal(eps: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * (eps.square() + LOG_2PI).sum(-1) - scale.log().sum(-1)
