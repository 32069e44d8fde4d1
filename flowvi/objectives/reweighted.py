"""Reweighted wake-sleep."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowvi.guides.guide import Guide, LogDensity
from flowvi.objectives.estimate import Estimate
from flowvi.runtime.arguments import check_integer


@dataclass(frozen=True)
class WakeSleep:
    r"""Reweighted wake-sleep: the IW bound for the model, inclusive KL for the guide.

    With K draws :math:`z_k \sim q` without gradient, weights :math:`w_k = p / q` and
    :math:`v = \mathrm{softmax}(\log w)`, the gradient for the model's parameters is
    :math:`\sum_k v_k \nabla \log p(x, z_k)`, that of the IW bound. The gradient for the
    guide is :math:`\sum_k v_k \nabla \log q(z_k)`, an estimate of the gradient of
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
        object.__setattr__(self, "particles", check_integer("particles", self.particles))

    def __call__(
        self,
        log_p: LogDensity,
        guide: Guide,
        context: Tensor | None = None,
        repeats: tuple[int, ...] = (),
    ) -> Estimate:
        """Evaluate the bound for every row of the context, like `Renyi`."""
        with torch.no_grad():
            z = guide.sample((self.particles, *repeats), context).z
        log_joint, log_q = log_p(z), guide.log_prob(z, context)
        log_w = (log_joint - log_q).detach()
        bound = self.bound(log_w)
        # If all draws are outside the support, the bound is minus infinity and its gradient zero.
        v = torch.softmax(log_w, dim=0).masked_fill(log_w.isneginf(), 0.0)
        surrogate = (v * (log_joint + log_q).masked_fill(log_w.isneginf(), 0.0)).sum(0)
        return Estimate(bound + (surrogate - surrogate.detach()), log_w)

    def bound(self, log_w: Tensor) -> Tensor:
        """Reduce log weights (K, *B) to the bound (*B)."""
        return torch.logsumexp(log_w, dim=0) - math.log(len(log_w))


def wake_sleep(particles: int = 16) -> WakeSleep:
    """Reweighted wake-sleep with K particles, for guides of local latents."""
    return WakeSleep(particles)
