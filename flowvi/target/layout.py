"""Names, shapes and dims of what a Pyro model samples, read off one run of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Size, Tensor

from flowvi.target import checks
from flowvi.target.bijections import bijection_of, support_of
from flowvi.target.facts import Site
from flowvi.target.handlers import is_deterministic, is_improper, observes


@dataclass
class Layout:
    """Where each site of a model lies in the vector z, and what its axes are called.

    Args:
        latents: Latent sites of one run.
        sites: Shapes, supports and dims of the latents.
        slices: Columns of z of each latent.
        shapes: Unconstrained shape of each latent.
        deterministics: Names of derived values.
        dims: A name for each axis of all sites' values.
        plates: Plate -> its size.
        nesting: How many plates lie within each other.
        enumerated: Discrete latents that are summed out.
    """

    latents: dict[str, Any]
    sites: dict[str, Site]
    slices: dict[str, slice]
    shapes: dict[str, Size]
    deterministics: tuple[str, ...]
    dims: dict[str, tuple[str, ...]]
    plates: dict[str, int]
    nesting: int
    enumerated: tuple[str, ...]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Type of each latent's value, as the model draws it."""
        return {name: site["value"].dtype for name, site in self.latents.items()}

    def improper(self) -> tuple[str, ...]:
        """Latents whose prior has no integral."""
        return tuple(name for name, site in self.latents.items() if is_improper(site["fn"]))


def layout_of(trace: poutine.Trace, latents: dict[str, Any]) -> Layout:
    """Lay out the latents of a run in a vector, and name all axes."""
    slices, shapes, sites, start = {}, {}, {}, 0
    for name, site in latents.items():
        shapes[name] = bijection_of(site["fn"]).inv(site["value"]).shape
        slices[name] = slice(start, start + shapes[name].numel())
        start = slices[name].stop
        sites[name] = Site(tuple(site["value"].shape), support_of(site["fn"]), dims_of(site))
    nodes = {name: s for name, s in trace.nodes.items() if s["type"] == "sample"}
    frames = [f for s in nodes.values() for f in s["cond_indep_stack"] if f.dim is not None]
    plates = {n: s["fn"].size for n, s in nodes.items() if isinstance(s["fn"], _Subsample)}
    values = {n: s for n, s in nodes.items() if is_deterministic(s) or observes(s)}
    return Layout(
        latents,
        sites,
        slices,
        shapes,
        tuple(name for name, site in nodes.items() if is_deterministic(site)),
        {name: dims_of(site) for name, site in (latents | values).items()},
        plates,
        max((-f.dim for f in frames), default=0),
        tuple(name for name, site in nodes.items() if checks.is_enumerated(site)),
    )


def dims_of(site: Mapping[str, Any]) -> tuple[str, ...]:
    """A name for each axis of a site's value: its plates, then made-up ones."""
    value = site["value"]
    batch = value.dim() - site["fn"].event_dim
    if is_deterministic(site) and batch == 0:
        # Unless told otherwise, pyro.deterministic takes every axis for one of the event.
        batch = value.dim()
    names = [f"{site['name']}_dim_{i}" for i in range(value.dim())]
    for frame in site["cond_indep_stack"]:
        axis = batch + frame.dim if frame.dim is not None else -1
        if 0 <= axis < batch and value.shape[axis] == frame.size:
            names[axis] = frame.name
    return tuple(names)


def constants_of(
    arguments: Mapping[str, Any], taken: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Tensors that a model is called with and does not observe, by the names of its arguments.

    Args:
        arguments: What the model is called with.
        taken: Names that are in use, with the values of those that are observed.
    """
    data = [t for t in taken.values() if t is not None]
    return {
        name: value.detach()
        for name, value in _tensors(arguments)
        if name not in taken and not any(_same(value, t) for t in data)
    }


def _tensors(tree: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            yield from _tensors(value)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.data_ptr() == b.data_ptr():
        return True
    # Missing values equal each other here.
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def constant_dims(name: str, t: Tensor, plates: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of constant data are named by the one plate that has their size, if only one has."""
    dims: list[str] = []
    for i, size in enumerate(t.shape):
        fitting = [plate for plate, n in plates.items() if n == size]
        known = len(fitting) == 1 and fitting[0] not in dims
        dims.append(fitting[0] if known else f"{name}_dim_{i}")
    return tuple(dims)


def name_of(model: Any) -> str:
    """What to call a model in messages and results."""
    while isinstance(model, functools.partial):
        model = model.func
    return getattr(model, "__name__", type(model).__name__)
