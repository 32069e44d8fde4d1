"""A Pyro model as a target."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, overload

import torch

from flowvi.runtime.rng import isolated_rng
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.local.capture_model import from_local_model
from flowvi.targets.local.target import LocalTarget
from flowvi.targets.pyro import checks
from flowvi.targets.pyro.capture_model import PyroCapture, capture_runner
from flowvi.targets.pyro.naming import name_of
from flowvi.targets.pyro.runner import Runner
from flowvi.targets.schema import ModelError


@overload
def from_pyro(
    model: Callable[..., Any], *args: Any, local: None = None, **kwargs: Any
) -> GlobalTarget: ...


@overload
def from_pyro(model: Callable[..., Any], *args: Any, local: str, **kwargs: Any) -> LocalTarget: ...


def from_pyro(
    model: Callable[..., Any], *args: Any, local: str | None = None, **kwargs: Any
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
            `torch.utils.data.Dataset` or `DataLoader` in their place.
        **kwargs: Its keyword arguments.

    Returns:
        The target, evaluated in double precision where the model allows it; with `local` a
        `LocalTarget`, in the model's own precision.

    Raises:
        ModelError: The model cannot be written as a density on R^D; the
            message names the site or line and says what to do.
    """
    checks.check_callable(model, name_of(model))
    with isolated_rng(0):
        runner = Runner(model, args, kwargs)
        if local is not None:
            rows = from_local_model(runner, name_of(model), local, capture_runner)
            rows.made = partial(from_pyro, model, *args, local=local, **kwargs)
            return rows
        target = PyroCapture(runner.in_precision(torch.float64), name_of(model)).target()
    target.made = partial(from_pyro, model, *args, **kwargs)
    return target


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
        runner = Runner(model, args, kwargs).in_precision(torch.float64)
        captured = PyroCapture(runner, name_of(model))
        if not captured.data:
            raise ModelError(f"{captured.name} observes nothing: there are no data to replace.")
        if captured.runner.drawn:
            raise ModelError(
                f"Plate '{next(iter(captured.runner.drawn))}' is subsampled: its data cannot be "
                "replaced as a whole. Leave its subsample size out."
            )
        return captured.target(replace=True)
