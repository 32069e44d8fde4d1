"""Requirements on the data and densities of Pyro models, and the messages where they fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.util import check_site_shape
from torch import Tensor
from torch.utils._pytree import tree_leaves

from flowvi.targets.precision import explain_mixed_precision
from flowvi.targets.pyro.checks import sites_with_density
from flowvi.targets.pyro.handlers import innermost, mask_of
from flowvi.targets.schema import ModelError

# Distributions whose densities leave out NaN.
NAN_MASKED = (dist.NanMaskedNormal, dist.NanMaskedMultivariateNormal)


def check_scores(trace: poutine.Trace) -> None:
    """Score a run, or name the site whose values do not fit its distribution."""
    try:
        with torch.no_grad(), pyro.validation_enabled(False):
            trace.compute_log_prob()
    except (ValueError, RuntimeError) as error:
        site = next(site for site in sites_with_density(trace) if "log_prob" not in site)
        plates = ", ".join(f"'{f.name}' of {f.size}" for f in site["cond_indep_stack"])
        if words := _mixed(error, trace, site):
            raise ModelError(words) from error
        raise ModelError(
            f"Site '{site['name']}' has values of shape {tuple(site['value'].shape)} and a "
            f"distribution of shape {tuple(site['fn'].shape())}"
            f"{f', in plates {plates}' if plates else ''}: {error}"
        ) from error


def _mixed(error: Exception, trace: poutine.Trace, site: Mapping[str, Any]) -> str:
    """Message on a density that fails because types of tensors differ; empty for other errors."""
    values = {f"site '{s['name']}'": s["value"] for s in trace.nodes.values() if "fn" in s}
    held = {name: v.dtype for name, v in values.items() if isinstance(v, Tensor)}
    words = explain_mixed_precision(error, held)
    return words and f"Site '{site['name']}' cannot be scored. {words}"


def check_site_shapes(trace: poutine.Trace, nesting: int, strict: bool) -> None:
    """Refuse densities with more rows than their plates declare.

    Args:
        trace: A scored trace.
        nesting: How many plates lie within each other.
        strict: Whether undeclared rows are refused even where each value is scored once.
    """
    for site in sites_with_density(trace):
        name, value, rows = site["name"], site["value"], tuple(site["log_prob"].shape)
        own = tuple(value.shape[: value.dim() - site["fn"].event_dim])
        try:
            check_site_shape(site, max(nesting, len(rows)))
        except ValueError as error:
            if own == rows and not strict:
                continue
            hint = f" '{name}' has values of shape {own}"
            hint += f" and a distribution of shape {tuple(site['fn'].batch_shape)}"
            fits = tuple(n for n in own if n != 1)
            meant = len(fits) < len(own) and fits == tuple(site["fn"].batch_shape)
            hint += f"; did you mean {fits}?" if meant else "."
            raise ModelError(f"{error}\n {hint}") from None


def check_observations(trace: poutine.Trace, data: Mapping[str, Tensor]) -> None:
    """Refuse data that the likelihood cannot score, behind masks excepted.

    Args:
        trace: A run of the model.
        data: Observed values as they were given.
    """
    for name, given in data.items():
        site = trace.nodes[name]
        value, fn, mask = site["value"], site["fn"], mask_of(site)
        lead = value.shape[: value.dim() - fn.event_dim]
        keep = torch.ones(lead, dtype=torch.bool, device=value.device)
        if isinstance(mask, Tensor):
            keep = keep & mask
        if mask is False or keep.shape != lead:
            continue
        if isinstance(innermost(fn), NAN_MASKED):
            # In these distributions, NaN marks a missing value.
            value = value.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        if value.is_floating_point():
            bad = keep & ~value.isfinite().reshape(*lead, -1).all(-1)
            if bad.any():
                kind = "nan" if value[tuple(_first(bad))].isnan().any() else "infinite"
                raise ModelError(
                    f"Site '{name}': {_of(bad)} {kind} (first at {_first(bad)}). Mask what is "
                    "missing (obs_mask=, poutine.mask or NanMaskedNormal), or drop the rows."
                )
        inside = fn.support.check(value)
        if inside.shape == lead and (keep & ~inside).any():
            bad = keep & ~inside
            raise ModelError(
                f"Site '{name}': {_of(bad)} outside the support {fn.support!r} "
                f"of {type(fn).__name__} (first at {_first(bad)}: "
                f"{given[tuple(_first(bad))].tolist()}). Correct the data, mask them, or change "
                "the likelihood."
            )


def _of(bad: Tensor) -> str:
    n = int(bad.sum())
    return f"{n} of {bad.numel()} values {'is' if n == 1 else 'are'}"


def _first(bad: Tensor) -> list[int]:
    where: list[int] = bad.nonzero()[0].tolist()
    return where


def not_finite_in(arguments: Mapping[str, Any]) -> str:
    """Which arguments of a model hold NaN or infinite values, in words; empty if none does."""
    words = ""
    for name, given in arguments.items():
        for value in tree_leaves(given):
            if isinstance(value, Tensor) and value.is_floating_point():
                for what, bad in (("nan", value.isnan()), ("inf", value.isinf())):
                    if n := int(bad.sum()):
                        places = f"{n} place{'s' if n > 1 else ''}"
                        words += f" Its argument '{name}' holds {what} in {places}."
    return words


def where_not_finite(trace: poutine.Trace, tries: int, arguments: Mapping[str, Any]) -> str:
    """Why there is no point of finite density, from the last run that was tried."""
    for name, site in trace.nodes.items():
        value = site.get("log_prob_sum")
        if isinstance(value, Tensor) and not value.isfinite():
            return (
                f"The log density at site '{name}' is {value.item()} at all of {tries} starting "
                "points. Check the scale of the data against the prior: rescale the data, widen "
                f"the prior, or use double precision.{not_finite_in(arguments)}"
            )
    return f"The model could not be evaluated at any of {tries} starting points."
