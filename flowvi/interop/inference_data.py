"""Convert draws to ArviZ InferenceData, which NetCDF can store."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from flowvi._version import __version__
from flowvi.compat.arviz_groups import make_groups
from flowvi.diagnostics import MIN_DRAWS
from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import EXPECTED, Draws
from flowvi.draws.prediction import Prediction, predict
from flowvi.draws.row_bounds import row_bounds
from flowvi.draws.row_sampling import log_prior_of_rows
from flowvi.interop.labels import SAMPLE, Arrays, Labels, storable
from flowvi.runtime.arguments import check_type, refuse_fit
from flowvi.runtime.columns import Columns
from flowvi.targets import LocalTarget, ModelError, Target

if TYPE_CHECKING:
    import arviz as az


# Largest size of a group with a number for each draw and observation (400 MB).
MAX_NUMBERS = 50_000_000
# Groups of units whose latents are integrated: likelihoods, and the check of conditionals.
# Chains that the independent draws of one guide are written as, and the fewest draws for that.
CHAINS, FEWEST_SPLIT = 4, 16
# Groups whose draws are not those of the posterior.
OWN_DRAWS = ("prior", "prior_predictive")
# Attribute of the log prior that names sites whose prior depends on other latents, and draws that
# show it.
HIERARCHICAL, PROBES = "hierarchical", 3
UNITS, CHECKED = "unit_log_likelihood", "unit_diagnosis"


def to_inference_data(
    draws: Draws,
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
    """Convert draws to ArviZ's groups.

    The result contains posterior (latents and deterministics) and sample_stats, and, if the
    model has them, observed and constant data, the pointwise log likelihood, and the log prior of
    every latent site. The independent
    draws of one guide are written as four chains, so that ArviZ's R-hat and ESS have a meaning;
    the attribute ``split`` says so. Simulated counts are integers. Names that a
    file cannot store are changed, and the original is the attribute ``original_name``. Every
    group carries the verdict and its numbers as attributes. With a row axis, those of each
    row are in the additional group ``row_diagnosis``.

    Args:
        draws: Draws of a fit, plain or resampled.
        prior: Number of draws from the prior and the prior predictive.
        predictive: Whether to simulate data for every draw, or for how many draws of each chain.
        log_likelihood: Whether to evaluate the log likelihood of every draw and observation.
        predictions: Result of `predict`, or values at new data, each (chain, draw, ...).
        dims: Names of the axes of variables, in place of the model's plates.
        coords: Labels along dims, in place of the model's.
        start: Draws of the initial Gaussian, from `fit.draw_start`, for the additional group
            ``gaussian_start``.
        seed: Seed of the prior and the predictive draws.
        particles: For draws with a row axis, number of particles of the importance-weighted
            bound on log p(x_n) that is the log likelihood.
    """
    refuse_fit("to_inference_data", draws)
    check_type("draws", draws, Draws, EXPECTED)
    _check_simulated(draws, prior, predictive)
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
        groups["log_likelihood"] = _log_likelihood(draws, particles, seed)
    groups["log_prior"] = _log_prior(draws)
    if draws.unit_scores is not None and draws.units is not None:
        groups[UNITS] = {f"{draws.units.plate}_units": draws.unit_scores}
    if prior and isinstance(target, Target):
        groups |= _prior(target, prior, seed)
    data = {"observed_data": _arrays(draws.observed)}
    if isinstance(target, Target):
        data["constant_data"] = _arrays(target.constants)
    groups |= data
    attrs, rows = attributes(draws)
    if rows is not None:
        groups["row_diagnosis"] = rows
        data["row_diagnosis"] = rows
    if draws.units is not None:
        data[CHECKED] = groups[CHECKED] = draws.units.columns
    _to_counts(groups)
    split = chains_of_one(draws)
    if split > 1:
        attrs["split"] = split
        groups = {
            group: arrays if group in data or group in OWN_DRAWS else _in_chains(arrays)
            for group, arrays in groups.items()
        }
    names = [name for arrays in groups.values() for name in arrays]
    own = draws.dims if rows is None else {**draws.dims, **dict.fromkeys(rows, (draws.plate,))}
    if draws.by_row:
        own |= dict.fromkeys((*groups["sample_stats"], "row", "latents"), (draws.plate,))
    if draws.units is not None:
        own |= dict.fromkeys((*groups.get(UNITS, ()), *groups[CHECKED]), (draws.units.plate,))
    labels = Labels({**own, **(dims or {})}, {**draws.coords, **(coords or {})}, names)
    datasets: dict[str, Any] = {
        group: labels.dataset(arrays, () if group in data else SAMPLE, attrs)
        for group, arrays in groups.items()
        if arrays
    }
    if "log_prior" in datasets:
        datasets["log_prior"].attrs[HIERARCHICAL] = storable(hierarchical(draws))
    for dim, name in labels.lost.items():
        warnings.warn(
            f"'{name}' has no labels of '{dim}': a variable of its group has this name too. Give "
            "the plate or dim another name.",
            stacklevel=2,
        )
    return make_groups(datasets)


def chains_of_one(draws: Draws) -> int:
    """Number of chains that the independent draws of one guide are written as."""
    chains, count = draws.log_p.shape[:2]
    return 1 if draws.mcmc or chains > 1 else split_into(count)


def split_into(count: int) -> int:
    """Number of chains for some independent draws: four, if four divides their number."""
    if count < FEWEST_SPLIT:
        return 1
    return next((chains for chains in (CHAINS, 5, 3, 7, 6, 2) if count % chains == 0), CHAINS)


def _in_chains(arrays: Arrays) -> Arrays:
    """The draws of one chain as those of several; a prime number loses one to three."""

    def split(array: np.ndarray) -> np.ndarray:
        count = array.shape[1]
        chains = 1 if array.shape[0] > 1 else split_into(count)
        kept = array[:, : count - count % chains]
        return kept.reshape(chains, -1, *array.shape[2:]) if chains > 1 else array

    return {name: split(array) for name, array in arrays.items()}


def _to_counts(groups: dict[str, Arrays]) -> None:
    """Write observed and simulated data as integers, if all that the model simulates are whole."""
    predictive = ("posterior_predictive", "prior_predictive", "predictions")
    for name in groups["observed_data"]:
        simulated = [groups[group][name] for group in predictive if name in groups.get(group, {})]
        known = [groups["observed_data"][name], *simulated]
        if not simulated or not all(_is_whole(array) for array in known):
            continue
        for group in ("observed_data", *predictive):
            if name in groups.get(group, {}):
                array = groups[group][name]
                if array.dtype.kind == "f":
                    groups[group] = {**groups[group], name: array.astype(np.int64)}


def _is_whole(array: np.ndarray) -> bool:
    if array.dtype.kind != "f":
        return array.dtype.kind in "iu"
    small = np.isfinite(array).all() and (np.abs(array) < 2**53).all()
    return bool(small and (array == np.floor(array)).all())


def _check_simulated(draws: Draws, prior: int, predictive: bool | int) -> None:
    """Reject simulations that are not possible for latents of rows or for nested fits.

    Raises:
        ValueError: Names the argument and an alternative.
    """
    if prior and draws.by_row:
        raise ValueError(
            "to_inference_data has no prior for draws with rows: draws.target.prior(n) draws new "
            "rows."
        )
    if "inner" in draws.meta and (prior or predictive):
        what = "prior" if prior else "predictive"
        raise ValueError(
            f"to_inference_data has no {what} for draws of a nested fit, which leave the latents "
            "of rows out: predict(draws, *arguments) draws them, and data, given theta."
        )


def all_groups(
    draws: Draws, start: Draws | None = None, predicted: int = 0, prior: int = 0
) -> az.InferenceData:
    """Convert draws to all groups that the model supports and that are not too large.

    Args:
        draws: Draws of a fit.
        start: Draws of the initial Gaussian of the fit.
        predicted: Draws of each chain with simulated data, if the model can simulate.
        prior: Draws from the prior, if it has any.
    """
    rows = sum(value.numel() for value in draws.observed.values())
    some = predicted if 0 < predicted * rows <= MAX_NUMBERS and "inner" not in draws.meta else 0
    # For rows the log likelihood needs more draws, and adds nothing to the weights.
    scored = len(draws) * rows <= MAX_NUMBERS and not draws.by_row
    made = partial(to_inference_data, draws, log_likelihood=scored, start=start)
    first = prior if prior * rows <= MAX_NUMBERS and _has_prior(draws) else 0
    for predictive, simulated in ((some, first), (some, 0)):
        with suppress(ModelError):  # some models can be scored but not simulated
            return made(predictive=predictive, prior=simulated)
    return made()


def attributes(draws: Draws) -> tuple[dict[str, str | int | float], Arrays | None]:
    """Attributes by ArviZ's conventions: origin, settings and verdict of the draws.

    Returns:
        The attributes; and the diagnosis of each row, if there are rows and enough draws.
    """
    facts: dict[str, Any] = {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "flowvi",
        "creation_library_version": __version__,
        "creation_library_language": "Python",
        "inference_library": "flowvi",
        "inference_library_version": __version__,
        "modeling_interface": "flowvi",
        "model": draws.target.name,
        "improper": list(draws.improper),
        **draws.meta,
    }
    if "seconds" in draws.meta:
        facts["sampling_time"] = draws.meta["seconds"]
    rows: Arrays | None = None
    if draws.resampled or draws.log_p.shape[1] >= MIN_DRAWS:
        found = diagnose(draws)
        numbers = asdict(replace(found, rows=None))
        facts |= {key: value for key, value in numbers.items() if key != "rows"}
        if found.rows is not None:
            columns = vars(found.rows)
            rows = {name: columns[name] for name in columns if name not in ("labels", "draws")}
    else:
        facts["verdict"] = f"not judged: fewer than {MIN_DRAWS} draws"
    return {key: storable(value) for key, value in facts.items()}, rows


def _log_likelihood(draws: Draws, particles: int, seed: int) -> Arrays:
    """Pointwise log likelihood of every observed site, (chain, draw, *rows).

    For rows, the importance-weighted bound on log p(x_n), in which z is integrated out.
    """
    target = draws.target
    if isinstance(target, LocalTarget):
        if draws.guide is None or draws.batch is None:
            raise ValueError("These draws know no guide to evaluate bounds with.")
        found = row_bounds(target, draws.guide, draws.batch, particles, seed)
        return {next(iter(draws.observed), "row"): found.values[None, None]}
    return _by_point(draws, "log_likelihood")


def log_terms(draws: Draws) -> tuple[Arrays, Arrays]:
    """Log prior of every latent site, and log likelihood of every observation, of each draw.

    Args:
        draws: Draws of latents that all rows share.

    Returns:
        Arrays (chain, draw, ...) by site; empty where the model does not tell them apart.
    """
    if not _has_prior(draws):
        return {}, {}
    return _by_point(draws, "log_prior"), _by_point(draws, "log_likelihood")


def _log_prior(draws: Draws) -> Arrays:
    """Log prior of every latent site; of rows (chain, draw, row)."""
    target = draws.target
    if not isinstance(target, LocalTarget):
        return _by_point(draws, "log_prior") if _has_prior(draws) else {}
    return {} if draws.batch is None else log_prior_of_rows(target, draws.z, draws.batch)


def hierarchical(draws: Draws) -> list[str]:
    """Latent sites whose prior depends on other latents, as that of the groups of a hierarchy."""
    target = draws.target
    if not _has_prior(draws):
        return []
    with torch.enable_grad():
        z = torch.as_tensor(draws.z[0, :PROBES], dtype=target.dtype, device=target.device)
        z = z.clone().requires_grad_()
        priors = target.log_prior(z)
        found = []
        for name, log_p in priors.items():
            slope = torch.zeros_like(z)
            if log_p.requires_grad:
                (slope,) = torch.autograd.grad(log_p.sum(), z, retain_graph=True)
            slope[:, target.slices[name]] = 0.0
            if bool((slope != 0).any()):
                found.append(name)
    return found


def _has_prior(draws: Draws) -> bool:
    return isinstance(draws.target, Target) and not draws.by_row and "inner" not in draws.meta


def _by_point(draws: Draws, which: str) -> Arrays:
    """A function of points, by site, for every draw: (chain, draw, ...)."""
    target = draws.target
    z = torch.as_tensor(draws.z, dtype=target.dtype, device=target.device).flatten(0, 1)
    with torch.no_grad():
        columns: Columns[str] = Columns(len(z))
        for part in z.split(target.chunk()):
            columns.add(getattr(target, which)(part))
    return _by_chain(columns.arrays, draws)


def _prior(target: Target, n: int, seed: int) -> dict[str, Arrays]:
    """Draws from the prior and the prior predictive, as one chain."""
    simulated = {name: value[None] for name, value in target.prior(n, seed).items()}
    return {
        "prior": {n: v for n, v in simulated.items() if n not in target.observed},
        "prior_predictive": {n: v for n, v in simulated.items() if n in target.observed},
    }


def _predictive(draws: Draws, seed: int) -> Arrays:
    """Data simulated for every draw, (chain, draw, *shape)."""
    if isinstance(draws.target, LocalTarget):
        return predict(draws, seed=seed).values
    latents = {name: draws[name].reshape(-1, *draws[name].shape[2:]) for name in draws.target.sites}
    return _by_chain(draws.target.predictive(latents, seed), draws)


def _predictions(draws: Draws, found: Prediction | Mapping[str, ArrayLike]) -> Arrays:
    """Values at new data; the chains and draws have to match."""
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
