"""The bound of a batch of rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowvi.guides.guide import Guide
from flowvi.objectives.renyi_bound import Renyi
from flowvi.objectives.reweighted import WakeSleep
from flowvi.targets import Batch, LocalTarget


class RowStep(NamedTuple):
    """The objective and the bound of a step.

    Attributes:
        objective: Mean of the rows' objectives, which is differentiated.
        bound: Mean of the rows' bounds, at beta = 1 and without free bits.
        divergence: Mean of log q(z) - log p(z); NaN if the density has no separate prior.
    """

    objective: Tensor
    bound: Tensor
    divergence: Tensor


def row_step(
    target: LocalTarget,
    guide: Guide,
    objective: Renyi | WakeSleep,
    batch: Batch,
    beta: float = 1.0,
    free_bits: float = 0.0,
) -> RowStep:
    r"""Evaluate the bound of a batch of rows.

    With weight beta the objective of :math:`\log p(x \mid z) / \beta + \log p(z)` is
    evaluated, and multiplied by beta.

    Args:
        target: The log densities of rows.
        guide: A density for every row.
        objective: The bound.
        batch: The rows.
        beta: Weight of the prior and the guide.
        free_bits: Nats of divergence without a penalty.
    """
    seen: list[Tensor] = []

    def log_p(z: Tensor) -> Tensor:
        seen[:] = target.terms(z, batch).unbind(-1)
        return seen[0] + seen[1] if beta == 1.0 else seen[0] / beta + seen[1]

    context: Any = batch  # the rows are the context of a guide for rows
    estimate = objective(log_p, guide, context)
    likelihood = seen[0]
    wanted = beta * estimate.bound.mean()
    bound = estimate.bound.detach()
    if beta < 1.0:
        log_w = estimate.log_w - (1 / beta - 1) * likelihood.detach()
        one_stratum = len(log_w) == objective.particles
        with torch.no_grad():
            bound = (
                objective.bound(log_w)
                if one_stratum
                else objective(lambda z: target.log_prob(z, batch), guide, context).bound
            )
    divergence = (likelihood.detach() / beta - estimate.log_w).mean()
    if free_bits > 0 and divergence < free_bits:
        wanted = likelihood.mean() - beta * free_bits
    if not target.has_parts:
        divergence = divergence.new_full((), math.nan)
    return RowStep(wanted, bound.mean(), divergence)
