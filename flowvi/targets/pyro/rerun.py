"""Run a captured model on other arguments, given values of its latents."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from flowvi.runtime.rng import isolated_rng
from flowvi.targets import subsampling
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.imputed import Missing, missing_of
from flowvi.targets.pyro import checks
from flowvi.targets.pyro.handlers import is_deterministic, observes
from flowvi.targets.pyro.layout import Layout, dims_of
from flowvi.targets.pyro.runner import Runner
from flowvi.targets.pyro.simulate import CHUNK, VectorizedRuns
from flowvi.targets.schema import ModelError, Rerun

# Numbers of all sites' values that are held at a time.
NUMBERS = 5_000_000

Arrays = dict[str, np.ndarray]


def make_rerun(runner: Runner, layout: Layout, capture: Callable[[Runner], GlobalTarget]) -> Rerun:
    """A function that runs a model on other arguments; see `GlobalTarget.rerun`.

    Args:
        runner: The model with the arguments that it was fitted to.
        layout: Its latent sites.
        capture: Makes a target of the model with other arguments.
    """

    def rerun(
        given: Mapping[str, np.ndarray],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        seed: int,
        fresh: Collection[str],
    ) -> tuple[Arrays, Arrays]:
        kept = {name: value for name, value in given.items() if name not in fresh}
        n = len(next(iter(given.values())))
        new = replace(runner, args=args, kwargs=kwargs, drawn={}, replaced=())
        with isolated_rng(seed), torch.no_grad():
            trace, data = new.prior(validate=True)
            missing = _missing(trace)
            values = _values(kept, layout, trace, missing)
            drawn = _drawn(new, trace, values, missing, n)
        scores: Arrays = {}
        if data:
            target = capture(new)
            known = {n: missing[n].pick(v, 1) if n in missing else v for n, v in values.items()}
            known |= {n: torch.as_tensor(v) for n, v in drawn.items() if n not in known}
            scores = _scores(target, {name: known[name] for name in target.sites})
        return drawn, scores

    return rerun


def _missing(trace: poutine.Trace) -> dict[str, Missing]:
    """Sites of a run of which only the missing elements of an observation are latent."""
    sites = {s["name"]: s for s in checks.sites_with_value(trace) if checks.is_latent(s)}
    found = {name: missing_of(site, trace.nodes) for name, site in sites.items()}
    return {name: part for name, part in found.items() if part is not None}


def _values(
    given: Mapping[str, np.ndarray],
    layout: Layout,
    trace: poutine.Trace,
    missing: Mapping[str, Missing],
) -> dict[str, Tensor]:
    """Values of the latents that the model has with its new arguments.

    Missing data of the fit are latents of the fit; missing values of other data are drawn anew.
    """
    found = {}
    for name, site in layout.sites.items():
        if name not in trace.nodes or name not in given:
            continue
        node, part = trace.nodes[name], layout.missing.get(name)
        if part is not None:
            if part.same(missing.get(name)):
                found[name] = part.fill(torch.as_tensor(given[name]).to(node["value"]), 1)
            continue
        if node["is_observed"]:
            raise ModelError(
                f"Site '{name}' is latent in the fit, but these arguments bring data for it."
            )
        if tuple(node["value"].shape) != tuple(site.shape):
            axes = zip(layout.dims.get(name, ()), site.shape, node["value"].shape, strict=False)
            unit = next((dim for dim, here, there in axes if dim and here != there), name)
            raise ModelError(
                f"Site '{name}' has shape {tuple(site.shape)} in the fit and "
                f"{tuple(node['value'].shape)} with these arguments: there are draws of the rows "
                "that were fitted only. Predict for those rows, or have predict draw the latents "
                f"of other rows from the model, given all others: new_units='{unit}'."
            )
        found[name] = torch.as_tensor(given[name]).to(node["value"])
    return found


def _drawn(
    new: Runner,
    trace: poutine.Trace,
    values: dict[str, Tensor],
    missing: Mapping[str, Missing],
    n: int,
) -> Arrays:
    """Draws of all sites that have no value, n of each."""
    sites = {
        s["name"]: s
        for s in checks.sites_with_value(trace)
        if s["name"] not in values and (observes(s) or is_deterministic(s) or checks.is_latent(s))
    }
    batches = [batch for _, batch in subsampling.cover(new.drawn)]
    size = sum(int(torch.as_tensor(s["value"]).numel()) for s in checks.sites_with_value(trace))
    runs = VectorizedRuns(new, values, batches[0], int(np.clip(NUMBERS // size, 1, CHUNK)))
    pieces = [(batch, runs(values, batch, n, list(sites))) for batch in batches]
    dims = {name: dims_of(site) for name, site in sites.items()}
    out = subsampling.assemble(pieces, new.drawn, dims, lead=1)
    out = {n: missing[n].pick(v, 1) if n in missing else v for n, v in out.items()}
    return {n: v.cpu().numpy() for n, v in out.items() if n not in missing or v.shape[1]}


def _scores(target: GlobalTarget, values: dict[str, Tensor]) -> Arrays:
    """Pointwise log likelihood of the data, in chunks."""
    with torch.no_grad():
        z = target.unconstrain(values)
        parts = [target.log_likelihood(part) for part in z.split(target.chunk())]
    names = parts[0]
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in names}
