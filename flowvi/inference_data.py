"""Draws as ArviZ InferenceData, ready for NetCDF."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike

from flowvi._version import __version__
from flowvi.arguments import wanted
from flowvi.columns import Columns
from flowvi.diagnostics import MIN_DRAWS
from flowvi.draws import EXPECTED, Draws, diagnose
from flowvi.groups import make_groups
from flowvi.predict import Prediction
from flowvi.row_draws import RowDraws
from flowvi.target import ModelError, Target

if TYPE_CHECKING:
    import arviz as az
    import xarray as xr

Arrays = Mapping[str, np.ndarray]

# Groups with a number for each draw and observation are left out beyond this many (400 MB).
MAX_NUMBERS = 50_000_000
# Slashes part the names of groups; the rest cannot be encoded, or ends a name.
UNSAVEABLE = re.compile(r"[/\x00-\x1f\x7f\ud800-\udfff]")
LONGEST_NAME = 200
SAMPLE = ("chain", "draw")
STATS = {
    "log_p": "log joint density of model and data, log Jacobian included",
    "log_q": "log density of the guide",
    "log_weight": "log_p - log_q; without constant if a prior is improper",
}


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
        from flowvi.row_inference_data import rows_to_inference_data

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


class Labels:
    """Names of variables and dims that xarray and NetCDF accept, the same in every group.

    A dim has one size and is no variable's name; where a model's dims break
    this, the axis is called ``<variable>_dim_<axis>``, ArviZ's default.

    Args:
        dims: For each variable, the names of its axes.
        coords: Labels along dims.
        variables: Names of all variables of all groups.
    """

    def __init__(
        self,
        dims: Mapping[str, Sequence[str | None]],
        coords: Mapping[str, Sequence[Any]],
        variables: Iterable[str],
    ) -> None:
        self.dims = dims
        self.coords = coords
        self.names: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.labels: dict[str, np.ndarray] = {}
        for name in variables:
            if name not in self.names:
                self.names[name] = _unused(_saveable(name), {*self.names.values(), *SAMPLE})

    def dataset(self, arrays: Arrays, lead: Sequence[str], attrs: Mapping[str, Any]) -> xr.Dataset:
        """A group whose variables all begin with the lead dims."""
        import xarray as xr

        variables: dict[str, xr.Variable] = {}
        coords: dict[str, np.ndarray] = {}
        for name, array in arrays.items():
            own = self._axes(name, array.shape[len(lead) :])
            notes = {} if name == self.names[name] else {"original_name": _written(name)}
            if name in STATS:
                notes |= {"description": STATS[name], "space": "unconstrained, Jacobian included"}
            variables[self.names[name]] = xr.Variable((*lead, *own), array, notes)
            coords |= {dim: np.arange(size) for dim, size in zip(lead, array.shape, strict=False)}
            coords |= {dim: self.labels[dim] for dim in own}
        return xr.Dataset(variables, coords, attrs)

    def _axes(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """Names for the axes of a variable."""
        axes: list[str] = []
        given = [*self.dims.get(name, ())]
        for axis, size in enumerate(shape):
            dim = given[axis] if axis < len(given) else None
            default = f"{self.names[name]}_dim_{axis}"
            known = self.coords.get(dim, ()) if dim else ()
            chosen = _saveable(dim or default)
            if chosen in axes or not self._fits(chosen, size):
                chosen = default
            while chosen in axes or not self._fits(chosen, size):
                chosen += "_"
            self.sizes[chosen] = size
            labels = _coordinate(known) if len(known) == size else np.arange(size)
            self.labels.setdefault(chosen, labels)
            axes.append(chosen)
        return axes

    def _fits(self, dim: str, size: int) -> bool:
        taken = {*self.names.values(), *SAMPLE}
        return dim not in taken and self.sizes.get(dim, size) == size


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


def _saveable(name: str) -> str:
    """A name that a file can hold, and a terminal can show."""
    words = UNSAVEABLE.sub("_", name).strip()[:LONGEST_NAME]
    return words if words.strip(".") else f"_{len(words)}"


def _written(name: str) -> str:
    """A name as an attribute can hold it."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _coordinate(labels: Sequence[Any]) -> np.ndarray:
    """Labels as one array of numbers, or else of strings."""
    if all(isinstance(label, (int, float)) for label in labels):
        return np.asarray(labels)
    return np.asarray([str(label) for label in labels])


def storable(value: Any) -> str | int | float:
    """What a NetCDF attribute can hold: numbers and strings; the rest as JSON."""
    if isinstance(value, bool):
        return int(value)
    return value if isinstance(value, (str, int, float)) else json.dumps(value)
