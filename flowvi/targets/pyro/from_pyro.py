"""A Pyro model as a target."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from flowvi.runtime.rng import isolated_rng
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.labelling import indices_of
from flowvi.targets.local.capture_model import from_local_model
from flowvi.targets.local.target import LocalTarget
from flowvi.targets.pyro import checks
from flowvi.targets.pyro.capture_model import PyroCapture, capture_runner
from flowvi.targets.pyro.naming import name_of
from flowvi.targets.pyro.runner import Runner
from flowvi.targets.schema import ModelError
from flowvi.targets.streams import with_rows_read


@overload
def from_pyro(
    model: Callable[..., Any],
    *args: Any,
    local: None = None,
    dims: Mapping[str, Sequence[str] | str] | None = None,
    coords: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> GlobalTarget: ...


@overload
def from_pyro(
    model: Callable[..., Any],
    *args: Any,
    local: str,
    coords: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> LocalTarget: ...


def from_pyro(
    model: Callable[..., Any],
    *args: Any,
    local: str | None = None,
    dims: Mapping[str, Sequence[str] | str] | None = None,
    coords: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> GlobalTarget | LocalTarget:
    """Capture a Pyro model as a log density on R^D.

    The model runs a few times now and never again while a guide is fitted:
    the operations that depend on latent values are recorded once, batched,
    and checked against the model in value and gradient.

    Args:
        model: A Pyro model: a function, a callable object or a `PyroModule`.
        *args: Its positional arguments; numpy arrays become tensors.
        local: Name of the plate whose latents are local, one vector a row. The model may
            then be called with all rows, as tensors whose first axis is the plate's, or with a
            `torch.utils.data.Dataset` or `DataLoader` in their place. An `IterableDataset` is read
            once, as by `read_rows`.
        dims: Names of axes that are in no plate, by variable, such as ``{"beta": ["coef"]}``.
            Variables that share a name share its labels. If the model has an argument named dims,
            this is that argument; the same holds for coords.
        coords: Labels by dim or plate: a list, an index of pandas, or a column of categories,
            which stands for these. The rows of columns of pandas are labelled by their index.
        **kwargs: Its keyword arguments.

    Returns:
        The target, evaluated in double precision where the model allows it; with `local` a
        `LocalTarget`, in the model's own precision.

    Raises:
        ModelError: The model cannot be written as a density on R^D; the
            message names the site or line and says what to do.
    """
    checks.check_callable(model, name_of(model))
    own = _parameters(model)
    if "dims" in own and dims is not None:
        kwargs, dims = {**kwargs, "dims": dims}, None
    if "coords" in own and coords is not None:
        kwargs, coords = {**kwargs, "coords": coords}, None
    args, kwargs = with_rows_read(args, kwargs)
    with isolated_rng(0):
        runner = Runner(model, args, kwargs)
        if local is not None:
            rows = from_local_model(runner, name_of(model), local, capture_runner)
            rows.made = partial(from_pyro, model, *args, local=local, **kwargs)
            if dims:
                raise ValueError("dims names axes of latents that all rows share: leave out local.")
            return rows.label(coords or {})
        target = PyroCapture(runner.in_precision(torch.float64), name_of(model)).target()
    target.made = partial(from_pyro, model, *args, **kwargs)
    target.source = model, args, kwargs
    target.name_axes(dims or {})
    target.label(_row_labels(target, runner) | dict(coords or {}))
    return target


def _row_labels(target: GlobalTarget, runner: Runner) -> dict[str, list[Any]]:
    """Labels of plates from the indices of columns of pandas; none where columns disagree."""
    found: dict[str, list[Any]] = {}
    bound = runner.given_by_name()
    for name, labels in indices_of(bound).items():
        # The column of an observed site has the dims of the site.
        alike = [
            axes
            for key, axes in target.dims.items()
            if key == name or _same_data(target.observed.get(key), bound[name])
        ]
        dims = [axes[0] for axes in alike if axes and not axes[0].endswith("_dim_0")]
        for dim in dims[:1]:
            found[dim] = labels if found.get(dim, labels) == labels else []
    return {dim: labels for dim, labels in found.items() if labels}


def _same_data(observed: Tensor | None, column: Any) -> bool:
    if observed is None or observed.dim() != 1 or len(column) != len(observed):
        return False
    values = torch.as_tensor(np.array(column, dtype=np.float64))
    return bool(torch.allclose(observed.double().cpu(), values, equal_nan=True))


def _parameters(model: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(model).parameters
    except (TypeError, ValueError):
        return ()


def replicable(model: Callable[..., Any], *args: Any, **kwargs: Any) -> GlobalTarget:
    """Capture a Pyro model once for many data sets: `GlobalTarget.observing` replaces the data.

    The observed values are inputs of what is recorded. What the model derives from its
    arguments by itself stays as it is.

    Args:
        model: A Pyro model without subsampled plates.
        *args: Its positional arguments.
        **kwargs: Its keyword arguments.

    Raises:
        ModelError: As for `from_pyro`, and where the model reads an observed value into Python.
    """
    with isolated_rng(0):
        return replicable_runner(Runner(model, args, kwargs).in_precision(torch.float64))


def replicable_runner(runner: Runner, other: Mapping[str, Tensor] | None = None) -> GlobalTarget:
    """The same for a model with its arguments, of which some may be replaced too.

    Args:
        runner: The model.
        other: Tensors among the arguments that become inputs, with other values to compare at.
    """
    captured = PyroCapture(replace(runner), name_of(runner.model))
    if not captured.data:
        raise ModelError(f"{captured.name} observes nothing: there are no data to replace.")
    if captured.layout.improper:
        raise ModelError(
            f"The prior of '{captured.layout.improper[0]}' is improper: there is nothing to draw "
            "data from. Give it a proper prior."
        )
    if captured.runner.drawn:
        raise ModelError(
            f"Plate '{next(iter(captured.runner.drawn))}' is subsampled: its data cannot be "
            "replaced as a whole. Leave its subsample size out."
        )
    return captured.target(replace=True, other=other)
