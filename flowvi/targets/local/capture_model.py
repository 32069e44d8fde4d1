"""Capture a Pyro model with local latents as the log densities of its rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from flowvi.runtime.rng import own_randomness
from flowvi.targets.local.rows import Batch
from flowvi.targets.local.runner import TOGETHER, FromRows, Rows
from flowvi.targets.local.schema import LocalFacts, RowFunctions
from flowvi.targets.local.target import LocalTarget
from flowvi.targets.pyro import checks, data_checks, enumeration
from flowvi.targets.pyro.bijections import bijection_of
from flowvi.targets.pyro.discrete import Places
from flowvi.targets.pyro.handlers import FromVector, ToVector, is_reparametrised
from flowvi.targets.pyro.layout import Layout, layout_of
from flowvi.targets.pyro.rerun import rerunner
from flowvi.targets.pyro.runner import Runner
from flowvi.targets.recording.batched import Batched
from flowvi.targets.recording.capture import Trial, agree, capture, capture_values
from flowvi.targets.recording.program import Density
from flowvi.targets.schema import Facts, Functions, ModelError, Site
from flowvi.targets.target import Target
from flowvi.targets.vectors import finite_points, nearby, split

RUNS = 3
# Rows among which latents without a prior are looked for.
ROWS = 1000


def from_local_model(
    runner: Runner, name: str, plate: str, again: Callable[[str, Runner], Target]
) -> LocalTarget:
    """Capture a model whose sites in a plate are local.

    Args:
        runner: The model with its arguments, all rows of them.
        name: What to call it.
        plate: Name of the plate.
        again: Captures the model with all its latents in one vector, on other arguments.

    Raises:
        ModelError: There is no such plate, or its rows do not stand for themselves.
    """

    def scored(runner: Runner) -> None:
        Rows.of(runner, name, plate).scored()

    runner = runner.in_precision(runner.dtype, scored)
    rows = Rows.of(runner, name, plate)
    return _LocalCapture(rows, name, plate, functools.partial(again, name)).target()


class _LocalCapture:
    """One model with local latents on its way to a target."""

    def __init__(
        self, rows: Rows, name: str, plate: str, again: Callable[[Runner], Target]
    ) -> None:
        self.rows, self.name, self.plate, self.again = rows, name, plate, again
        self.first_row = rows.arguments.batch([0]).data
        try:
            with pyro.get_param_store().scope():
                runs = [rows.prior(self.first_row, validate=i == 0) for i in range(RUNS)]
        except ModelError:
            raise
        except (ValueError, RuntimeError) as error:
            why = str(error).split("\n")[0]
            raise ModelError(
                f"{name} runs on several rows of plate '{plate}' and fails on one: {why} Rows have "
                "to stand for themselves; put modules with batch norm into evaluation mode "
                "(.eval()), or use layer norm."
            ) from error
        self.traces = [trace for trace, _ in runs]
        self.first, self.data = runs[0]
        checks.same_structure(self.traces)
        latents = checks.latent_sites(self.first, name)
        local = {n: s for n, s in latents.items() if self._is_local(s)}
        if not local:
            raise ModelError(
                f"local='{plate}': {name} has no latent site in that plate; its latents are "
                f"{', '.join(latents)}. Leave local out."
            )
        self.local = layout_of(self.first, local)
        common = {n: s for n, s in latents.items() if n not in local}
        self.common: Layout | None = layout_of(self.first, common) if common else None
        self.own = rows.runner.parameters.leaves
        valued = [site for site in checks.valued(self.first) if self._is_local(site)]
        self.axes = {site["name"]: self._axis(site) for site in valued}
        data_checks.observations(self.first, self.data)
        data_checks.score(self.first)
        some = rows.arguments.batch(range(min(rows.arguments.size, ROWS)))
        with own_randomness(0):
            masked = checks.masked_latents(rows.prior(some.data, validate=False)[0])
        for site in self.local.sites:
            if site in masked:
                raise ModelError(masked[site])

    def target(self) -> LocalTarget:
        """Find points, capture the densities and put the target together."""
        others = self.rows.arguments.batch([min(1, self.rows.arguments.size - 1)]).data
        points, thetas = self._points()
        own = list(self.own.values())
        inputs = [
            [*theta, *own, *_one(data)]
            for theta, data in zip(thetas[:2] * 2, (self.first_row, others), strict=False)
        ]
        for theta in inputs:
            if self.common:
                theta[0].requires_grad_()
        trial = Trial(points, inputs[0], inputs[1:])
        if self.local.enumerated:
            self._check_sum(points[0], inputs[0])
        whole_row = capture(self._log_prob, trial, self.name, double=False)
        parts = not self.local.enumerated
        terms = capture_values(self._terms, trial, whole_row)
        values = capture_values(self._values, trial, whole_row)
        flat = torch.stack([self._flat(p, inputs[0]) for p in points])
        inverse = capture_values(self._inverse, Trial(flat, trial.inputs), whole_row)
        shared = self._shared(thetas, own)

        @functools.cache
        def latents() -> Batched:
            return capture_values(self._latents, trial, whole_row)

        target = LocalTarget(
            LocalFacts(
                self.name,
                self.plate,
                {n: self._row_site(n) for n in self.local.sites},
                self.local.slices,
                self._deterministics(),
                tuple(n for n in self.data if n in self.axes),
                {n: self._row_dims(n) for n in self.axes},
                self.rows.arguments,
                parts,
                self._columns(),
                self.local.latents,
                self.rows.runner.parameters.supports,
            ),
            RowFunctions(
                terms,
                values,
                inverse,
                self._simulate,
                self._observed,
                None if self.local.enumerated else self._together,
                latents,
                self.rows.called,
            ),
            shared,
            self.own,
        )
        self._check_rows(target, points, thetas[0])
        return target

    # The functions of one row that are recorded.

    def _log_prob(self, z: Tensor, *inputs: Tensor) -> Tensor:
        return self._terms(z, *inputs).sum()

    def _terms(self, z: Tensor, *inputs: Tensor) -> Tensor:
        trace, handler = self._trace(z, inputs)
        local = [s for s in checks.scored(trace) if self._is_local(s)]
        if self.local.enumerated:
            rest = [s["log_prob_sum"] for s in checks.scored(trace) if not self._is_local(s)]
            total = enumeration.log_joint(trace) - sum(rest) + handler.ladj
            return torch.stack([total, 0.0 * handler.ladj])
        prior = [s["log_prob_sum"] for s in local if self._is_prior(s)]
        likelihood = [s["log_prob_sum"] for s in local if not self._is_prior(s)]
        return torch.stack(
            [sum(likelihood, 0.0 * handler.ladj), sum(prior[1:], prior[0]) + handler.ladj]
        )

    def _together(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """The terms of many rows at once, (R, D) -> (R, 2)."""
        theta, own, _ = self._taken(inputs)
        data = inputs[len(theta) + len(own) :]
        handler = FromRows(z, self.local, self.axes)
        trace = self.rows.trace(_both(handler, self._from_theta(theta)), data, own)
        prior, likelihood = handler.ladj, torch.zeros_like(handler.ladj)
        for site in checks.scored(trace):
            if self._is_local(site):
                frame = next(f for f in site["cond_indep_stack"] if f.name == self.plate)
                rows = site["log_prob"].movedim(frame.dim, 0)
                if len(rows) != len(z):
                    raise ModelError(f"Site '{site['name']}' has {len(rows)} densities.")
                rows = rows.reshape(len(z), -1).sum(-1)
                if self._is_prior(site):
                    prior = prior + rows
                else:
                    likelihood = likelihood + rows
        return torch.stack([likelihood, prior], -1)

    def _values(self, z: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        trace, _ = self._trace(z, inputs)
        names = [*self.local.sites, *self._deterministics()]
        values = {n: torch.as_tensor(trace.nodes[n]["value"]) for n in names}
        return {n: v.select(self.axes[n], 0) for n, v in values.items()}

    def _latents(self, z: Tensor, *inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        trace, handler = self._trace(z, inputs)
        values = {n: trace.nodes[n]["value"].select(self.axes[n], 0) for n in self.local.sites}
        ladjs = {n: handler.ladjs[n].select(self.axes[n], 0) for n in self.local.sites}
        return values, ladjs

    def _inverse(self, flat: Tensor, *inputs: Tensor) -> Tensor:
        handler = ToVector(split(flat, self.local.sites, self.local.dtypes))
        theta, own, data = self._taken(inputs)
        self.rows.trace(_both(handler, self._from_theta(theta)), data, own, self._from())
        return torch.cat([handler.pieces[name] for name in self.local.sites])

    def _common_prior(self, theta: Tensor, *own: Tensor) -> Tensor:
        handler = self._from_theta([theta])
        assert handler is not None and self.common is not None
        z = torch.zeros(max(s.stop for s in self.local.slices.values())).to(theta)
        trace = self.rows.trace(_both(self._from_z(z), handler), self.first_row, own, self._from())
        terms = [s["log_prob_sum"] for s in checks.scored(trace) if not self._is_local(s)]
        return sum(terms[1:], terms[0]) + handler.ladj

    def _common_values(self, theta: Tensor, *own: Tensor) -> dict[str, Tensor]:
        assert self.common is not None
        trace, _ = self._trace(
            torch.zeros_like(self._z(self.first)), [theta, *own, *_one(self.first_row)]
        )
        names = [*self.common.sites, *self._common_deterministics()]
        return {n: torch.as_tensor(trace.nodes[n]["value"]) for n in names}

    def _common_inverse(self, flat: Tensor, *own: Tensor) -> Tensor:
        assert self.common is not None
        handler = ToVector(split(flat, self.common.sites, self.common.dtypes))
        z = self._from_z(torch.zeros_like(self._z(self.first)))
        self.rows.trace(_both(handler, z), self.first_row, own, self._from())
        return torch.cat([handler.pieces[name] for name in self.common.sites])

    def _trace(self, z: Tensor, inputs: Sequence[Tensor]) -> tuple[poutine.Trace, FromVector]:
        theta, own, data = self._taken(inputs)
        handler = self._from_z(z)
        trace = self.rows.trace(_both(handler, self._from_theta(theta)), data, own, self._from())
        return trace, handler

    def _taken(
        self, inputs: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], list[Tensor]]:
        """Theta if there is one, parameters, and data as a batch of one row."""
        n = 1 if self.common else 0
        own = inputs[n : n + len(self.own)]
        return inputs[:n], own, [t.unsqueeze(0) for t in inputs[n + len(self.own) :]]

    def _from_z(self, z: Tensor) -> FromVector:
        return FromVector(z, self.local.slices, self.local.shapes, self.local.dtypes)

    def _from_theta(self, theta: Sequence[Tensor]) -> FromVector | None:
        if self.common is None:
            return None
        return FromVector(theta[0], self.common.slices, self.common.shapes, self.common.dtypes)

    def _from(self) -> int | None:
        return -1 - self.local.nesting if self.local.enumerated else None

    def _check_sum(self, z: Tensor, inputs: Sequence[Tensor]) -> None:
        """Compare the terms of the sum over discrete sites with runs in which they have a value."""
        theta, own, data = self._taken(inputs)
        places = Places.of(self.first.nodes, self.local.enumerated)
        runs = {}
        for row in places.some(1, seed=0) if places.shapes else ():
            at = places.split(row)
            with torch.no_grad():
                for axes in (self._from(), None):
                    handler = _both(self._from_z(z), self._from_theta(theta))
                    given = at if axes is None else None
                    runs[axes] = self.rows.trace(handler, data, own, axes, given)
            enumeration.compare(runs[self._from()], runs[None], at)

    # Facts.

    def _is_local(self, site: Mapping[str, Any]) -> bool:
        return any(f.name == self.plate for f in site.get("cond_indep_stack", ()))

    def _is_prior(self, site: Mapping[str, Any]) -> bool:
        """Whether a density is a latent's, or was left with the site that it was made from."""
        return site["name"] in self.local.sites or is_reparametrised(site)

    def _axis(self, site: Mapping[str, Any]) -> int:
        """The axis of the plate in a site's value, from the left."""
        frame = next(f for f in site["cond_indep_stack"] if f.name == self.plate)
        value = torch.as_tensor(site["value"])
        if frame.dim is None:
            raise ModelError(
                f"Plate '{self.plate}' is looped over; write `with pyro.plate(...)` instead."
            )
        axis = value.dim() - site["fn"].event_dim + frame.dim
        if axis < 0 and value.dim() and site["infer"].get("_deterministic"):
            axis = 0  # every axis of a pyro.deterministic belongs to its event, unless told
        if axis < 0 or (value.dim() and value.shape[axis] != 1):
            raise ModelError(
                f"Site '{site['name']}' has no axis for plate '{self.plate}': its value has shape "
                f"{tuple(value.shape)} for one row. Give it one entry a row."
            )
        return axis

    def _deterministics(self) -> tuple[str, ...]:
        return tuple(n for n in self.local.deterministics if n in self.axes)

    def _common_deterministics(self) -> tuple[str, ...]:
        return tuple(n for n in self.local.deterministics if n not in self.axes)

    def _row_site(self, name: str) -> Site:
        site = self.local.sites[name]
        axis = self.axes[name]
        shape = (*site.shape[:axis], *site.shape[axis + 1 :])
        return Site(shape, site.support, self._row_dims(name))

    def _row_dims(self, name: str) -> tuple[str, ...]:
        value = self.first.nodes[name]["value"]
        dims = self.local.dims.get(name) or tuple(f"{name}_dim_{i}" for i in range(value.dim()))
        axis = self.axes[name]
        return (*dims[:axis], *dims[axis + 1 :])

    def _z(self, trace: poutine.Trace) -> Tensor:
        return _unconstrained(trace, self.local)

    def _flat(self, z: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            values = self._values(z, *inputs)
        return torch.cat([values[name].reshape(-1) for name in self.local.sites])

    def _points(self) -> tuple[Tensor, list[list[Tensor]]]:
        """Points of finite density: latent vectors (P, D), and theta for each."""
        width = max(s.stop for s in self.local.slices.values())
        draws = []
        for trace in self.traces:
            parts = [self._z(trace)]
            if self.common:
                parts.append(_unconstrained(trace, self.common))
            draws.append(torch.cat(parts))

        def is_finite(both: Tensor) -> bool:
            theta = [both[width:]] if self.common else []
            own = list(self.own.values())
            return bool(
                self._log_prob(both[:width], *theta, *own, *_one(self.first_row)).isfinite()
            )

        points = finite_points(iter([*draws, *nearby(draws[0])]), is_finite)
        if points is None:
            raise ModelError(
                f"The log density of the first row of {self.name} is not finite at any starting "
                "point. Check the scale of the data against the prior."
            )
        thetas = [[p[width:].clone()] if self.common else [] for p in points]
        return points[:, :width].clone(), thetas

    def _shared(self, thetas: list[list[Tensor]], own: Sequence[Tensor]) -> Target | None:
        """The prior of the latents that all rows share, as a target of its own."""
        layout = self.common
        if layout is None:
            return None
        trial = Trial(torch.stack([t[0].detach() for t in thetas]), own)
        batched = capture(self._common_prior, trial, self.name, double=False)
        names = [*layout.sites, *self._common_deterministics()]
        facts = Facts(
            self.name,
            layout.sites,
            layout.slices,
            self._common_deterministics(),
            dims={name: layout.dims[name] for name in names},
            improper=layout.improper,
        )
        # There are no draws of the latents of rows: other rows draw their own.
        rerun = rerunner(self.rows.runner, layout, self.again)
        functions = Functions(self._common_values, self._common_inverse, rerun=rerun)
        return Target(facts, Density(batched, frozen=not own), functions, trial, self.own)

    def _columns(self) -> dict[str, int]:
        """Which of the data each observed site has as its values."""
        arguments = self.rows.arguments
        batch = arguments.batch(range(min(TOGETHER, arguments.size)))
        found: dict[str, int] = {}
        for name, value in self._observed(batch).items():
            for i, t in enumerate(batch.data):
                if t.shape == value.shape and torch.equal(t.to(value.dtype), value):
                    found.setdefault(name, i)
        return found

    def _observed(self, batch: Batch) -> dict[str, Tensor]:
        with own_randomness(0):
            _, data = self.rows.prior(batch.data, validate=False)
        local = {name: value for name, value in data.items() if name in self.axes}
        return {name: value.movedim(self.axes[name], 0) for name, value in local.items()}

    def _simulate(
        self,
        values: Mapping[str, Tensor] | None,
        batch: Batch,
        theta: Tensor | None,
        seed: int,
    ) -> dict[str, np.ndarray]:
        """Draw all rows of a batch at once: their data, and latents that are not given."""
        count = len(batch.places)
        given: dict[str, Tensor] = {}
        if values is not None:
            for name, value in values.items():
                given[name] = value.movedim(0, self.axes[name])
        if theta is not None and self.common is not None:
            with torch.no_grad():
                given |= self._common_values(theta, *self.own.values())
            given = {n: v for n, v in given.items() if n not in self._common_deterministics()}
        with own_randomness(seed), torch.no_grad():
            trace = self.rows.simulate(given, batch.data)
        wanted = (
            [*self.data]
            if values is not None
            else [*self.local.sites, *self._deterministics(), *self.data]
        )
        out = {}
        for name in wanted:
            if name in self.axes:
                value = torch.as_tensor(trace.nodes[name]["value"])
                out[name] = value.movedim(self.axes[name], 0)
                if len(out[name]) != count:
                    raise ModelError(f"Site '{name}' has {len(out[name])} values for {count} rows.")
        return {name: value.cpu().numpy() for name, value in out.items()}

    def _check_rows(self, target: LocalTarget, points: Tensor, theta: list[Tensor]) -> None:
        """Compare a few rows at once, as the model itself scores them, with rows one by one."""
        few = min(TOGETHER, self.rows.arguments.size)
        if few < 2:
            return
        batch = target.batch(range(few))
        z = torch.stack([points[i % len(points)] for i in range(few)])
        shared = theta[0].detach() if theta else None
        with torch.no_grad():
            values = target.constrain(z, batch, shared)
            alone = target.log_prob(z, batch, shared).sum()
            ladj = torch.zeros(())
            for i in range(few):
                inputs = [
                    *([shared] if shared is not None else []),
                    *self.own.values(),
                    *[t[i] for t in batch.data],
                ]
                ladj = ladj + self._trace(z[i], inputs)[1].ladj
            given = {n: values[n].movedim(0, self.axes[n]) for n in self.local.sites}
            if shared is not None and target.shared is not None and self.common is not None:
                common = self._common_values(shared, *self.own.values())
                given |= {n: common[n] for n in self.common.sites}
                alone = alone + target.shared.log_prob(shared)
                ladj = ladj + self._from_theta_ladj(shared)
            try:
                trace = self.rows.trace(
                    ToVector(given), batch.data, list(self.own.values()), self._from()
                )
            except (ValueError, RuntimeError) as error:
                raise ModelError(
                    f"{self.name} fails on {few} rows of plate '{self.plate}' at once: {error}"
                ) from error
            if self.local.enumerated:
                together = enumeration.log_joint(trace) + ladj
            else:
                together = ladj + sum(s["log_prob_sum"] for s in checks.scored(trace))
        if not agree((torch.as_tensor(together),), (alone,)):
            raise ModelError(
                f"The rows of plate '{self.plate}' do not stand for themselves: the log density of "
                f"{few} rows at once is {float(together):.6g}, and the sum of theirs one by one "
                f"{float(alone):.6g}. A local latent needs rows that are independent given the "
                "shared latents: no batch norm, no site that mixes rows, and data whose first "
                f"axis is the plate's ({self.rows.arguments.size} rows)."
            )

    def _from_theta_ladj(self, theta: Tensor) -> Tensor:
        z = torch.zeros_like(self._z(self.first))
        handler = self._from_theta([theta])
        assert handler is not None
        self.rows.trace(
            _both(self._from_z(z), handler), self.first_row, list(self.own.values()), self._from()
        )
        return handler.ladj


def _both(first: Any, second: Any) -> Any:
    """Two handlers as one."""
    if second is None:
        return first

    def handler(model: Any) -> Any:
        return first(second(model))

    return handler


def _one(data: Sequence[Tensor]) -> list[Tensor]:
    """The data of a batch of one row, without the axis of the batch."""
    return [t[0] for t in data]


def _unconstrained(trace: poutine.Trace, layout: Layout) -> Tensor:
    sites = [trace.nodes[name] for name in layout.latents]
    return torch.cat([bijection_of(s["fn"]).inv(s["value"]).reshape(-1) for s in sites])
