"""Capture a Pyro model with local latents as the log densities of its rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from flowvi.runtime.rng import isolated_rng
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.local.row_checks import check_rows
from flowvi.targets.local.row_functions import RowFunctionsOfModel, only_row
from flowvi.targets.local.rows import Batch
from flowvi.targets.local.runner import TOGETHER, RowRunner
from flowvi.targets.local.schema import LocalFacts, RowFunctions
from flowvi.targets.local.shared_prior import SharedPrior
from flowvi.targets.local.sites import RowSites, unconstrained
from flowvi.targets.local.target import LocalTarget
from flowvi.targets.pyro.runner import Runner
from flowvi.targets.recording.batched import Batched
from flowvi.targets.recording.capture import Trial, capture, capture_values
from flowvi.targets.schema import ModelError
from flowvi.targets.vectors import finite_points, nearby


def from_local_model(
    runner: Runner, name: str, plate: str, again: Callable[[str, Runner], GlobalTarget]
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
        RowRunner.of(runner, name, plate).run_and_score()

    runner = runner.in_precision(runner.dtype, scored)
    rows = RowRunner.of(runner, name, plate)
    return _LocalCapture(rows, name, plate, functools.partial(again, name)).target()


class _LocalCapture:
    """One model with local latents on its way to a target."""

    def __init__(
        self, rows: RowRunner, name: str, plate: str, again: Callable[[Runner], GlobalTarget]
    ) -> None:
        self.rows, self.name, self.again = rows, name, again
        self.sites = RowSites(rows, name, plate)
        self.functions = RowFunctionsOfModel(rows, self.sites)
        common = self.sites.common
        self.prior = SharedPrior(self.functions, common) if common else None

    def target(self) -> LocalTarget:
        """Find points, capture the densities and put the target together."""
        points, thetas = self._points()
        trial = self._trial(points, thetas)
        if self.sites.local.enumerated:
            self.functions.check_sum(points[0], trial.inputs)
        row_functions = self._recorded(trial)
        prior, shared = self.prior, None
        if prior is not None:
            shared = prior.target(self.name, [t[0] for t in thetas], self.again)
        parameters = self.rows.runner.parameters.leaves
        target = LocalTarget(self._facts(), row_functions, shared, parameters)
        check_rows(target, self.functions, prior, points, thetas[0])
        return target

    def _recorded(self, trial: Trial) -> RowFunctions:
        """Functions of one row, each recorded and checked at the points of a trial."""
        found = self.functions
        whole_row = capture(found.log_prob, trial, self.name, double=False)
        flat = torch.stack([found.flat(p, trial.inputs) for p in trial.points])

        @functools.cache
        def latents() -> Batched:
            return capture_values(found.latents, trial, whole_row)

        return RowFunctions(
            capture_values(found.terms, trial, whole_row),
            capture_values(found.values, trial, whole_row),
            capture_values(found.inverse, Trial(flat, trial.inputs), whole_row),
            self._simulate,
            self._observed,
            None if self.sites.local.enumerated else found.together,
            latents,
            self.rows.called,
        )

    def _facts(self) -> LocalFacts:
        sites = self.sites
        return LocalFacts(
            self.name,
            sites.plate,
            {n: sites.row_site(n) for n in sites.local.sites},
            sites.local.slices,
            sites.deterministics,
            tuple(n for n in sites.data if n in sites.axes),
            {n: sites.row_dims(n) for n in sites.axes},
            self.rows.arguments,
            not sites.local.enumerated,
            self._columns(),
            sites.local.latents,
            self.rows.runner.parameters.supports,
        )

    def _points(self) -> tuple[Tensor, list[list[Tensor]]]:
        """Points of finite density: latent vectors (P, D), and theta for each."""
        sites, width = self.sites, self.sites.dim
        draws = []
        for trace in sites.traces:
            parts = [unconstrained(trace, sites.local)]
            if sites.common:
                parts.append(unconstrained(trace, sites.common))
            draws.append(torch.cat(parts))
        rest = [*self.functions.own, *only_row(sites.first_row)]

        def is_finite(both: Tensor) -> bool:
            theta = [both[width:]] if sites.common else []
            return bool(self.functions.log_prob(both[:width], *theta, *rest).isfinite())

        points = finite_points(iter([*draws, *nearby(draws[0])]), is_finite)
        if points is None:
            raise ModelError(
                f"The log density of the first row of {self.name} is not finite at any starting "
                "point. Check the scale of the data against the prior."
            )
        thetas = [[p[width:].clone()] if sites.common else [] for p in points]
        return points[:, :width].clone(), thetas

    def _trial(self, points: Tensor, thetas: list[list[Tensor]]) -> Trial:
        """Inputs to record with, and those of another row to compare with."""
        others = self.rows.arguments.batch([min(1, self.rows.arguments.size - 1)]).data
        inputs = [
            [*theta, *self.functions.own, *only_row(data)]
            for theta, data in zip(thetas[:2] * 2, (self.sites.first_row, others), strict=False)
        ]
        for theta in inputs:
            if self.sites.common:
                theta[0].requires_grad_()
        return Trial(points, inputs[0], inputs[1:])

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
        axes = self.sites.axes
        with isolated_rng(0):
            _, data = self.rows.prior(batch.data, validate=False)
        return {name: v.movedim(axes[name], 0) for name, v in data.items() if name in axes}

    def _simulate(
        self,
        values: Mapping[str, Tensor] | None,
        batch: Batch,
        theta: Tensor | None,
        seed: int,
    ) -> dict[str, np.ndarray]:
        """Draw all rows of a batch at once: their data, and latents that are not given."""
        count, sites = len(batch.places), self.sites
        fixed = {n: v.movedim(0, sites.axes[n]) for n, v in (values or {}).items()}
        if theta is not None and self.prior is not None:
            with torch.no_grad():
                common = self.prior.values(theta, *self.functions.own)
            derived = sites.common_deterministics
            fixed |= {n: v for n, v in common.items() if n not in derived}
        with isolated_rng(seed), torch.no_grad():
            trace = self.rows.simulate(fixed, batch.data)
        latents = [*sites.local.sites, *sites.deterministics] if values is None else []
        out = {}
        for name in [*latents, *sites.data]:
            if name in sites.axes:
                value = torch.as_tensor(trace.nodes[name]["value"])
                out[name] = value.movedim(sites.axes[name], 0)
                if len(out[name]) != count:
                    raise ModelError(f"Site '{name}' has {len(out[name])} values for {count} rows.")
        return {name: value.cpu().numpy() for name, value in out.items()}
