"""The forward KL divergence, estimated from given draws of the target."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from flowvi.guides.guide import Guide, LogDensity
from flowvi.objectives.estimate import Estimate


@dataclass(frozen=True, eq=False)
class ForwardKL:
    r"""Inclusive divergence KL(p || q), estimated from given draws of p.

    For draws :math:`z_s` of the posterior with normalised weights :math:`\omega_s`, it
    maximises

    .. math:: -\sum_s \omega_s \log w_s, \qquad w_s = p(x, z_s) / q(z_s),

    whose gradient estimates that of :math:`E_p[\log q]`: q is fitted by weighted
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
            context: Context of q, (*B, C).

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
