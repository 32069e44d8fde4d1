"""Draws as ArviZ InferenceData, ready for NetCDF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike

from flowvi._version import __version__
from flowvi.compat.arviz_groups import make_groups
from flowvi.diagnostics import MIN_DRAWS
from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import EXPECTED, Draws, RowDraws
from flowvi.draws.prediction import Prediction
from flowvi.draws.row_bounds import row_bounds
from flowvi.interop.labels import SAMPLE, Arrays, Labels, storable
from flowvi.runtime.arguments import wanted
from flowvi.runtime.columns import Columns
from flowvi.targets import NOWHERE, ModelError, Target

if TYPE_CHECKING:
    import arviz as az


# Groups with a number for each draw and observation are left out beyond this many (400 MB).
MAX_NUMBERS = 50_000_000


@overload
def to_inference_data(
    draws: Draws,
    *,
    prior: int = ...,
    predictive: bool | int = ...,
    log_likelihood: bool = ...,
    predictions: Prediction | Mapping[str, ArrayLike] | None = ...,
    dims: Mapping[str, Sequence[str]] | None = ...,
    coords: Mapping[str, Sequence[Any]] | None = ...,
    start: Draws | None = ...,
    seed: int = ...,
) -> az.InferenceData: ...


@overload
def to_inference_data(
    draws: RowDraws,
    *,
    predictive: bool = ...,
    log_likelihood: bool = ...,
    particles: int = ...,
    seed: int = ...,
) -> az.InferenceData: ...


def to_inference_data(
    draws: Draws | RowDraws,
    *,
    prior: int = 0,
    predictive: bool | int = False,
    log_likelihood: bool = True,
    predictions: Prediction | Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    start: Draws | None = None,
    seed: int = 0,
    particles: int = 1000,
) -> az.InferenceData:
    """Bring draws into ArviZ's groups.

    posterior (latents and deterministics) and sample_stats always; observed
    and constant data, pointwise log likelihood where the model has them. Names
    that a file cannot hold are changed, and kept as the attribute
    ``original_name``. Every group carries the verdict and its numbers.

    Args:
        draws: Draws of a fit, plain or resampled.
        prior: Draws wanted from the prior and the prior predictive.
        predictive: Whether to simulate data for every draw, or for how many of each chain.
        log_likelihood: Whether to evaluate it for every draw and observation.
        predictions: From `predict`, or values at new data, each (chain, draw, ...).
        dims: Names of the axes of variables, in place of those of the model's plates.
        coords: Labels along dims, in place of the model's.
        start: Draws of the Gaussian that the fit began with, from `fit.draw_start`; for
            a group of flowvi's own, ``gaussian_start``.
        seed: Seed of the prior and the predictive draws.
        particles: For draws for rows, whose log likelihood is an importance-weighted bound on
            log p(x_n): its number of particles.
    """
    if isinstance(draws, RowDraws):
        if prior:
            raise ValueError("Draws for rows come without the prior: use target.prior(n).")
        return rows_to_inference_data(
            draws,
            predictive=bool(predictive),
            log_likelihood=log_likelihood,
            particles=particles,
            seed=seed,
        )
    wanted("draws", draws, Draws, EXPECTED)
    target = draws.target
    groups: dict[str, Arrays] = {"posterior": draws.values, "sample_stats": _stats(draws)}
    if predictive:
        some = draws if predictive is True else draws.thinned(int(predictive))
        groups["posterior_predictive"] = _predictive(some, seed)
    if predictions is not None:
        groups["predictions"] = _predictions(draws, predictions)
    if start is not None:
        groups["gaussian_start"] = start.values
    if log_likelihood:
        groups["log_likelihood"] = _log_likelihood(draws)
    if prior:
        groups |= _prior(target, prior, seed)
    data = {"observed_data": target.observed, "constant_data": target.constants}
    for name, tensors in data.items():
        groups[name] = _arrays(tensors)

    names = [name for arrays in groups.values() for name in arrays]
    labels = Labels({**target.dims, **(dims or {})}, {**target.coords, **(coords or {})}, names)
    attrs = attributes(draws)
    datasets: dict[str, Any] = {
        group: labels.dataset(arrays, () if group in data else SAMPLE, attrs)
        for group, arrays in groups.items()
        if arrays
    }
    return make_groups(datasets)


def all_groups(draws: Draws, start: Draws | None = None, predicted: int = 0) -> az.InferenceData:
    """Every group that the model has and that is not too large, for a file or a report.

    Args:
        draws: Draws of a fit.
        start: Draws of the Gaussian that the fit began with.
        predicted: Draws of each chain for which data are simulated, if the model can.
    """
    rows = sum(value.numel() for value in draws.target.observed.values())
    some = predicted if 0 < predicted * rows <= MAX_NUMBERS else 0
    made = partial(
        to_inference_data, draws, log_likelihood=len(draws) * rows <= MAX_NUMBERS, start=start
    )
    try:
        return made(predictive=some)
    except ModelError:  # a model that can be scored need not be one to draw data from
        return made()


def attributes(draws: Draws) -> dict[str, str | int | float]:
    """Attributes by ArviZ's conventions: who made the draws, how, and what they are worth."""
    facts: dict[str, Any] = {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "flowvi",
        "creation_library_version": __version__,
        "creation_library_language": "Python",
        "inference_library": "flowvi",
        "inference_library_version": __version__,
        "modeling_interface": "flowvi",
        "model": draws.target.name,
        "improper": list(draws.target.improper),
        **{key: value for key, value in draws.meta.items() if key != "diagnosis"},
    }
    if "seconds" in draws.meta:
        facts["sampling_time"] = draws.meta["seconds"]
    if draws.resampled or draws.log_p.shape[1] >= MIN_DRAWS:
        facts |= asdict(diagnose(draws))
    else:
        facts["verdict"] = f"not judged: fewer than {MIN_DRAWS} draws"
    return {key: storable(value) for key, value in facts.items()}


def _log_likelihood(draws: Draws) -> Arrays:
    """Pointwise log likelihood of every observed site, (chain, draw, *rows)."""
    target = draws.target
    z = torch.as_tensor(draws.z, dtype=target.dtype, device=target.device).flatten(0, 1)
    with torch.no_grad():
        columns: Columns[str] = Columns(len(z))
        for part in z.split(target.chunk()):
            columns.add(target.log_likelihood(part))
    return _by_chain(columns.arrays, draws)


def _prior(target: Target, n: int, seed: int) -> dict[str, Arrays]:
    """Draws from the prior and the data that they predict, as one chain."""
    simulated = {name: value[None] for name, value in target.prior(n, seed).items()}
    return {
        "prior": {n: v for n, v in simulated.items() if n not in target.observed},
        "prior_predictive": {n: v for n, v in simulated.items() if n in target.observed},
    }


def _predictive(draws: Draws, seed: int) -> Arrays:
    """Data simulated for every draw, (chain, draw, *shape)."""
    latents = {name: draws[name].reshape(-1, *draws[name].shape[2:]) for name in draws.target.sites}
    return _by_chain(draws.target.predictive(latents, seed), draws)


def _predictions(draws: Draws, found: Prediction | Mapping[str, ArrayLike]) -> Arrays:
    """Values at new data, checked: one for each draw."""
    values = found.values if isinstance(found, Prediction) else found
    arrays = {name: np.asarray(value) for name, value in values.items()}
    for name, array in arrays.items():
        if array.shape[:2] != draws.log_p.shape:
            raise ValueError(
                f"predictions['{name}'] must begin with the shape {draws.log_p.shape} of the "
                f"draws, (chain, draw); got {array.shape}."
            )
    return arrays


def _stats(draws: Draws) -> Arrays:
    stats = {"log_p": draws.log_p, "log_q": draws.log_q, **draws.stats}
    if draws.resampled or draws.mcmc:
        return stats
    return {**stats, "log_weight": draws.log_weights}


def _by_chain(arrays: Arrays, draws: Draws) -> Arrays:
    return {n: a.reshape(*draws.log_p.shape, *a.shape[1:]) for n, a in arrays.items()}


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


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
