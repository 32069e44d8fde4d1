"""Requirements on Pyro models, and the messages where a model does not meet them."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample

from flowvi.targets.imputed import missing_of
from flowvi.targets.pyro.bijections import site_bijection
from flowvi.targets.pyro.handlers import (
    has_density,
    innermost,
    is_improper,
    is_reparametrised,
    mask_of,
    observes,
)
from flowvi.targets.schema import ModelError

FINITE_DISCRETE = (dist.Bernoulli, dist.Categorical, dist.OneHotCategorical, dist.Binomial)
SAMPLE_EVERY_SITE = (
    "Sample every site in every run, and choose between their values with torch.where."
)


class LastSite(Messenger):
    """Record the last site that was reached, and devices and types of the values of all sites."""

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None
        self.devices: dict[str, torch.device] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["fn"].size == 0:
            raise ModelError(f"Plate '{msg['name']}' has size 0: the data has no rows.")
        self.name = msg["name"]

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["value"], torch.Tensor):
            self.devices[f"site '{msg['name']}'"] = msg["value"].device
            self.dtypes[f"site '{msg['name']}'"] = msg["value"].dtype

    def add_note(self, error: Exception) -> None:
        """Add a note to an error that names the last site that the model reached."""
        if self.name is not None:
            error.add_note(f"While flowvi ran the model; the last site reached was '{self.name}'.")


def of_library(error: BaseException) -> bool:
    """Whether an error was raised inside of Pyro or torch."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").split(".")[0] in ("pyro", "torch")


class CheckSites(Messenger):
    """Refuse sites without a proper name or distribution."""

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if not isinstance(name, str) or not name:
            raise ModelError(f"A site needs a name that is text and not empty; got {name!r}.")
        if not isinstance(fn, TorchDistributionMixin | _Subsample):
            came = fn.__name__ if isinstance(fn, type) else type(fn).__name__
            raise ModelError(
                f"Site '{name}' samples from a {came} of {type(fn).__module__}; it needs a "
                "distribution of pyro.distributions, such as dist.Normal(0.0, 1.0)."
            )
        if msg["infer"].get("_do_not_trace"):
            raise ModelError(
                f"Site '{name}' draws random numbers that Pyro keeps out of the density, as "
                "ConjugateReparam does: there is no density to fit. Leave that reparametrisation "
                "out."
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


def sites_with_value(trace: poutine.Trace) -> list[dict[str, Any]]:
    """Sites of a run that have a value: all but its plates."""
    nodes = trace.nodes.values()
    return [s for s in nodes if s["type"] == "sample" and not isinstance(s["fn"], _Subsample)]


def sites_with_density(trace: poutine.Trace) -> list[dict[str, Any]]:
    """Sites that contribute to the log joint.

    A reparametrised site may: some reparametrisations leave a part of its density with it.
    """
    return [site for site in sites_with_value(trace) if not site["infer"].get("_deterministic")]


def _continuous_latents(trace: poutine.Trace) -> dict[str, Any]:
    """Latent sites that are not summed out."""
    nodes = trace.nodes.items()
    return {name: site for name, site in nodes if is_latent(site) and not is_enumerated(site)}


def latent_sites(trace: poutine.Trace, model: str) -> dict[str, Any]:
    """Continuous latent sites of a trace, in the order in which the model samples them."""
    sites = _continuous_latents(trace)
    check_reparametrised(trace)
    if not sites:
        raise ModelError(
            f"{model} has no latent sites to approximate: every pyro.sample has an obs= value "
            "or is summed out. (A function that returns a log density is for from_density.)"
        )
    for name, site in sites.items():
        if site["fn"].support.is_discrete:
            raise ModelError(_discrete(name, site["fn"]))
        if isinstance(innermost(site["fn"]), dist.Delta):
            raise ModelError(
                f"Site '{name}' is a Delta, which has no density on R^D: write "
                f"pyro.deterministic('{name}', value)."
            )
        site_bijection(name, site["fn"])
    return sites


def _discrete(name: str, fn: Any) -> str:
    base = innermost(fn)
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


def masked_message(name: str, what: str, statement: str) -> str:
    """Message on a latent site whose prior is masked out.

    Args:
        name: The site.
        what: The part of the site that the mask covers.
        statement: The statement of the model that samples it.
    """
    return (
        f"Site '{name}' is latent, and a mask covers {what}: a mask takes the prior away from what "
        "it covers, which leaves it without a distribution. Mask the observed sites alone: sample "
        f"'{statement}' outside of poutine.mask and without .mask, so that it keeps its prior, or "
        "drop the masked rows."
    )


def masked_latents(trace: poutine.Trace) -> dict[str, str]:
    """Latent sites whose prior is masked out, with a message for each."""
    found: dict[str, str] = {}
    if any(is_reparametrised(s) and has_density(s) for s in sites_with_value(trace)):
        return found  # their density may lie with another site
    for name, site in _continuous_latents(trace).items():
        if is_improper(site["fn"]) or missing_of(site, trace.nodes):
            continue
        for mask, batch in _masks(site):
            covered = ~torch.as_tensor(mask, dtype=torch.bool).expand(batch)
            n, all_of = int(covered.sum()), covered.numel()
            if n:
                what = "it" if all_of == 1 else f"{n} of its {all_of} values"
                found[name] = masked_message(name, what, name)
    return found


def _masks(site: Mapping[str, Any]) -> Iterator[tuple[Any, torch.Size]]:
    """The masks of a site, of the blocks around it and of its distribution, and their shapes."""
    fn = site["fn"]
    if site["mask"] is not None:
        yield site["mask"], site["value"].shape[: site["value"].dim() - fn.event_dim]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            yield fn._mask, fn.batch_shape
        fn = fn.base_dist


def check_reparametrised(trace: poutine.Trace) -> None:
    """Refuse reparametrisations of observed sites whose density would lack a Jacobian."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not is_reparametrised(site):
            continue
        parts = [
            s for s in sites_with_value(trace) if s["name"].startswith(f"{name}_") and observes(s)
        ]
        if parts and mask_of(site) is False:
            raise ModelError(
                f"Site '{name}' is observed and reparametrised (site '{parts[0]['name']}'): Pyro "
                "reparametrises latent sites in this way only, because the density of data would "
                f"lack the Jacobian. Leave '{name}' out of poutine.reparam."
            )


def check_callable(model: Any, name: str) -> None:
    """Refuse what cannot be called as a model."""
    wrong = ""
    if inspect.isclass(model):
        wrong = f"the class {name}; pass an instance of it, {name}(...)"
    elif not callable(model):
        wrong = f"a {type(model).__name__}"
    elif inspect.iscoroutinefunction(model) or inspect.isgeneratorfunction(model):
        wrong = f"{name}, whose body does not run when it is called (async or yield)"
    if wrong:
        raise ModelError(f"A model is a function that calls pyro.sample; got {wrong}.")


def check_same_structure(traces: Sequence[poutine.Trace]) -> None:
    """Refuse models whose sites or shapes differ between runs."""
    first = {name: site["value"].shape for name, site in _continuous_latents(traces[0]).items()}
    for trace in traces[1:]:
        other = {name: site["value"].shape for name, site in _continuous_latents(trace).items()}
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


def check_same_latents(trace: poutine.Trace, latents: Mapping[str, Any]) -> None:
    """Refuse a run whose latent sites are not those that were laid out."""
    odd = set(_continuous_latents(trace)) ^ set(latents)
    if odd:
        raise ModelError(
            f"Site '{min(odd)}' was not there in every run: the model's structure changes with "
            f"the values of its latents. {SAMPLE_EVERY_SITE}"
        )


def check_subsampled_plates(trace: poutine.Trace, subsampled: Mapping[str, Any]) -> None:
    """Refuse subsampled plates that are looped over, or have latents of their own."""
    for site in sites_with_density(trace):
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
                    f"Give every row a guide that reads it, from_pyro(..., local='{frame.name}'), "
                    "use the full plate (no subsample_size), or make the site global."
                )
