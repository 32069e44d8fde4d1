"""Draw from a Pyro model: its prior, and data given latent values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyro
import torch
from pyro import poutine

from flowvi.target.handlers import Owned, Parameters


def simulator(
    model: Callable[[], object],
    parameters: Parameters,
    reported: Sequence[str],
    observed: Sequence[str],
    dtype: torch.dtype,
) -> Callable[..., dict[str, np.ndarray]]:
    """A function that draws from the model, one run of it a draw.

    Args:
        model: The Pyro model, with its arguments bound.
        parameters: Its own parameters.
        reported: Latent and deterministic sites.
        observed: Sites with data.
        dtype: Precision of the latent values.

    Returns:
        Function of (latent values or None, n, seed). Without values it
        returns all sites from the prior; with values, each (n, *shape), the
        data given them.
    """

    def one(given: Mapping[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
        values = {k: torch.as_tensor(v[row]).to(dtype) for k, v in given.items()}
        free = Owned(parameters)(poutine.condition(poutine.uncondition(model), values))
        nodes = poutine.trace(free).get_trace().nodes
        names = observed if given else [*reported, *observed]
        return {name: nodes[name]["value"].detach().cpu().numpy() for name in names}

    def simulate(
        given: Mapping[str, np.ndarray] | None, n: int, seed: int
    ) -> dict[str, np.ndarray]:
        with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), torch.no_grad():
            torch.manual_seed(seed)
            rows = [one(given or {}, i) for i in range(n)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    return simulate
