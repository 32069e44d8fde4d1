"""Records of a local model: sites, rows, and functions of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.distributions.constraints import Constraint

from flowvi.targets.local.rows import Arguments, Batch, Call
from flowvi.targets.recording.batched import Batched
from flowvi.targets.schema import Site

# Draws the data given latent values, or everything where those are None:
# (values, rows, theta, seed), values each (R, *shape).
RowSimulator = Callable[
    [Mapping[str, Tensor] | None, Batch, Tensor | None, int], dict[str, np.ndarray]
]


@dataclass
class LocalFacts:
    """Facts about a local model, beside its density.

    Args:
        name: Name of the model.
        plate: Name of the plate.
        sites: Local latent sites, of one row.
        slices: Columns of z that belong to each.
        deterministics: Names of derived values of a row.
        observed: Names of the observed sites in the plate.
        dims: For each of these names, a name for each axis of one row's value.
        rows: The model's arguments.
        parts: Whether likelihood and prior of z are computed separately.
        columns: Observed site -> index of the data tensor that it observes.
        messages: Pyro's record of each local latent site in one run of one row.
        parameters: Parameters of the model itself, with the constraints on their values.
    """

    name: str
    plate: str
    sites: dict[str, Site]
    slices: dict[str, slice]
    deterministics: tuple[str, ...]
    observed: tuple[str, ...]
    dims: dict[str, tuple[str, ...]]
    rows: Arguments
    parts: bool = True
    columns: dict[str, int] = field(default_factory=dict)
    messages: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Constraint] = field(default_factory=dict)


@dataclass
class RowFunctions:
    """Functions of one row: of z (D), theta (G) if there is one, parameters, and the row's data.

    Args:
        terms: Log likelihood and log prior of z, Jacobian included, (2).
        values: Latents and deterministics by name.
        inverse: Flattened values of the sites, in place of z, -> z (D).
        simulate: Draws from the model.
        observed: Observed values of rows, each (R, *shape).
        together: The terms of many rows at once: of z (R, D), and data with R rows, (R, 2).
        latents: Makes the function that gives values of latents and their log Jacobians.
        called: Finds the rows in a call of the model.
    """

    terms: Batched
    values: Batched
    inverse: Batched
    simulate: RowSimulator | None = None
    observed: Callable[[Batch], dict[str, Tensor]] | None = None
    together: Callable[..., Tensor] | None = None
    latents: Callable[[], Batched] | None = None
    called: Callable[[tuple[Any, ...], dict[str, Any]], Call] | None = None
