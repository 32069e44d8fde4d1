"""Locate the first value that is not finite in a step that failed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowvi.guides.guide import Guide
from flowvi.targets import Target
from flowvi.targets.outside import observed, repairing_sites, values
from flowvi.targets.vectors import label


def explain_nonfinite(
    target: Target,
    guide: Guide,
    bound: Tensor,
    z: Tensor,
    batch: Mapping[str, Tensor] | None = None,
) -> str:
    """Name the site and the parameter that are not finite, in one or two sentences.

    Args:
        target: The log density.
        guide: The guide.
        bound: The bound that was differentiated, ().
        z: Draws of the step, (*S, D).
        batch: Rows of subsampled plates.
    """
    z = z.detach().reshape(-1, target.dim)
    if not z.isfinite().all():
        row = int((~z.isfinite().all(0)).nonzero()[0])
        where = f"The guide's draws of site '{label(target, row)}' are not finite."
    else:
        where = _describe_density(target, z, batch)
    name = _parameter(target, guide, bound)
    return (
        f"{where} The first parameter whose gradient is not finite is '{name}'." if name else where
    )


def _describe_density(target: Target, z: Tensor, batch: Mapping[str, Tensor] | None) -> str:
    z = z.requires_grad_()
    log_p = target.log_prob(z, batch)
    (gradient,) = torch.autograd.grad(log_p.sum(), z, allow_unused=True)
    gradient = torch.zeros_like(z) if gradient is None else gradient
    high, steep = ~log_p.isfinite(), ~gradient.isfinite()
    bad = high | steep.any(-1)
    if not bad.any():
        return "The log density and its gradient are finite at all draws: the guide's are not."
    first = int(bad.nonzero()[0])
    if high.any():
        first = int(high.nonzero()[0])
        what = f"The log density is {log_p[first].item():g} at {int(high.sum())}"
    else:
        what = f"The gradient of the log density is not finite at {int(bad.sum())}"
    columns = steep[first].nonzero().flatten().tolist()
    good = z[~bad][:1].detach()
    site = label(target, columns[0]) if columns else _nonfinite_cause(target, z[first], good, batch)
    operation = _operation(target, z[first], batch)
    where = f", first at site '{site}'" if site else ""
    where += f" (in {operation})" if operation else ""
    return f"{what} of {len(z)} draws{where}, such as at {values(target, z[first])}."


def _nonfinite_cause(
    target: Target, z: Tensor, good: Tensor, batch: Mapping[str, Tensor] | None
) -> str:
    """Find the observed site whose log likelihood is not finite, or the latent site to change."""
    with torch.no_grad():
        name = observed(target, z.detach())
        return name or next(iter(repairing_sites(target, z.detach(), good, batch)), "")


def _operation(target: Target, z: Tensor, batch: Mapping[str, Tensor] | None) -> str:
    """Find the operation whose backward pass returned the first NaN, if there is one."""
    point = z.detach()[None].requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.autograd.detect_anomaly(check_nan=True):
                value = target.plain(point, batch).sum()
                torch.autograd.grad(value, point, allow_unused=True)
        except RuntimeError as error:
            found = re.search(r"Function '(\w+)' returned nan", str(error))
            return found[1] if found else ""
    return ""


def _parameter(target: Target, guide: Guide, bound: Tensor) -> str:
    """Find the first parameter whose gradient is not finite."""
    modules: list[tuple[str, nn.Module]] = [("", guide), ("model.", target)]
    named = [
        (prefix + name, p)
        for prefix, module in modules
        for name, p in module.named_parameters()
        if p.requires_grad
    ]
    found = torch.autograd.grad(bound, [p for _, p in named], allow_unused=True)
    pairs = zip(named, found, strict=True)
    return next((n for (n, _), g in pairs if g is not None and not g.isfinite().all()), "")
