"""Rényi bounds on the log evidence, from the ELBO to the importance-weighted bound."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowvi.guides.guide import Guide, LogDensity
from flowvi.objectives.estimate import Estimate, Gradient
from flowvi.runtime.arguments import check_choice, check_integer


@dataclass(frozen=True)
class Renyi:
    r"""Rényi bound on the log evidence from K reparameterised draws.

    With :math:`w_k = p(x, z_k) / q(z_k)` and :math:`z_k \sim q`,

    .. math::
        L_\alpha = \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_{k=1}^K w_k^{1 - \alpha}.

    The limit :math:`\alpha \to 1` is the ELBO, averaged over the K draws;
    :math:`\alpha = 0` is the IW-ELBO. The value is the same, to the bit, for every
    gradient estimator. A draw outside the support of p has weight zero in the bound
    and in the gradient. A NaN makes the whole estimate NaN.

    A mixture is sampled in strata, K draws from each component m. The factor 1 / K is
    replaced by the share :math:`s_k = \pi_m / K` of a draw of component m. The bound
    is valid for any shares, and tighter than with K draws of the mixture.

    Args:
        alpha: Order of the bound, in [0, 1].
        particles: Number of draws K from each component of the guide.
        gradient: ``"total"`` differentiates the bound as written. ``"dreg"`` drops the
            score of q and reweights the path gradient; it has the same expectation, and
            its variance vanishes as q approaches p. ``"stl"`` is the name of ``"dreg"``
            at alpha = 1.

    References:
        Burda, Grosse and Salakhutdinov (2016), arXiv:1509.00519: alpha = 0.
        Li and Turner (2016), arXiv:1602.02311: general alpha.
        Roeder, Wu and Duvenaud (2017), arXiv:1703.09194: ``"stl"``.
        Tucker et al. (2019), arXiv:1810.04152: ``"dreg"`` in general.
        Morningstar et al. (2021), arXiv:2003.01687: bounds in strata.
    """

    alpha: float = 1.0
    particles: int = 1
    gradient: Gradient = "dreg"

    lower_bound: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1] for a lower bound; got {self.alpha}.")
        object.__setattr__(self, "particles", check_integer("particles", self.particles))
        check_choice("gradient", self.gradient, ("dreg", "stl", "total"))
        if self.gradient == "stl" and self.alpha < 1.0:
            raise ValueError(
                f"The path gradient of 'stl' is biased for alpha < 1; got alpha = {self.alpha}. "
                "Use gradient='dreg', which reweights it."
            )

    def __call__(
        self,
        log_p: LogDensity,
        guide: Guide,
        context: Tensor | None = None,
        repeats: tuple[int, ...] = (),
    ) -> Estimate:
        """Evaluate the bound for every row of the context.

        Args:
            log_p: Log joint density, (K, *repeats, *B, D) -> (K, *repeats, *B).
            guide: The density q.
            context: Context of q, (*B, C).
            repeats: Shape of independent estimates of each row's bound.

        Returns:
            Estimate with a bound of shape (*repeats, *B).
        """
        shape = (self.particles, *repeats)
        if self.gradient == "total" or not torch.is_grad_enabled():
            z, log_q, log_share = guide.stratified_sample(shape, context)
            log_w = log_p(z) - log_q
            _scale_gradient(z, torch.ones_like(log_w), log_w)
            return Estimate(self.bound(log_w, log_share), _check_particles(log_w, log_share))

        # q depends on its parameters and on the context; both scores are dropped, and only the
        # dependence of log q on z remains.
        z, log_q, log_share, score = guide.sample_with_score(shape, context)
        path = (score * z).sum(-1)
        log_joint = guide.joint_density(log_p)(z)
        log_w = (log_joint - log_q).detach()
        v = self._path_weights(log_w, log_share.detach())
        # The model's parameters get v; the path through z gets alpha v + (1 - alpha) v^2.
        _scale_gradient(z, self.alpha + (1 - self.alpha) * v, log_w)
        surrogate = v * (log_joint - path).masked_fill(log_w.isneginf(), 0.0)
        if self.alpha < 1.0:
            # The draws of a stratum follow q_m, not q. The path gradient covers the score of q_m;
            # that of q_m / q remains. Its mean over the shares is zero, so v - s has less noise.
            excess = v - log_share.detach().exp()
            surrogate = surrogate + excess * guide.log_component_ratio(z.detach(), context)
        surrogate = surrogate.sum(0)
        bound = self.bound(log_w, log_share) + (surrogate - surrogate.detach())
        return Estimate(bound, _check_particles(log_w, log_share))

    def bound(self, log_w: Tensor, log_share: Tensor | None = None) -> Tensor:
        """Reduce log weights (K, *B) to the bound (*B).

        Args:
            log_w: Log weights, (K, *B).
            log_share: Log share of each weight; the shares add up to one and are equal by default.
        """
        if log_share is None:
            log_share = log_w.new_full((), -math.log(len(log_w)))
        if self.alpha == 1.0:
            return (log_share.exp() * log_w).sum(0)
        order = 1.0 - self.alpha
        return torch.logsumexp(log_share + order * log_w, dim=0) / order

    def _path_weights(self, log_w: Tensor, log_share: Tensor) -> Tensor:
        """Derivative of the bound with respect to each log weight, (K, *B)."""
        if self.alpha == 1.0:
            return log_share.exp().expand_as(log_w)  # 0 times minus infinity is NaN.
        # If all draws are outside the support, the bound is minus infinity and its gradient zero.
        v = torch.softmax(log_share + (1 - self.alpha) * log_w, dim=0)
        return v.masked_fill(log_w.isneginf(), 0.0)


def elbo(particles: int = 1, gradient: Gradient = "dreg") -> Renyi:
    """The evidence lower bound, averaged over the particles."""
    return Renyi(1.0, particles, gradient)


def iwelbo(particles: int = 16, gradient: Gradient = "dreg") -> Renyi:
    """The importance-weighted bound of K particles."""
    return Renyi(0.0, particles, gradient)


def renyi(alpha: float = 0.5, particles: int = 16, gradient: Gradient = "dreg") -> Renyi:
    """The Rényi bound of order alpha, between the ELBO (1) and the IW-ELBO (0)."""
    return Renyi(alpha, particles, gradient)


def _scale_gradient(z: Tensor, factor: Tensor, log_w: Tensor) -> None:
    """Multiply the gradient of z by a factor, and drop that of draws with weight zero."""
    dead = log_w.isneginf().unsqueeze(-1)
    if z.requires_grad:
        z.register_hook(lambda g: (g * factor.unsqueeze(-1)).masked_fill(dead, 0.0))


def _check_particles(log_w: Tensor, log_share: Tensor) -> Tensor:
    """Detached log weights, corrected for the shares; unchanged if the shares are equal."""
    return (log_w + (log_share + math.log(len(log_w)))).detach()
