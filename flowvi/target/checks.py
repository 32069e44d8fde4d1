"""What a Pyro model must satisfy, and what to say where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Transform

from flowvi.target.base import ModelError
from flowvi.target.bijections import bijection, support_of
from flowvi.target.handlers import _mask_of, is_deterministic

FINITE_DISCRETE = (dist.Bernoulli, dist.Categorical, dist.OneHotCategorical, dist.Binomial)


class LastSite(Messenger):
    """Add the last site that was reached to whatever the model raises."""

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["fn"].size == 0:
            raise ModelError(f"Plate '{msg['name']}' has size 0: the data has no rows.")
        self.name = msg["name"]
        if msg["is_observed"] and not isinstance(msg["value"], Tensor | float | int | bool):
            raise ModelError(
                f"Site '{self.name}' observes a {type(msg['value']).__name__}; "
                "pass a tensor (torch.as_tensor)."
            )

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
        and isinstance(site["value"], Tensor)
    )


def is_enumerated(site: Mapping[str, Any]) -> bool:
    """Whether a discrete latent is marked to be summed out."""
    return site["infer"].get("enumerate") == "parallel"


def _latent_nodes(trace: poutine.Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not isinstance(site["fn"], _Subsample)
        and not is_enumerated(site)
    }


def latent_sites(trace: poutine.Trace, model: str) -> dict[str, Any]:
    """Continuous latent sites of a trace, in the order in which the model samples them."""
    sites = _latent_nodes(trace)
    if not sites:
        raise ModelError(
            f"{model} has no latent sites to approximate: every pyro.sample has an obs= value."
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
    support = support_of(site["fn"])
    try:
        return bijection(support)
    except NotImplementedError:
        pass
    raise ModelError(
        f"Site '{site['name']}' has support {support!r}, which no smooth bijection maps to R^n. "
        "For directions on a sphere, use pyro.infer.reparam.ProjectedNormalReparam; for others, "
        "sample unconstrained values and transform them in the model."
    )


def same_structure(traces: Sequence[poutine.Trace]) -> None:
    """Refuse models whose sites or shapes differ between runs."""
    first = {name: site["value"].shape for name, site in _latent_nodes(traces[0]).items()}
    for trace in traces[1:]:
        other = {name: site["value"].shape for name, site in _latent_nodes(trace).items()}
        odd = sorted(set(first) ^ set(other))
        if odd:
            raise ModelError(
                f"Site '{odd[0]}' is there in some runs of the model and not in others: its "
                "structure changes. Sample every site in every run, and choose between their "
                "values with torch.where."
            )
        for name, shape in first.items():
            if other[name] != shape:
                raise ModelError(
                    f"Site '{name}' has shape {tuple(shape)} in one run and {tuple(other[name])} "
                    "in another; a guide needs it fixed."
                )


def same_latents(trace: poutine.Trace, latents: Mapping[str, Any]) -> None:
    """Refuse a run whose latent sites are not those that were laid out."""
    odd = set(_latent_nodes(trace)) ^ set(latents)
    if odd:
        raise ModelError(
            f"Site '{min(odd)}' was not there in every run: the model's structure changes with "
            "the values of its latents. Sample every site in every run, and choose between "
            "their values with torch.where."
        )


def subsampled_plates(
    trace: poutine.Trace, latents: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    """Plates that draw their own random rows: name -> size and batch size."""
    plates = {
        name: (site["fn"].size, len(site["value"]))
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and isinstance(site["fn"], _Subsample)
        and site["fn"].subsample_size is not None
        and site["fn"].subsample_size < site["fn"].size
        and not site["is_observed"]
    }
    for name, site in latents.items():
        for frame in site["cond_indep_stack"]:
            if frame.name in plates:
                raise ModelError(
                    f"Site '{name}' is local to plate '{frame.name}', which is subsampled: a guide "
                    f"over all latents would give {frame.size} vectors to {frame.full_size} rows. "
                    "Use the full plate (no subsample_size), or make the site global."
                )
    return plates


def enumerated_sites(trace: poutine.Trace) -> tuple[str, ...]:
    """Discrete latents that are summed out."""
    return tuple(
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and is_enumerated(site)
    )


def observations(trace: poutine.Trace) -> None:
    """Refuse data that the likelihood cannot score."""
    for name, site in trace.nodes.items():
        if not is_data(site):
            continue
        value, fn = site["value"], site["fn"]
        mask = _mask_of(site)
        lead = value.shape[: value.dim() - fn.event_dim]
        keep = torch.ones(lead, dtype=torch.bool)
        if isinstance(mask, Tensor):
            keep = keep & mask.expand(torch.broadcast_shapes(mask.shape, lead))
        if keep.shape != lead:
            continue
        if value.is_floating_point():
            finite = value.isfinite().reshape(*lead, -1).all(-1)
            _refuse_non_finite(name, value, keep & ~finite)
        inside = fn.support.check(value)
        if inside.shape == lead and (keep & ~inside).any():
            at = (keep & ~inside).nonzero()[0].tolist()
            raise ModelError(
                f"Site '{name}': {int((keep & ~inside).sum())} of {keep.numel()} values lie outside "
                f"the support {fn.support!r} of {type(fn).__name__} (first at {at}: "
                f"{value[tuple(at)].tolist()}). Correct the data, mask them, or change the "
                "likelihood."
            )


def _refuse_non_finite(name: str, value: Tensor, bad: Tensor) -> None:
    if not bad.any():
        return
    at = bad.nonzero()[0].tolist()
    kind = "nan" if value[tuple(at)].isnan().any() else "infinite"
    raise ModelError(
        f"Site '{name}': {int(bad.sum())} of {bad.numel()} values are {kind} (first at {at}). "
        "Mask them (obs_mask= or poutine.mask) or drop the rows."
    )


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
