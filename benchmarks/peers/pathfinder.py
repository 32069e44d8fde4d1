"""BlackJAX's multi-path Pathfinder on NumPyro's potential, with Pareto-smoothed resampling.

Paths start uniform in (-2, 2) and are added until the budget is spent or there
are 400; draws of all, 200 each, are resampled together.

References:
    Zhang, Carpenter, Gelman and Vehtari (2022), "Pathfinder: parallel
    quasi-Newton variational inference", arXiv:2108.03782, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from blackjax.vi.multipathfinder import MultipathfinderState, multi_approximate, psis_weights
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.util import initialize_model
from torch import Tensor

from .budget import DRAWS, Budget, Fitted
from .numpyro_models import MODELS
from .numpyro_series import MODELS as SERIES

PATHS = 400
ITERATIONS = 100
PER_PATH = 200


def fit(
    kind: str, name: str, args: tuple[Tensor, ...], wanted: set[str], budget: Budget, seed: int
) -> Fitted:
    """Follow paths until the budget is spent."""
    numpyro.enable_x64()
    model, arrays = (MODELS | SERIES)[name], tuple(tensor.numpy() for tensor in args)
    first, key = jax.random.split(jax.random.PRNGKey(seed))
    info = initialize_model(first, model, model_args=arrays, init_strategy=init_to_uniform)

    def log_p(z: Any) -> Any:
        return -info.potential_fn(z)

    path = jax.jit(lambda key: one_path(key, log_p, info.param_info.z))
    found: list[MultipathfinderState] = []
    while not found or (len(found) < PATHS and not budget.over()):
        key, new = jax.random.split(key)
        found.append(jax.block_until_ready(path(new)))
    z, khat = resampled(key, [f for f in found if np.isfinite(f.logq).all()])
    values = jax.vmap(info.postprocess_fn)(z)
    elbo = max(float(f.path_states.elbo[0]) for f in found)
    note = f"k-hat {khat:.2f}"
    return Fitted({n: np.asarray(v) for n, v in values.items()}, elbo, len(found), note)


def one_path(key: Any, log_p: Callable[[Any], Any], like: Any) -> MultipathfinderState:
    """A path from a random start."""
    flat, unravel = jax.flatten_util.ravel_pytree(like)
    start, run = jax.random.split(key)
    z = unravel(jax.random.uniform(start, flat.shape, flat.dtype, -2.0, 2.0))
    begin = jax.tree.map(lambda x: x[None], z)
    state, _ = multi_approximate(run, log_p, begin, PER_PATH, maxiter=ITERATIONS)
    return state


def resampled(key: Any, found: list[MultipathfinderState]) -> tuple[Any, float]:
    """Draws of all paths by their smoothed weights, and k-hat."""
    if not found:
        raise FloatingPointError("No path ended at a finite approximation.")
    pool = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
    # A draw outside the support, or where the model overflows, gets no weight.
    log_p = jnp.where(jnp.isnan(pool.logp), -jnp.inf, pool.logp)
    log_w, khat = psis_weights(pool._replace(logp=log_p))
    rows = jax.random.choice(key, log_w.size, (DRAWS,), p=jnp.exp(log_w))
    draws = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[rows], pool.samples)
    return draws, float(khat)
