"""Pyro's guides: a full-rank normal, and three inverse autoregressive flows.

Adam, one draw a step: Pyro's vectorised ELBO is wrong on models that are not
written for it, and a loop over draws costs as much as steps do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import corpus
import numpy as np
import pyro
import torch
from pyro.distributions import ImproperUniform
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import biject_to

from .budget import DRAWS, Budget, Fitted
from .pyro_models import model_of

FLOWS = 3
PARTICLES = 100


def start(site: dict[str, Any]) -> Tensor:
    """The prior's median, or the image of zero where the prior is flat."""
    prior = site["fn"]
    while isinstance(prior, torch.distributions.Independent):
        prior = prior.base_dist
    if not isinstance(prior, ImproperUniform):
        return init_to_median(site)
    bijection = biject_to(site["fn"].support)
    return bijection(torch.zeros(bijection.inverse_shape(site["fn"].shape())))


GUIDES: dict[str, Callable[[Any], Any]] = {
    "mvn": lambda model: AutoMultivariateNormal(model, init_loc_fn=start),
    # It takes a start, and lets it be.
    "iaf": lambda model: AutoIAFNormal(InitMessenger(start)(model), num_transforms=FLOWS),
}


def fit(
    kind: str, name: str, args: tuple[Tensor, ...], wanted: set[str], budget: Budget, seed: int
) -> Fitted:
    """Train a guide until the budget is spent."""
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(seed)
    model = model_of(name, corpus.load_model(name))
    guide = GUIDES[kind](model)
    optimiser = Adam({"lr": budget.step_size()})
    svi, steps = SVI(model, guide, optimiser, Trace_ELBO()), 0
    while steps == 0 or not budget.over():
        for inner in optimiser.optim_objs.values():
            inner.param_groups[0]["lr"] = budget.step_size()
        svi.step(*args)
        steps += 1
    with torch.no_grad():
        values = sampled(model, guide, args, wanted)
        elbo = -Trace_ELBO(num_particles=PARTICLES).loss(model, guide, *args)
    return Fitted(values, float(elbo), steps)


def sampled(
    model: Callable[..., Any], guide: Any, args: tuple[Tensor, ...], wanted: set[str]
) -> dict[str, np.ndarray]:
    """Draws of the guide; the model is run over them where it has a value that is wanted."""
    z = guide.get_posterior().sample((DRAWS,))
    # One by one: as a batch, Pyro confuses the draws with plates.
    draws = [
        {site["name"]: biject_to(site["fn"].support)(u) for site, u in guide._unpack_latent(row)}
        for row in z
    ]
    values = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    if derived := wanted - values.keys():
        replay = Predictive(model, posterior_samples=values, return_sites=sorted(derived))
        values |= replay(*args)
    return {name: value.reshape(DRAWS, *value.shape[1:]).numpy() for name, value in values.items()}
