"""Draws of the latents of rows as ArviZ InferenceData."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowvi.groups import make_groups
from flowvi.inference_data import SAMPLE, Labels, storable
from flowvi.row_draws import RowDraws, row_bounds
from flowvi.target import NOWHERE

if TYPE_CHECKING:
    import arviz as az


def rows_to_inference_data(
    draws: RowDraws,
    *,
    predictive: bool = False,
    log_likelihood: bool = True,
    particles: int = 1000,
    seed: int = 0,
) -> az.InferenceData:
    """Bring draws for rows into ArviZ's groups.

    posterior and sample_stats have an entry for each draw and row. log_likelihood
    holds one number a row: its importance-weighted bound on log p(x_n), in which z is
    integrated out, as leave-one-out needs it.

    Args:
        draws: Draws of a `RowFit`.
        predictive: Whether to simulate the data of every draw.
        log_likelihood: Whether to evaluate the bounds.
        particles: Their number of particles.
        seed: Seed of the predictive draws and the bounds.
    """
    target, plate = draws.target, draws.target.plate
    dims = {name: (plate, *target.dims[name]) for name in target.dims}
    stats = {"log_p": draws.log_p, "log_q": draws.log_q, "log_weight": draws.log_weights}
    groups: dict[str, dict[str, np.ndarray]] = {"posterior": draws.values, "sample_stats": stats}
    observed = {n: t.cpu().numpy() for n, t in target.observations(draws.batch).items()}
    facts = {**draws.meta, "creation_library": "flowvi", "inference_library": "flowvi"}
    facts["khat"] = [round(float(k), 4) for k in draws.khat] if draws.z.shape[1] > 20 else []
    if predictive:
        z = torch.as_tensor(draws.z, dtype=target.dtype, device=target.device)
        groups["posterior_predictive"] = target.predictive(z, draws.batch, seed=seed)
    if log_likelihood:
        if draws.guide is None:
            raise ValueError("These draws know no guide to evaluate bounds with.")
        found = row_bounds(target, draws.guide, draws.batch, particles, seed)
        name = next(iter(observed), "row")
        groups["log_likelihood"] = {name: found.values[None, None]}
        facts["particles"] = particles
    names = [*(n for arrays in groups.values() for n in arrays), *observed]
    places = draws.batch.places.cpu().numpy()
    if (places == NOWHERE).any():
        places = np.arange(len(places))
    labels = Labels(
        {**dims, **dict.fromkeys(stats, (plate,)), "row": (plate,)}, {plate: places.tolist()}, names
    )
    attrs = {key: storable(value) for key, value in facts.items()}
    datasets: dict[str, Any] = {
        group: labels.dataset(arrays, SAMPLE, attrs) for group, arrays in groups.items()
    }
    if observed:
        datasets["observed_data"] = labels.dataset(observed, (), attrs)
    return make_groups(datasets)
