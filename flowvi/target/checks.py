"""What a Pyro model must satisfy, and what to say where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.util import check_site_shape
from torch import Tensor
from torch.distributions import Transform

from flowvi.target.bijections import bijection_of, support_of
from flowvi.target.facts import ModelError
from flowvi.target.handlers import is_deterministic, mask_of

FINITE_DISCRETE = (dist.Bernoulli, dist.Categorical, dist.OneHotCategorical, dist.Binomial)
SAMPLE_EVERY_SITE = (
    "Sample every site in every run, and choose between their values with torch.where."
)


class LastSite(Messenger):
    """Add the last site that was reached to whatever the model raises."""

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["fn"].size == 0:
            raise ModelError(f"Plate '{msg['name']}' has size 0: the data has no rows.")
        self.name = msg["name"]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        if isinstance(error, Exception) and self.name is not None:
            error.add_note(f"While flowvi ran the model; the last site reached was '{self.name}'.")
        return super().__exit__(kind, error, trace)


def is_data(site: Mapping[str, Any]) -> bool:
    """Whether a site observes data: neither a factor, a plate nor a deterministic value."""
    return (
        site["type"] == "sample"
        and site["is_observed"]
        and not is_deterministic(site)
        and not isinstance(site["fn"], _Subsample | dist.Unit)
    )


def is_latent(site: Mapping[str, Any]) -> bool:
    """Whether a site's value is unknown."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not isinstance(site["fn"], _Subsample)
    )


def is_enumerated(site: Mapping[str, Any]) -> bool:
    """Whether a discrete latent is marked to be summed out."""
    return is_latent(site) and site["infer"].get("enumerate") == "parallel"


def scored(trace: poutine.Trace) -> list[dict[str, Any]]:
    """Sites that contribute to the log joint."""
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample"
        and not isinstance(site["fn"], _Subsample)
        and not is_deterministic(site)
    ]


def _guided(trace: poutine.Trace) -> dict[str, Any]:
    """Latent sites that are not summed out."""
    nodes = trace.nodes.items()
    return {name: site for name, site in nodes if is_latent(site) and not is_enumerated(site)}


def latent_sites(trace: poutine.Trace, model: str) -> dict[str, Any]:
    """Continuous latent sites of a trace, in the order in which the model samples them."""
    for name, site in trace.nodes.items():
        if is_enumerated(site) and not site["fn"].has_enumerate_support:
            raise ModelError(_discrete(name, site["fn"]))
    sites = _guided(trace)
    if not sites:
        raise ModelError(
            f"{model} has no latent sites to approximate: every pyro.sample has an obs= value "
            "or is summed out."
        )
    for name, site in sites.items():
        if site["fn"].support.is_discrete:
            raise ModelError(_discrete(name, site["fn"]))
        transform_of(site)
    return sites


def _discrete(name: str, fn: Any) -> str:
    base = fn
    while hasattr(base, "base_dist"):
        base = base.base_dist
    kind = type(base).__name__
    if isinstance(base, FINITE_DISCRETE):
        cure = (
            "Mark it with infer={'enumerate': 'parallel'} to have it summed out, or sum it out "
            "yourself, for example with MixtureSameFamily."
        )
    else:
        cure = (
            "It has too many values to sum over: integrate it out by hand (a Poisson-Gamma pair "
            "is negative binomial, say), or put a continuous relaxation in its place."
        )
    return f"Site '{name}' is discrete ({kind}); a guide needs a density on R^D. {cure}"


def transform_of(site: Mapping[str, Any]) -> Transform:
    """The bijection of a latent site, or an error that names it."""
    try:
        return bijection_of(site["fn"])
    except NotImplementedError:
        pass
    raise ModelError(
        f"Site '{site['name']}' has support {support_of(site['fn'])!r}, which no smooth bijection "
        "maps to R^n. For directions on a sphere, use pyro.infer.reparam.ProjectedNormalReparam; "
        "for others, sample unconstrained values and transform them in the model."
    )


def same_structure(traces: Sequence[poutine.Trace]) -> None:
    """Refuse models whose sites or shapes differ between runs."""
    first = {name: site["value"].shape for name, site in _guided(traces[0]).items()}
    for trace in traces[1:]:
        other = {name: site["value"].shape for name, site in _guided(trace).items()}
        odd = sorted(set(first) ^ set(other))
        if odd:
            raise ModelError(
                f"Site '{odd[0]}' is there in some runs of the model and not in others: its "
                f"structure changes. {SAMPLE_EVERY_SITE}"
            )
        for name, shape in first.items():
            if other[name] != shape:
                raise ModelError(
                    f"Site '{name}' has shape {tuple(shape)} in one run and {tuple(other[name])} "
                    "in another; a guide needs it fixed."
                )


def same_latents(trace: poutine.Trace, latents: Mapping[str, Any]) -> None:
    """Refuse a run whose latent sites are not those that were laid out."""
    odd = set(_guided(trace)) ^ set(latents)
    if odd:
        raise ModelError(
            f"Site '{min(odd)}' was not there in every run: the model's structure changes with "
            f"the values of its latents. {SAMPLE_EVERY_SITE}"
        )


def subsampled_plates(trace: poutine.Trace, subsampled: Mapping[str, Any]) -> None:
    """Refuse subsampled plates that are looped over, or have latents of their own."""
    for site in scored(trace):
        name = site["name"]
        for frame in site["cond_indep_stack"]:
            if frame.name in subsampled and not frame.vectorized:
                raise ModelError(
                    f"Plate '{frame.name}' is subsampled and looped over, so that the sites in it "
                    f"('{name}') change from run to run. Write `with plate as rows` and index the "
                    "data by rows."
                )
            if frame.name in subsampled and is_latent(site) and not is_enumerated(site):
                raise ModelError(
                    f"Site '{name}' is local to plate '{frame.name}', which is subsampled: a guide "
                    f"over all latents would give {frame.size} vectors to {frame.full_size} rows. "
                    "Use the full plate (no subsample_size), or make the site global."
                )


def site_shapes(trace: poutine.Trace, nesting: int, strict: bool) -> None:
    """Refuse densities with more rows than their plates declare.

    Args:
        trace: A scored trace.
        nesting: How many plates lie within each other.
        strict: Whether undeclared rows are refused even where each value is scored once.
    """
    for site in scored(trace):
        name, value, rows = site["name"], site["value"], tuple(site["log_prob"].shape)
        own = tuple(value.shape[: value.dim() - site["fn"].event_dim])
        try:
            check_site_shape(site, max(nesting, len(rows)))
        except ValueError as error:
            if own == rows and not strict:
                continue
            hint = f" '{name}' has values of shape {own}"
            hint += f" and a distribution of shape {tuple(site['fn'].batch_shape)}."
            raise ModelError(f"{error}\n {hint}") from None


def observations(trace: poutine.Trace, data: Mapping[str, Tensor]) -> None:
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
        if value.is_floating_point():
            bad = keep & ~value.isfinite().reshape(*lead, -1).all(-1)
            if bad.any():
                kind = "nan" if value[tuple(_first(bad))].isnan().any() else "infinite"
                raise ModelError(
                    f"Site '{name}': {int(bad.sum())} of {bad.numel()} values are {kind} (first "
                    f"at {_first(bad)}). Mask them (obs_mask= or poutine.mask) or drop the rows."
                )
        inside = fn.support.check(value)
        if inside.shape == lead and (keep & ~inside).any():
            bad = keep & ~inside
            raise ModelError(
                f"Site '{name}': {int(bad.sum())} of {bad.numel()} values lie outside the support "
                f"{fn.support!r} of {type(fn).__name__} (first at {_first(bad)}: "
                f"{given[tuple(_first(bad))].tolist()}). Correct the data, mask them, or change "
                "the likelihood."
            )


def _first(bad: Tensor) -> list[int]:
    where: list[int] = bad.nonzero()[0].tolist()
    return where


def where_not_finite(trace: poutine.Trace, tries: int) -> str:
    """Why there is no point of finite density, from the last run that was tried."""
    for name, site in trace.nodes.items():
        value = site.get("log_prob_sum")
        if isinstance(value, Tensor) and not value.isfinite():
            return (
                f"The log density at site '{name}' is {value.item()} at all of {tries} starting "
                "points. Check the scale of the data against the prior: rescale the data, widen "
                "the prior, or use double precision."
            )
    return f"The model could not be evaluated at any of {tries} starting points."
