"""Groups of latents that may be independent given the others: plates, loops and long axes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flowvi.targets.target import Target

# Column of a unit that has fewer latents than others.
NOTHING = -1
# Between the names of several plates.
SEVERAL = ", "


class Group(NamedTuple):
    """Latents that stand along one axis.

    Attributes:
        name: Name of the axis: a plate, or a dim of the site.
        sites: Names of the sites.
        columns: Columns of z, (G, d): those of each of G units; `NOTHING` where there are fewer.
        names: Names of the units, if these are units of several plates.
    """

    name: str
    sites: tuple[str, ...]
    columns: Tensor
    names: tuple[str, ...] = ()

    def name_of(self, unit: int) -> str:
        """Name of a unit: "group[17]"."""
        return self.names[unit] if self.names else f"{self.name}[{unit}]"

    def latents(self, units: Tensor | None = None) -> Tensor:
        """Columns of all units, or of some: a mask or indices."""
        columns = (self.columns if units is None else self.columns[units]).flatten()
        return columns[columns != NOTHING]


def groups(target: Target) -> list[Group]:
    """Groups of latents of a target, the largest first.

    Proposed are the plates and loops (`for i in pyro.plate`) that contain latents, all sites
    with an axis of one size, and each long axis by itself.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name in target.slices:
        for label, columns in _axes(target, name):
            found.setdefault(label, {})[name] = columns
    for label, site, columns in _loops(target):
        found.setdefault(label, {})[site] = columns
    by_size: dict[int, dict[str, Tensor]] = {}
    for parts in found.values():
        for name, columns in parts.items():
            by_size.setdefault(len(columns), {}).setdefault(name, columns)
    whole = [Group(label, tuple(parts), _side_by_side(parts)) for label, parts in found.items()]
    for parts in by_size.values():
        label = next(label for label, some in found.items() if set(some) & set(parts))
        whole.append(Group(label, tuple(parts), _side_by_side(parts)))
    for label, parts in found.items():
        whole += [Group(label, (name,), columns) for name, columns in parts.items()]
    distinct: dict[tuple[int, ...], Group] = {}
    for group in whole:
        if len(group.columns) > 1 and group.columns.unique().numel() == group.columns.numel():
            distinct.setdefault(tuple(group.columns.flatten().tolist()), group)
    return sorted(distinct.values(), key=lambda g: (-g.columns.numel(), -len(g.columns)))


def _axes(target: Target, name: str) -> Iterator[tuple[str, Tensor]]:
    """Axes of a site's unconstrained value, each with the columns of its elements, (G, d)."""
    part, site = target.slices[name], target.sites[name]
    columns = torch.arange(part.start, part.stop)
    batch = len(site.shape) - site.support.event_dim
    if columns.numel() == math.prod(site.shape):
        shape: tuple[int, ...] = tuple(site.shape)
    else:
        shape = (*site.shape[:batch], -1)
        batch = min(batch, len(shape) - 1)
    if 0 in shape or not columns.numel():
        return
    grid = columns.reshape(shape)
    labels = target.dims.get(name, ())
    for axis in range(len(site.shape) if -1 not in shape else batch):
        label = labels[axis] if axis < len(labels) else f"{name}_dim_{axis}"
        yield label, grid.movedim(axis, 0).reshape(grid.shape[axis], -1)


def _loops(target: Target) -> Iterator[tuple[str, str, Tensor]]:
    """Sites of sequential plates: a unit for each pass of the loop."""
    passes: dict[str, dict[int, list[Tensor]]] = {}
    names: dict[str, list[str]] = {}
    for name, part in target.slices.items():
        message = target.messages.get(name, {})
        for frame in message.get("cond_indep_stack", ()):
            if not frame.vectorized:
                columns = torch.arange(part.start, part.stop)
                passes.setdefault(frame.name, {}).setdefault(frame.counter, []).append(columns)
                names.setdefault(frame.name, []).append(name)
    for plate, units in passes.items():
        rows = [torch.cat(units[counter]) for counter in sorted(units)]
        if len({len(row) for row in rows}) == 1:
            yield plate, ", ".join(names[plate][:1]), torch.stack(rows)


def _side_by_side(parts: dict[str, Tensor]) -> Tensor:
    """Columns of several sites, (G, d_1 + ... + d_n); none if their numbers of units differ."""
    if len({len(columns) for columns in parts.values()}) > 1:
        return torch.empty(0, 0, dtype=torch.long)
    return torch.cat(list(parts.values()), 1)
