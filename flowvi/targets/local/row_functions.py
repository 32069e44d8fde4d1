"""The functions of one row of a Pyro model that are recorded: density, values and inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from flowvi.targets.local.runner import LatentsFromRows, RowRunner
from flowvi.targets.local.sites import RowSites
from flowvi.targets.pyro import checks, enumeration
from flowvi.targets.pyro.discrete import JointValues
from flowvi.targets.pyro.handlers import FromVector, ToVector
from flowvi.targets.schema import ModelError
from flowvi.targets.vectors import split


class RowFunctionsOfModel:
    """Functions of the latent vector of a row, (D).

    Each takes after it the latents that all rows share (if there are any), the parameters of
    the model, and the data of the row.

    Args:
        rows: Runs the model on rows.
        sites: Its sites.
    """

    def __init__(self, rows: RowRunner, sites: RowSites) -> None:
        self.rows, self.sites = rows, sites
        self.own = list(rows.runner.parameters.leaves.values())

    def log_prob(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """Log density of the row and its latents, ()."""
        return self.terms(z, *inputs).sum()

    def terms(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """Log likelihood, and log prior of z with its Jacobian, (2)."""
        trace, handler = self.trace(z, inputs)
        local = [s for s in checks.sites_with_density(trace) if self.sites.is_local(s)]
        if self.sites.local.enumerated:
            rest = [
                s["log_prob_sum"]
                for s in checks.sites_with_density(trace)
                if not self.sites.is_local(s)
            ]
            total = enumeration.log_joint(trace) - sum(rest) + handler.ladj
            return torch.stack([total, 0.0 * handler.ladj])
        prior = [s["log_prob_sum"] for s in local if self.sites.is_prior(s)]
        likelihood = [s["log_prob_sum"] for s in local if not self.sites.is_prior(s)]
        return torch.stack(
            [sum(likelihood, 0.0 * handler.ladj), sum(prior[1:], prior[0]) + handler.ladj]
        )

    def together(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """The terms of many rows at once, (R, D) -> (R, 2)."""
        theta, own, _ = self._parts(inputs)
        data = inputs[len(theta) + len(own) :]
        handler = LatentsFromRows(z, self.sites.local, self.sites.axes)
        trace = self.rows.trace(both(handler, self.from_theta(theta)), data, own)
        prior, likelihood = handler.ladj, torch.zeros_like(handler.ladj)
        for site in checks.sites_with_density(trace):
            if self.sites.is_local(site):
                frame = next(f for f in site["cond_indep_stack"] if f.name == self.sites.plate)
                rows = site["log_prob"].movedim(frame.dim, 0)
                if len(rows) != len(z):
                    raise ModelError(f"Site '{site['name']}' has {len(rows)} densities.")
                rows = rows.reshape(len(z), -1).sum(-1)
                if self.sites.is_prior(site):
                    prior = prior + rows
                else:
                    likelihood = likelihood + rows
        return torch.stack([likelihood, prior], -1)

    def values(self, z: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        """Latents and deterministics of the row, by name."""
        trace, _ = self.trace(z, inputs)
        names = [*self.sites.local.sites, *self.sites.deterministics]
        values = {n: torch.as_tensor(trace.nodes[n]["value"]) for n in names}
        return {n: v.select(self.sites.axes[n], 0) for n, v in values.items()}

    def latents(self, z: Tensor, *inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of the latents of the row, and the log Jacobians of the maps to them."""
        trace, handler = self.trace(z, inputs)
        axes = {name: self.sites.axes[name] for name in self.sites.local.sites}
        values = {n: trace.nodes[n]["value"].select(axis, 0) for n, axis in axes.items()}
        ladjs = {n: handler.ladjs[n].select(axis, 0) for n, axis in axes.items()}
        return values, ladjs

    def inverse(self, flat: Tensor, *inputs: Tensor) -> Tensor:
        """The latent vector of flattened values of the latents, (D)."""
        local = self.sites.local
        handler = ToVector(split(flat, local.sites, local.dtypes))
        theta, own, data = self._parts(inputs)
        self.run(both(handler, self.from_theta(theta)), data, own)
        return torch.cat([handler.pieces[name] for name in local.sites])

    def flat(self, z: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Flattened values of the latents of a latent vector."""
        with torch.no_grad():
            values = self.values(z, *inputs)
        return torch.cat([values[name].reshape(-1) for name in self.sites.local.sites])

    def trace(self, z: Tensor, inputs: Sequence[Tensor]) -> tuple[poutine.Trace, FromVector]:
        """A scored run on one row, and the handler that served its latents."""
        theta, own, data = self._parts(inputs)
        handler = self.from_z(z)
        trace = self.run(both(handler, self.from_theta(theta)), data, own)
        return trace, handler

    def run(self, handler: Any, data: Sequence[Tensor], own: Sequence[Tensor]) -> poutine.Trace:
        """A scored run on some rows; discrete sites have an axis for all their values."""
        return self.rows.trace(handler, data, own, self.enumerate_from())

    def from_z(self, z: Tensor) -> FromVector:
        """Serves the latents of the row."""
        local = self.sites.local
        return FromVector(z, local.slices, local.shapes, local.dtypes)

    def from_theta(self, theta: Sequence[Tensor]) -> FromVector | None:
        """Serves the latents that all rows share, if there are any."""
        common = self.sites.common
        if common is None:
            return None
        return FromVector(theta[0], common.slices, common.shapes, common.dtypes)

    def enumerate_from(self) -> int | None:
        """The first axis for values of discrete sites; None if no site is discrete."""
        local = self.sites.local
        return -1 - local.nesting if local.enumerated else None

    def check_sum(self, z: Tensor, inputs: Sequence[Tensor]) -> None:
        """Compare the terms of the sum over discrete sites with runs in which they have a value."""
        theta, own, data = self._parts(inputs)
        places = JointValues.of(self.sites.first.nodes, self.sites.local.enumerated)
        runs = {}
        for row in places.some(1, seed=0) if places.shapes else ():
            at: Mapping[str, Tensor] = places.split(row)
            with torch.no_grad():
                for axes in (self.enumerate_from(), None):
                    handler = both(self.from_z(z), self.from_theta(theta))
                    fixed = at if axes is None else None
                    runs[axes] = self.rows.trace(handler, data, own, axes, fixed)
            enumeration.compare(runs[self.enumerate_from()], runs[None], at)

    def _parts(
        self, inputs: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], list[Tensor]]:
        """Theta if there is one, parameters, and data as a batch of one row."""
        n = 1 if self.sites.common else 0
        own = inputs[n : n + len(self.own)]
        return inputs[:n], own, [t.unsqueeze(0) for t in inputs[n + len(self.own) :]]


def both(first: Any, second: Any) -> Any:
    """Two handlers as one."""
    if second is None:
        return first

    def handler(model: Any) -> Any:
        return first(second(model))

    return handler


def only_row(data: Sequence[Tensor]) -> list[Tensor]:
    """The data of a batch of one row, without the axis of the batch."""
    return [t[0] for t in data]
