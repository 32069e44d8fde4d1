"""NumPyro's guides: three inverse autoregressive flows, and a block neural autoregressive one.

Adam, 16 draws a step, in double precision; updates that are not finite are
skipped, as `SVI.run(stable_update=True)` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpyro
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoBNAFNormal, AutoIAFNormal
from numpyro.infer.initialization import init_to_median
from numpyro.optim import Adam
from torch import Tensor

from .budget import DRAWS, Budget, Fitted
from .numpyro_models import MODELS
from .numpyro_series import MODELS as SERIES

PARTICLES = 16
PARTS = 50  # The step size falls this often.
GUIDES: dict[str, Callable[[Any], Any]] = {
    "iaf": lambda model: AutoIAFNormal(model, init_loc_fn=init_to_median),
    "bnaf": lambda model: AutoBNAFNormal(model, init_loc_fn=init_to_median),
}


def fit(
    kind: str, name: str, args: tuple[Tensor, ...], wanted: set[str], budget: Budget, seed: int
) -> Fitted:
    """Train a guide until the budget is spent."""
    numpyro.enable_x64()
    model, arrays = (MODELS | SERIES)[name], tuple(tensor.numpy() for tensor in args)
    start, at_end = jax.random.split(jax.random.PRNGKey(seed))
    guide, params, steps = trained(kind, model, arrays, budget, start)
    for_draws, for_elbo = jax.random.split(at_end)
    values = guide.sample_posterior(for_draws, params, *arrays, sample_shape=(DRAWS,))
    if wanted - values.keys():
        values |= Predictive(model, values)(for_draws, *arrays)
    bound = -float(Trace_ELBO(num_particles=1000).loss(for_elbo, params, model, guide, *arrays))
    return Fitted({name: np.asarray(value) for name, value in values.items()}, bound, steps)


def trained(
    kind: str, model: Callable[..., Any], arrays: tuple[np.ndarray, ...], budget: Budget, key: Any
) -> tuple[Any, Any, int]:
    """A guide, its parameters, and how many steps they took."""
    guide, elbo = GUIDES[kind](model), Trace_ELBO(num_particles=PARTICLES)
    svi = SVI(model, guide, Adam(budget.step_size()), elbo)
    state = svi.init(key, *arrays)

    @jax.jit
    def train(state: Any, count: Any, step_size: Any) -> Any:
        now = copy.copy(svi)
        now.optim = Adam(lambda _: step_size)
        return jax.lax.fori_loop(0, count, lambda _, s: now.stable_update(s, *arrays)[0], state)

    state, steps = spend(train, state, budget)
    return guide, svi.get_params(state), steps


def spend(train: Callable[..., Any], state: Any, budget: Budget) -> tuple[Any, int]:
    """Call `train` for a share of the budget at a time; the state and the number of steps.

    The first call compiles it, for which there is no charge.
    """
    state = jax.block_until_ready(train(state, 1, budget.step_size()))
    budget = Budget(budget.seconds)
    steps, count = 1, 1
    while not budget.over():
        began = budget.spent()
        state = jax.block_until_ready(train(state, count, budget.step_size()))
        steps += count
        share = budget.seconds / PARTS / max(budget.spent() - began, 1e-6)
        count = max(1, int(count * min(share, 10.0)))
    return state, steps
