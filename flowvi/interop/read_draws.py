"""Read tables of draws back from ArviZ's groups."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from flowvi.compat.arviz_groups import has_group, make_groups, to_dataset, xr_index
from flowvi.diagnostics import Diagnosis, Rows, psis
from flowvi.draws.draws import Draws
from flowvi.draws.resampling import stratified
from flowvi.draws.structured import Units
from flowvi.interop.inference_data import CHECKED, UNITS, split_into
from flowvi.targets import Batch, Target

if TYPE_CHECKING:
    import arviz as az


@dataclass(frozen=True)
class Names:
    """Names and labels of a table of draws whose target is not available.

    Attributes:
        name: Name of the model.
        dims: For each value, the names of its axes.
        coords: Labels along the axes.
        improper: Sites whose prior has no integral.
        sites: None: the latents are among the values.
        slices: None: the unconstrained vector is not stored.
        deterministics: None.
        plate: Name of the row axis, if there is one.
    """

    name: str
    dims: dict[str, tuple[str, ...]] = field(default_factory=dict)
    coords: dict[str, list[Any]] = field(default_factory=dict)
    improper: tuple[str, ...] = ()
    sites: dict[str, Any] = field(default_factory=dict)
    slices: dict[str, slice] = field(default_factory=dict)
    deterministics: tuple[str, ...] = ()
    plate: str = ""


def draws_of(idata: az.InferenceData, group: str = "posterior") -> Draws:
    """Read the table of draws from a file of flowvi, for pictures and diagnostics.

    Args:
        idata: Result of `to_inference_data`.
        group: The group that holds the values.
    """
    posterior = idata[group]
    attrs = facts(idata)
    split = int(attrs.pop("split", 1))
    values, dims = {}, {}
    for key, variable in posterior.data_vars.items():
        name = str(variable.attrs.get("original_name", key))
        values[name] = joined(variable.values, split)
        dims[name] = tuple(map(str, variable.dims[2:]))
    shape = idata["sample_stats"]["log_p"].dims if has_group(idata, "sample_stats") else ()
    rows = tuple(map(str, shape[2:]))
    names = Names(
        str(attrs.get("model", "")),
        {name: own[len(rows) :] for name, own in dims.items()},
        {str(dim): list(posterior[dim].values) for dim in posterior.dims if dim in posterior},
        tuple(attrs.get("improper", ())),
        plate="".join(rows),
    )
    chains, count, *sizes = (posterior.sizes[dim] for dim in ("chain", "draw", *rows))
    lead = (1, chains * count, *sizes) if split > 1 else (chains, count, *sizes)
    log_p, log_q = np.full(lead, np.nan), np.full(lead, np.nan)
    if group == "posterior":
        stats = idata["sample_stats"]
        log_p, log_q = (joined(stats[name].values, split) for name in ("log_p", "log_q"))
    batch = Batch(torch.arange(lead[-1]), ()) if rows else None
    target = cast(Target, names)
    made = Draws(np.zeros((*lead, 0)), log_p, log_q, values, target, attrs, batch=batch)
    return made if group != "posterior" else replace(made, **_units(idata))


def joined(array: np.ndarray, split: int) -> np.ndarray:
    """Draws of one guide that were written as several chains, as one chain again.

    Args:
        array: (chain, draw, ...).
        split: The attribute of that name; 1 leaves the chains as they are.
    """
    return array.reshape(1, -1, *array.shape[2:]) if split > 1 else array


def _units(idata: az.InferenceData) -> dict[str, Any]:
    """The check of units and their likelihoods, as `Draws` has them."""
    found: dict[str, Any] = {}
    if has_group(idata, CHECKED):
        found["units"] = Units.of_columns(idata[CHECKED])
    if has_group(idata, UNITS):
        (scores,) = idata[UNITS].data_vars.values()
        found["unit_scores"] = joined(scores.values, int(facts(idata).get("split", 1)))
    return found


def resample_groups(
    idata: az.InferenceData, seed: int = 0, n: int | None = None
) -> az.InferenceData:
    """Resample the draws of a file by their smoothed weights, to draws of equal weights.

    Groups with a value for each draw are resampled. Groups of data are kept, others dropped.

    Args:
        idata: Draws of a guide, a result of `to_inference_data`.
        seed: Seed of the resampling.
        n: Number of draws; the original number by default.

    Raises:
        ValueError: The draws have no weights.
    """
    stats = idata["sample_stats"]
    if "log_weight" not in stats:
        raise ValueError("These draws have no weights: they are resampled already, or of NUTS.")
    log_w = stats["log_weight"].values
    if log_w.ndim > 2:
        raise ValueError(
            "These draws have weights for each row (local=), and files of them are not resampled: "
            "resample(draws) does it before they are written."
        )
    weights = np.exp(psis(log_w.ravel()).log_weights)
    rows = stratified(weights, n or log_w.size, np.random.default_rng(seed))
    groups: dict[str, Any] = {}
    for group in ("posterior", "sample_stats", "log_likelihood", "log_prior", UNITS):
        if has_group(idata, group):
            groups[group] = _select(to_dataset(idata[group]), rows, log_w.shape)
    groups["sample_stats"] = groups["sample_stats"].drop_vars("log_weight")
    for group in ("observed_data", "constant_data", CHECKED):
        if has_group(idata, group):
            groups[group] = to_dataset(idata[group]).copy()
    chains = split_into(len(rows))
    for dataset in groups.values():
        dataset.attrs["resampled"] = 1
        dataset.attrs.pop("split", None)
        if chains > 1:
            dataset.attrs["split"] = chains
    return make_groups(groups)


def _select(dataset: Any, rows: np.ndarray, shape: tuple[int, ...]) -> Any:
    """Select rows of the pooled draws, as the chains of a data set."""
    chains = split_into(len(rows))
    rows = rows[: len(rows) - len(rows) % chains].reshape(chains, -1)
    chain, place = np.divmod(rows, shape[1])
    plain = dataset.drop_vars(["chain", "draw"], errors="ignore")
    new = plain.isel(chain=xr_index(chain), draw=xr_index(place))
    order = dict.fromkeys(new.data_vars, ("chain", "draw", ...))
    ordered = new.assign({name: new[name].transpose(*dims) for name, dims in order.items()})
    labels = {"chain": np.arange(rows.shape[0]), "draw": np.arange(rows.shape[1])}
    return ordered.assign_coords(labels).assign_attrs(dataset.attrs)


def facts(idata: az.InferenceData) -> dict[str, Any]:
    """The attributes of the posterior group, with JSON values decoded."""
    return {str(key): _read(value) for key, value in idata["posterior"].attrs.items()}


def diagnosis_of(idata: az.InferenceData) -> Diagnosis | None:
    """The verdict that was saved with the draws; None with too few draws."""
    attrs = facts(idata)
    if "khat" not in attrs:
        return None
    names = [f.name for f in fields(Diagnosis) if f.name != "rows"]  # "rows" is their number
    known = {name: attrs[name] for name in names if name in attrs}
    known["reasons"] = tuple(known.get("reasons", ()))
    known["distances"] = tuple(map(tuple, known.get("distances", ())))
    for key in ("draws", "divergences"):
        known[key] = int(known.get(key, 0))
    for f in fields(Diagnosis):
        if f.type == "float" or f.type is float:
            known[f.name] = float(known.get(f.name, math.nan))
    if has_group(idata, "row_diagnosis"):
        table = idata["row_diagnosis"]
        labels = tuple(str(label) for label in table[table["khat"].dims[0]].values)
        columns = {str(table[n].attrs.get("original_name", n)): table[n].values for n in table}
        known["rows"] = Rows(labels, **columns, draws=known["draws"])
    return Diagnosis(**known)


def _read(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
