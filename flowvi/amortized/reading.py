"""Data sets as users give them, as the tensors of a problem."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi.amortized.problem import Problem
from flowvi.targets import GlobalTarget
from flowvi.targets.tabular import as_tensor


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        observed: Values by observed site.
        arguments: Values by argument that varies.
        rows: Number of rows.
        call: Arguments and keyword arguments of the model with these data; None where they are
            given by their sites, and are no arguments.
    """

    observed: dict[str, Tensor]
    arguments: dict[str, Tensor]
    rows: int
    call: tuple[tuple[Any, ...], dict[str, Any]] | None

    @property
    def data(self) -> dict[str, Tensor]:
        """All tensors, as the encoder takes them, (1, *shape) each."""
        return {name: t[None] for name, t in (self.observed | self.arguments).items()}

    def fingerprint(self) -> str:
        """A checksum of all values."""
        found = hashlib.sha256()
        for name, t in sorted((self.observed | self.arguments).items()):
            found.update(f"{name}{tuple(t.shape)}".encode())
            found.update(np.ascontiguousarray(t.double().numpy()).tobytes())
        return found.hexdigest()[:16]


def read(problem: Problem, given: Any) -> DataSet:
    """Read one data set.

    Args:
        problem: The model.
        given: The arguments of the model: a tuple in their order, a dictionary or a table by
            their names, or an array where one argument is observed. A dictionary may name the
            observed sites in place of arguments.

    Raises:
        ValueError: Something is missing, unknown, not finite, or of another shape.
        TypeError: It is no data set.
    """
    named = _by_name(problem, given)
    sites = {n: t for n, t in named.items() if n in problem.sites and n not in problem.leaves}
    leaves = {n: t for n, t in named.items() if n in problem.leaves}
    for site, value in list(sites.items()):
        # An argument whose values are those of the site is given by it.
        leaves |= {n: value for n, s in problem.data_leaves.items() if s == site}
    _check_missing(problem, leaves, sites, given)
    for name, value in leaves.items():
        _check(problem, name, value, problem.leaves[name], name in problem.resized)
        if name not in problem.resized and name not in problem.data_leaves:
            _check_fixed(problem, name, value)
    leaves = {n: v.to(problem.leaves[n]) for n, v in leaves.items()}
    rows = _rows(problem, leaves, sites)
    call = problem.runner.with_leaves(leaves) if problem.leaves else None
    direct = {s: leaves[n] for n, s in problem.data_leaves.items() if s and n in leaves}
    observed = sites | direct
    if any(site not in observed for site in problem.sites):
        args, kwargs = problem.runner.with_leaves(leaves)
        observed = problem.data_of(args, kwargs) | observed
    elif set(sites) - set(problem.data_leaves.values()):
        call = None
    for site in problem.sites:
        _check(problem, site, observed[site], problem.target.observed[site], bool(problem.plate))
    held = {s: observed[s].to(problem.target.observed[s]) for s in problem.sites}
    # What is left out is as in the example.
    varying = {n: leaves.get(n, problem.leaves[n]) for n in problem.varying}
    return DataSet(held, varying, rows, call)


def target_of(problem: Problem, data: DataSet) -> GlobalTarget:
    """The density of a data set."""
    target = problem.target_of(data.rows).observing(data.observed, data.arguments)
    if data.call is not None:
        target.source = (problem.model, *data.call)
    return target


def _by_name(problem: Problem, given: Any) -> dict[str, Tensor]:
    """The given values by argument or site."""
    if hasattr(given, "columns") and hasattr(given, "to_numpy"):
        given = {name: given[name].to_numpy() for name in given.columns}
    if isinstance(given, Mapping):
        flat: dict[str, Any] = {}
        for name, value in given.items():
            inner = isinstance(value, Mapping)
            flat |= {f"{name}.{k}": v for k, v in value.items()} if inner else {name: value}
        known = [*problem.leaves, *problem.sites]
        flat = {n: v for n, v in flat.items() if v is not None}
        unknown = [name for name in flat if name not in known]
        if unknown and any(name in known for name in flat):
            # Further columns of a table are not asked for.
            flat = {n: v for n, v in flat.items() if n in known}
        elif unknown:
            raise ValueError(
                f"The data set has {_list(unknown)}, and none of the arguments and observed sites "
                f"of {problem.name}: {_list(dict.fromkeys(known))}."
            )
        return {name: _tensor(name, value) for name, value in flat.items()}
    if isinstance(given, tuple):
        names = list(problem.runner.arguments())
        if len(given) > len(names):
            raise ValueError(
                f"A data set of {problem.name} is a tuple of at most {len(names)} arguments, "
                f"({', '.join(names)}); got {len(given)}."
            )
        pairs = dict(zip(names, given, strict=False))
        return _by_name(problem, {n: v for n, v in pairs.items() if _is_data(problem, n)})
    single = list(problem.data_leaves) or (problem.sites if len(problem.sites) == 1 else [])
    if len(single) != 1:
        raise ValueError(
            f"{problem.name} observes {_list(single or problem.sites)}: give a data set as a "
            "dictionary of these, or as a tuple of the model's arguments."
        )
    return {single[0]: _tensor(single[0], given)}


def _is_data(problem: Problem, name: str) -> bool:
    return any(leaf == name or leaf.startswith(f"{name}.") for leaf in problem.leaves)


def _tensor(name: str, value: Any) -> Tensor:
    found = as_tensor(value)
    try:
        return found if isinstance(found, Tensor) else torch.as_tensor(np.asarray(found))
    except (TypeError, ValueError):
        raise TypeError(
            f"'{name}' of a data set must be an array of numbers; got {type(value).__name__}."
        ) from None


def _check_missing(
    problem: Problem, leaves: Mapping[str, Tensor], sites: Mapping[str, Tensor], given: Any
) -> None:
    wanted = [n for n, site in problem.data_leaves.items() if not (site and site in sites)]
    if not problem.data_leaves:
        wanted = problem.sites
    if all(site in sites for site in problem.sites):
        wanted = []
    absent = [name for name in wanted if name not in leaves and name not in sites]
    if isinstance(given, Mapping | tuple):
        absent += [name for name in problem.varying if name not in leaves]
    if absent:
        raise ValueError(
            f"The data set lacks {_list(absent)}: {problem.name} was amortized over "
            f"{_list([*problem.data_leaves, *problem.varying] or problem.sites)}."
        )


def _check(problem: Problem, name: str, value: Tensor, like: Tensor, resizable: bool) -> None:
    """Refuse values of another shape, or that are not finite."""
    wanted: tuple[Any, ...] = tuple(like.shape)
    came: tuple[Any, ...] = tuple(value.shape)
    if resizable and problem.rows[0] < problem.rows[1]:
        wanted, came = ("rows", *wanted[1:]), ("rows", *came[1:]) if came else ()
    if wanted != came:
        shown = str(wanted).replace("'", "")
        raise ValueError(
            f"'{name}' has shape {tuple(value.shape)} in this data set; the guide reads {shown}."
            + _why_fixed(problem, wanted, came)
        )
    if value.is_floating_point() and not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise ValueError(
            f"'{name}' has {bad} values that are not finite (NaN or infinite) in this data set: "
            "leave out such rows, or the data set."
        )


def _why_fixed(problem: Problem, wanted: tuple[Any, ...], came: tuple[Any, ...]) -> str:
    if not problem.plate or not wanted or not came or wanted[1:] != came[1:]:
        return ""
    own = [n for n in problem.target.sites if problem.plate in problem.target.dims[n]]
    if own:
        return f" Site '{own[0]}' has a value for each row: amortize again for {came[0]} rows."
    return " Amortize again with an example of this size."


def _check_fixed(problem: Problem, name: str, value: Tensor) -> None:
    like = problem.leaves[name]
    if name in problem.varying or torch.equal(value.to(like), like):
        return
    raise ValueError(
        f"Argument '{name}' differs from the example's, and was the same in all simulated data "
        f'sets: amortize with covariates=lambda rows: {{"{name}": ...}}, which draws it.'
    )


def _rows(problem: Problem, leaves: Mapping[str, Tensor], sites: Mapping[str, Tensor]) -> int:
    """The number of rows, on which all arguments agree."""
    found = {n: len(leaves[n]) for n in problem.resized if n in leaves}
    found |= {n: len(t) for n, t in sites.items() if problem.plate}
    found |= {n: problem.size for n in problem.varying if n in problem.resized and n not in leaves}
    if len(set(found.values())) > 1:
        words = ", ".join(f"'{name}' has {n}" for name, n in found.items())
        raise ValueError(f"The parts of the data set differ in their number of rows: {words}.")
    return next(iter(found.values()), problem.size)


def _list(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)
