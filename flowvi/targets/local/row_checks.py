"""Compare the densities of rows one by one with the model's own density of several rows."""

from __future__ import annotations

import torch
from torch import Tensor

from flowvi.targets.local.row_functions import RowFunctionsOfModel
from flowvi.targets.local.rows import Batch
from flowvi.targets.local.runner import TOGETHER
from flowvi.targets.local.shared_prior import SharedPrior
from flowvi.targets.local.target import LocalTarget
from flowvi.targets.pyro import checks, enumeration
from flowvi.targets.pyro.handlers import ToVector
from flowvi.targets.recording.capture import agree
from flowvi.targets.schema import ModelError


def check_rows(
    target: LocalTarget,
    functions: RowFunctionsOfModel,
    prior: SharedPrior | None,
    points: Tensor,
    theta: list[Tensor],
) -> None:
    """Compare a few rows at once, as the model itself scores them, with rows one by one.

    Raises:
        ModelError: The densities of rows do not add up to that of all of them.
    """
    few = min(TOGETHER, target.rows)
    if few < 2:
        return
    batch = target.batch(range(few))
    z = torch.stack([points[i % len(points)] for i in range(few)])
    shared = theta[0].detach() if theta else None
    with torch.no_grad():
        alone = target.log_prob(z, batch, shared).sum()
        if shared is not None and target.shared is not None:
            alone = alone + target.shared.log_prob(shared)
        together = _at_once(target, functions, prior, z, batch, shared)
    if not agree((together,), (alone,)):
        raise ModelError(
            f"The rows of plate '{target.plate}' do not stand for themselves: the log density of "
            f"{few} rows at once is {float(together):.6g}, and the sum of theirs one by one "
            f"{float(alone):.6g}. A local latent needs rows that are independent given the "
            "shared latents: no batch norm, no site that mixes rows, and data whose first "
            f"axis is the plate's ({target.rows} rows)."
        )


def _at_once(
    target: LocalTarget,
    functions: RowFunctionsOfModel,
    prior: SharedPrior | None,
    z: Tensor,
    batch: Batch,
    shared: Tensor | None,
) -> Tensor:
    """The log density that one run of the model gives several rows, Jacobians included."""
    sites, own = functions.sites, functions.own
    theta = [] if shared is None else [shared]
    ladj = torch.zeros(())
    for i in range(len(z)):
        inputs = [*theta, *own, *[t[i] for t in batch.data]]
        ladj = ladj + functions.trace(z[i], inputs)[1].ladj
    found = target.constrain(z, batch, shared)
    values = {n: found[n].movedim(0, sites.axes[n]) for n in sites.local.sites}
    if shared is not None and prior is not None:
        common = prior.values(shared, *own)
        values |= {n: common[n] for n in prior.layout.sites}
        ladj = ladj + prior.ladj(shared)
    try:
        trace = functions.run(ToVector(values), batch.data, own)
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"{target.name} fails on {len(z)} rows of plate '{target.plate}' at once: {error}"
        ) from error
    if sites.local.enumerated:
        return torch.as_tensor(enumeration.log_joint(trace) + ladj)
    return torch.as_tensor(ladj + sum(s["log_prob_sum"] for s in checks.sites_with_density(trace)))
