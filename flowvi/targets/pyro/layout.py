"""Names, shapes and dims of what a Pyro model samples, read off one run of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Size, Tensor

from flowvi.targets.imputed import Missing, missing_of
from flowvi.targets.pyro import checks
from flowvi.targets.pyro.bijections import bijection_of, support_of
from flowvi.targets.pyro.handlers import (
    has_density,
    is_deterministic,
    is_improper,
    is_reparametrised,
    is_reported,
    observes,
)
from flowvi.targets.schema import Site


@dataclass
class Layout:
    """Where each site of a model lies in the vector z, and what its axes are called.

    Args:
        latents: Latent sites of one run.
        sites: Shapes, supports and dims of the latents, as far as they have elements.
        slices: Columns of z of each latent.
        shapes: Unconstrained shape of each latent.
        deterministics: Names of derived values.
        dims: A name for each axis of all sites' values.
        plates: Plate -> its size.
        nesting: How many plates lie within each other.
        enumerated: Discrete latents that are summed out.
        improper: Latents whose prior has no integral.
        missing: Latents of which only some elements are latent.
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
    improper: tuple[str, ...]
    missing: dict[str, Missing]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Type of each latent's value, as the model draws it."""
        return {name: site["value"].dtype for name, site in self.latents.items()}

    def all_elements(self, values: Mapping[str, Tensor], lead: int = 0) -> dict[str, Tensor]:
        """Values of all elements of the sites, as the model has them, (*lead, *shape) each."""
        parts = self.missing
        return {n: parts[n].fill(v, lead) if n in parts else v for n, v in values.items()}

    def latent_elements(self, values: Mapping[str, Tensor], lead: int = 0) -> dict[str, Tensor]:
        """Values of the latent elements alone: the inverse of `all_elements`."""
        parts = self.missing
        return {n: parts[n].pick(v, lead) if n in parts else v for n, v in values.items()}


def layout_of(trace: poutine.Trace, latents: dict[str, Any]) -> Layout:
    """Lay out the latents of a run in a vector, and name all axes."""
    slices, shapes, sites, missing, start = {}, {}, {}, {}, 0
    for name, site in latents.items():
        dims, value = dims_of(site), site["value"]
        unconstrained = bijection_of(site["fn"]).inv(value)
        part = missing_of(site, trace.nodes, dims)
        if part:
            missing[name] = part
            value, unconstrained = part.pick(value), part.pick(unconstrained)
            dims = (part.dim, *dims[part.keep.dim() :])
        shapes[name] = unconstrained.shape
        slices[name] = slice(start, start + unconstrained.numel())
        start = slices[name].stop
        if part is None or value.numel():
            sites[name] = Site(tuple(value.shape), support_of(site["fn"]), dims)
    nodes = {name: s for name, s in trace.nodes.items() if s["type"] == "sample"}
    frames = [f for s in nodes.values() for f in s["cond_indep_stack"] if f.dim is not None]
    plates = {n: s["fn"].size for n, s in nodes.items() if isinstance(s["fn"], _Subsample)}
    values = {n: s for n, s in nodes.items() if is_deterministic(s) or observes(s)}
    return Layout(
        latents,
        sites,
        slices,
        shapes,
        tuple(name for name, site in nodes.items() if is_reported(site)),
        {name: dims_of(site) for name, site in values.items()}
        | {name: site.dims for name, site in sites.items()},
        plates,
        max((-f.dim for f in frames), default=0),
        tuple(name for name, site in nodes.items() if checks.is_enumerated(site)),
        tuple(n for n, s in latents.items() if is_improper(s["fn"]) and not _is_part(n, nodes)),
        missing,
    )


def _is_part(name: str, nodes: Mapping[str, Any]) -> bool:
    """Whether a site is one that a `reparam` made, and whose density lies with the original."""
    return any(
        name.startswith(f"{other}_") and is_reparametrised(site) and has_density(site)
        for other, site in nodes.items()
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
    # NaN values in the same places count as equal.
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def constant_dims(name: str, t: Tensor, plates: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of constant data are named by the one plate that has their size, if only one has."""
    dims: list[str] = []
    for i, size in enumerate(t.shape):
        fitting = [plate for plate, n in plates.items() if n == size]
        known = len(fitting) == 1 and fitting[0] not in dims
        dims.append(fitting[0] if known else f"{name}_dim_{i}")
    return tuple(dims)
