"""Objectives: bounds on the log evidence whose gradients are right."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from flowvi.arguments import known, whole
from flowvi.guides import Guide, LogDensity

Gradient = Literal["total", "stl", "dreg"]


class Estimate(NamedTuple):
    """One evaluation of an objective, to be maximised.

    Attributes:
        bound: Estimate of the bound, (*B). Its value is the bound and its
            gradient is the chosen estimator's, so it can be summed, scaled
            and nested freely.
        log_w: Detached log weights, (K, *B), whose plain mean on the natural
            scale estimates the evidence: those of a guide's strata carry
            K times their shares.
    """

    bound: Tensor
    log_w: Tensor


@dataclass(frozen=True)
class Renyi:
    r"""Rényi bound on the log evidence from K reparameterised draws.

    With :math:`w_k = p(x, z_k) / q(z_k)` and :math:`z_k \sim q`,

    .. math::
        L_\alpha = \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_{k=1}^K w_k^{1 - \alpha}.

    The limit :math:`\alpha \to 1` is the ELBO, averaged over the K draws;
    :math:`\alpha = 0` is the IW-ELBO. The value is the same, to the bit, for
    every kind of gradient. A draw outside the support of p has weight zero, in
    the bound and in the gradient; a NaN makes the whole estimate NaN.

    A mixture is drawn in strata, K from each component m; 1 / K becomes the
    share :math:`s_k = \pi_m / K` of a draw of component m. The bound holds for
    any shares, and is tighter than with K draws of the mixture.

    Args:
        alpha: Order of the bound, in [0, 1].
        particles: Number of draws K from each part of the guide.
        gradient: ``"total"`` differentiates the bound as written. ``"dreg"``
            drops the score of q and reweights what is left; it has the same
            expectation and its variance vanishes as q approaches p. ``"stl"``
            is the name of ``"dreg"`` at alpha = 1.

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
        object.__setattr__(self, "particles", whole("particles", self.particles))
        known("gradient", self.gradient, ("dreg", "stl", "total"))
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
            context: What q is conditioned on, (*B, C).
            repeats: Independent estimates to make of each row's bound.

        Returns:
            Estimate with a bound of shape (*repeats, *B).
        """
        shape = (self.particles, *repeats)
        if self.gradient == "total" or not torch.is_grad_enabled():
            z, log_q, log_share = guide.strata(shape, context)
            log_w = log_p(z) - log_q
            _scale_gradient(z, torch.ones_like(log_w), log_w)
            return Estimate(self.bound(log_w, log_share), _counted(log_w, log_share))

        # q depends on its parameters and on the context; both scores are dropped: what is left
        # of log q is its dependence on z.
        z, log_q, log_share, score = guide.scored(shape, context)
        path = (score * z).sum(-1)
        log_joint = guide.lifted(log_p)(z)
        log_w = (log_joint - log_q).detach()
        v = self._v(log_w, log_share.detach())
        # The model's parameters see v; the path through z sees alpha v + (1 - alpha) v^2.
        _scale_gradient(z, self.alpha + (1 - self.alpha) * v, log_w)
        surrogate = v * (log_joint - path).masked_fill(log_w.isneginf(), 0.0)
        if self.alpha < 1.0:
            # A stratum's draws follow q_m, not q: the path accounts for the score of q_m, and
            # that of q_m / q remains. Its average over the shares is zero; v - s has less noise.
            excess = v - log_share.detach().exp()
            surrogate = surrogate + excess * guide.log_part(z.detach(), context)
        surrogate = surrogate.sum(0)
        bound = self.bound(log_w, log_share) + (surrogate - surrogate.detach())
        return Estimate(bound, _counted(log_w, log_share))

    def bound(self, log_w: Tensor, log_share: Tensor | None = None) -> Tensor:
        """Reduce log weights (K, *B) to the bound (*B).

        Args:
            log_w: Log weights, (K, *B).
            log_share: Log of what each counts, adding up to one; equal by default.
        """
        if log_share is None:
            log_share = log_w.new_full((), -math.log(len(log_w)))
        if self.alpha == 1.0:
            return (log_share.exp() * log_w).sum(0)
        order = 1.0 - self.alpha
        return torch.logsumexp(log_share + order * log_w, dim=0) / order

    def _v(self, log_w: Tensor, log_share: Tensor) -> Tensor:
        """Derivative of the bound with respect to each log weight, (K, *B)."""
        if self.alpha == 1.0:
            return log_share.exp().expand_as(log_w)  # 0 times minus infinity is NaN.
        # All draws outside the support: the bound is minus infinity, its derivative none.
        v = torch.softmax(log_share + (1 - self.alpha) * log_w, dim=0)
        return v.masked_fill(log_w.isneginf(), 0.0)


@dataclass(frozen=True, eq=False)
class ForwardKL:
    r"""Inclusive divergence KL(p || q), for draws that come from elsewhere.

    For draws :math:`z_s` of the posterior with normalised weights :math:`\omega_s`,
    maximises

    .. math:: -\sum_s \omega_s \log w_s, \qquad w_s = p(x, z_s) / q(z_s),

    whose gradient is that of :math:`E_p[\log q]`: q is fitted by weighted
    maximum likelihood. The draws are fixed, so the model's parameters get no
    gradient.

    The value is no lower bound on the log evidence. Without weights, and only
    if the draws are exact and not used to fit q, *minus* the value is an upper
    bound in expectation, :math:`E_p[\log w] = \log p(x) + KL(p \| q)`
    (EUBO). With self-normalised weights it is an estimate, and no bound.

    Args:
        z: Draws, (S, *B, D).
        log_weight: Their log weights up to a constant, (S, *B); equal by default.

    References:
        Naesseth, Lindsten and Blei (2020), "Markovian score climbing",
        arXiv:2003.10374: the objective.
        Ji and Shen (2019), "Stochastic Variational Inference via Upper Bound": the EUBO.
    """

    z: Tensor = field(repr=False)
    log_weight: Tensor | None = field(default=None, repr=False)

    lower_bound: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.log_weight is not None and self.log_weight.shape != self.z.shape[:-1]:
            raise ValueError(
                f"log_weight must have one entry for each draw, shape {tuple(self.z.shape[:-1])}; "
                f"got {tuple(self.log_weight.shape)}."
            )

    def __call__(self, log_p: LogDensity, guide: Guide, context: Tensor | None = None) -> Estimate:
        """Evaluate minus the average log weight for every row of the context.

        Args:
            log_p: Log joint density, (S, *B, D) -> (S, *B).
            guide: The density q.
            context: What q is conditioned on, (*B, C).

        Returns:
            Estimate with a bound of shape (*B).
        """
        with torch.no_grad():
            log_joint = log_p(self.z)
        log_w = log_joint - guide.log_prob(self.z, context)
        equal = torch.zeros_like(log_joint) if self.log_weight is None else self.log_weight
        weight = torch.softmax(equal, dim=0)
        # A draw with weight zero may lie outside the support: 0 times infinity is NaN.
        return Estimate(-(weight * log_w.masked_fill(weight == 0, 0.0)).sum(0), log_w.detach())


@dataclass(frozen=True)
class WakeSleep:
    r"""Reweighted wake-sleep: the IW bound for the model, the inclusive divergence for the guide.

    With K draws :math:`z_k \sim q` that carry no gradient, weights :math:`w_k = p / q` and
    :math:`v = \mathrm{softmax}(\log w)`, the model's parameters follow
    :math:`\sum_k v_k \nabla \log p(x, z_k)`, the gradient of the IW bound, and the
    guide's follow :math:`\sum_k v_k \nabla \log q(z_k)`, an estimate of the gradient of
    :math:`-KL(p(z \mid x) \| q)`. The value is the IW bound.

    Args:
        particles: Number of draws K.

    References:
        Bornschein and Bengio (2015), "Reweighted wake-sleep", arXiv:1406.2751: the wake-phase
        update of the guide.
        Le et al. (2020), "Revisiting reweighted wake-sleep", arXiv:1805.10469.
    """

    particles: int = 16

    lower_bound: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "particles", whole("particles", self.particles))

    def __call__(
        self,
        log_p: LogDensity,
        guide: Guide,
        context: Tensor | None = None,
        repeats: tuple[int, ...] = (),
    ) -> Estimate:
        """Evaluate the bound for every row of the context; as `Renyi` does."""
        with torch.no_grad():
            z = guide.sample((self.particles, *repeats), context).z
        log_joint, log_q = log_p(z), guide.log_prob(z, context)
        log_w = (log_joint - log_q).detach()
        bound = self.bound(log_w)
        # All draws outside the support: the bound is minus infinity, its derivative none.
        v = torch.softmax(log_w, dim=0).masked_fill(log_w.isneginf(), 0.0)
        surrogate = (v * (log_joint + log_q).masked_fill(log_w.isneginf(), 0.0)).sum(0)
        return Estimate(bound + (surrogate - surrogate.detach()), log_w)

    def bound(self, log_w: Tensor) -> Tensor:
        """Reduce log weights (K, *B) to the bound (*B)."""
        return torch.logsumexp(log_w, dim=0) - math.log(len(log_w))


def elbo(particles: int = 1, gradient: Gradient = "dreg") -> Renyi:
    """The evidence lower bound, averaged over the particles."""
    return Renyi(1.0, particles, gradient)


def iwelbo(particles: int = 16, gradient: Gradient = "dreg") -> Renyi:
    """The importance-weighted bound of K particles."""
    return Renyi(0.0, particles, gradient)


def renyi(alpha: float = 0.5, particles: int = 16, gradient: Gradient = "dreg") -> Renyi:
    """The Rényi bound of order alpha, between the ELBO (1) and the IW-ELBO (0)."""
    return Renyi(alpha, particles, gradient)


def wake_sleep(particles: int = 16) -> WakeSleep:
    """Reweighted wake-sleep with K particles, for guides of local latents."""
    return WakeSleep(particles)


OBJECTIVES: dict[str, Callable[..., Renyi | ForwardKL | WakeSleep]] = {
    "elbo": elbo,
    "forward_kl": ForwardKL,
    "iwelbo": iwelbo,
    "renyi": renyi,
    "wake_sleep": wake_sleep,
}


def _scale_gradient(z: Tensor, factor: Tensor, log_w: Tensor) -> None:
    """Multiply the gradient that reaches z, and drop that of draws without weight."""
    dead = log_w.isneginf().unsqueeze(-1)
    if z.requires_grad:
        z.register_hook(lambda g: (g * factor.unsqueeze(-1)).masked_fill(dead, 0.0))


def _counted(log_w: Tensor, log_share: Tensor) -> Tensor:
    """Detached log weights that count by their shares: the same ones where these are equal."""
    return (log_w + (log_share + math.log(len(log_w)))).detach()
