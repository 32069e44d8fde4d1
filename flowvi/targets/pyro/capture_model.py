"""Capture a Pyro model as a log density on R^D."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from flowvi.runtime.rng import isolated_rng
from flowvi.targets import subsampling
from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.pyro import checks, data_checks
from flowvi.targets.pyro.bijections import bijection_of
from flowvi.targets.pyro.handlers import FromVector, ToVector, isolated_param_store, observes
from flowvi.targets.pyro.layout import constant_dims, constants_of, dims_of, layout_of
from flowvi.targets.pyro.rerun import make_rerun
from flowvi.targets.pyro.runner import Runner
from flowvi.targets.pyro.simulate import JointDraws, simulator
from flowvi.targets.pyro.summation import Summation
from flowvi.targets.pyro.violations import violation
from flowvi.targets.recording.capture import Trial, agree, capture
from flowvi.targets.recording.program import CompiledDensity
from flowvi.targets.schema import Facts, Functions, ModelError, Simulator
from flowvi.targets.vectors import TRIES, finite_points, nearby, split

RUNS = 3


class PyroCapture:
    """One model on its way to a target."""

    def __init__(self, runner: Runner, name: str) -> None:
        self.runner, self.name = runner, name
        with isolated_param_store():
            runs = [runner.prior(validate=i == 0) for i in range(RUNS)]
        self.traces = [trace for trace, _ in runs]
        self.first, self.data = runs[0]
        checks.check_same_structure(self.traces)
        self.layout = layout_of(self.first, checks.latent_sites(self.first, name))
        if not any(shape.numel() for shape in self.layout.shapes.values()):
            raise ModelError(f"The latents of {name} have no elements: there is nothing to fit.")
        checks.check_subsampled_plates(self.first, runner.drawn)
        data_checks.check_observations(self.first, self.data)
        data_checks.check_scores(self.first)
        data_checks.check_site_shapes(self.first, self.layout.nesting, bool(self.layout.enumerated))
        _warn_if_data_are_missing(runner, self.data, name)
        self.parameters = runner.parameters.leaves
        self.summation = self._summation()
        self.reported = [*self.layout.sites, *self._deterministics()]

    def target(
        self, replace: bool = False, other: Mapping[str, Tensor] | None = None
    ) -> GlobalTarget:
        """Find points, capture the density and put the target together.

        Args:
            replace: Whether the observed values are to be inputs of the density.
            other: Tensors among the arguments that are to be inputs too, with other values.
        """
        batches = [list(batch.values()) for _, batch in subsampling.cover(self.runner.drawn)]
        inputs = [[*self.parameters.values(), *batch] for batch in batches]
        trial = Trial(self._points(inputs[0]), inputs[0], inputs[1:2])
        self._check_unread(trial)
        facts = self._facts()
        simulate = simulator(self.runner, self.layout, self.reported, list(self.data))
        joint = JointDraws(self.runner, self._unconstrained, list(self.data))
        data = dict(facts.observed) if replace else {}
        if replace:
            trial = self._with_data(trial, data, simulate, other or {})
        leaves = self.runner.leaves() if other else {}
        batched = capture(self._log_prob, trial, self.name)
        likelihood = self._log_likelihood if self._has_rows(trial) else None
        discrete = self._probabilities if self.summation else None
        again = make_rerun(self.runner, self.layout, partial(capture_runner, self.name))
        return GlobalTarget(
            facts,
            CompiledDensity(batched, frozen=not self.parameters),
            Functions(
                self._values,
                self._inverse,
                likelihood,
                simulate,
                self._latents,
                self._messages_as_given(),
                again,
                self._messages_with,
                discrete,
                lambda z: violation(self._trace(self._from_vector(z), trial.inputs)),
                self._log_prior if self._has_priors() else None,
                joint,
            ),
            trial,
            self.parameters,
            data,
            {name: leaves[name] for name in other or {}},
        )

    def _messages_as_given(self) -> Mapping[str, Any]:
        """Pyro's record of the latent sites in one run in the precision of the data as given."""
        if self.runner.precision is None:
            return self.layout.latents
        args, kwargs = self.runner.given
        try:
            found = self._messages_with(args, kwargs)
        except Exception:  # only in one precision do they go together
            return self.layout.latents
        return {name: found.get(name, site) for name, site in self.layout.latents.items()}

    def _messages_with(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
        """Pyro's record of the latent sites in one run with other arguments."""
        # As Pyro runs it, in the precision of these arguments.
        runner = replace(self.runner, args=args, kwargs=kwargs, drawn={}, precision=None)
        with isolated_rng(0), isolated_param_store():
            nodes = runner.prior(validate=False)[0].nodes
        return {name: nodes[name] for name in self.layout.latents if name in nodes}

    def _with_data(
        self,
        trial: Trial,
        data: Mapping[str, Tensor],
        simulate: Simulator,
        arguments: Mapping[str, Tensor],
    ) -> Trial:
        """The trial with the data as inputs, and with a simulated data set to compare as well."""
        drawn = {name: torch.as_tensor(v[0]) for name, v in simulate(None, 1, 0).items()}
        leaves = self.runner.leaves() if arguments else {}
        own = [leaves[name] for name in arguments]
        with torch.no_grad():
            before = [self._log_prob(z, *trial.inputs) for z in trial.points]
            self.runner.replaced, self.runner.varying = tuple(data), tuple(arguments)
            inputs = [*trial.inputs, *data.values(), *own]
            if self.summation:
                self.summation.prepare(trial.points[0], inputs, self._row_shapes())
            after = [self._log_prob(z, *inputs) for z in trial.points]
        fits = all(drawn[name].shape == like.shape for name, like in data.items())
        if not (fits and agree(before, after)):
            raise ModelError(
                f"The data of {self.name} cannot be replaced: given as they are by their sites' "
                "names, the density is another one, or simulated data have another shape."
            )
        other = [drawn[name].to(like) for name, like in data.items()]
        other += [arguments[name].to(like) for name, like in zip(arguments, own, strict=True)]
        return Trial(trial.points, inputs, [[*trial.inputs, *other]])

    # The functions of one point that are recorded.

    def _log_prob(self, z: Tensor, *inputs: Tensor) -> Tensor:
        if self.summation:
            return self.summation.log_density(z, inputs)
        handler = self._from_vector(z)
        trace = self._trace(handler, inputs)
        return _sum_of_sites(trace) + handler.ladj

    def _values(self, z: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        trace = self._trace(self._from_vector(z), inputs)
        # A deterministic value may not depend on z, or be a number.
        values = {name: torch.as_tensor(trace.nodes[name]["value"]) for name in self.reported}
        return self.layout.latent_elements(values)

    def _latents(self, z: Tensor, *inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        handler = self._from_vector(z)
        trace = self._trace(handler, inputs)
        return {name: trace.nodes[name]["value"] for name in self.layout.latents}, handler.ladjs

    def _inverse(self, flat: Tensor, *inputs: Tensor) -> Tensor:
        values = self.layout.all_elements(split(flat, self.layout.sites, self.layout.dtypes))
        handler = ToVector(values, self.layout.missing)
        self._trace(handler, inputs)
        return torch.cat([handler.pieces[name] for name in self.layout.latents])

    def _log_likelihood(self, z: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        if self.summation:
            return self.summation.log_likelihood(z, inputs, self._row_shapes())
        trace = self._trace(self._from_vector(z), inputs)
        return {
            site["name"]: scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
            for site in checks.sites_with_density(trace)
            if site["name"] in self.data
        }

    def _log_prior(self, z: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        trace = self._trace(self._from_vector(z), inputs)
        return {
            name: scale_and_mask(site["unscaled_log_prob"], site["scale"], site["mask"])
            for name in self.layout.latents
            if name not in self.layout.missing
            for site in [trace.nodes[name]]
        }

    def _has_priors(self) -> bool:
        """Whether no prior depends on a discrete site, which has several values at once."""
        with torch.no_grad():
            found = self._log_prior(self._unconstrained(self.first), *self._some_inputs())
        shapes = {name: self.first.nodes[name]["unscaled_log_prob"].shape for name in found}
        return not self.summation or all(found[name].shape == shapes[name] for name in found)

    def _probabilities(self, z: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        assert self.summation is not None
        return self.summation.probabilities(z, inputs)

    def _trace(
        self,
        handler: Any,
        inputs: Sequence[Tensor],
        places: Mapping[str, Tensor] | None = None,
        axes: bool = True,
    ) -> poutine.Trace:
        """A scored run.

        Args:
            handler: Serves the latents.
            inputs: What the model takes beside them.
            places: Values of discrete sites; without, those in the first term of their sum.
            axes: Whether the other discrete sites have an axis for all their values.
        """
        if places is None and self.summation:
            places = self.summation.first()
        enumerate_from = -1 - self.layout.nesting if axes and self.layout.enumerated else None
        trace, _ = self.runner.trace(handler, inputs, enumerate_from, places)
        checks.check_same_latents(trace, self.layout.latents)
        return trace

    def _from_vector(self, z: Tensor) -> FromVector:
        layout = self.layout
        return FromVector(z, layout.slices, layout.shapes, layout.dtypes, layout.missing)

    # Facts.

    def _summation(self) -> Summation | None:
        """How discrete sites are summed out, if there are any."""
        if not self.layout.enumerated:
            return None

        def run(
            z: Tensor, inputs: Sequence[Tensor], places: dict[str, Tensor], axes: bool
        ) -> tuple[poutine.Trace, Tensor]:
            handler = self._from_vector(z)
            return self._trace(handler, inputs, places, axes), handler.ladj

        summation = Summation(self.first, self.layout.enumerated, run)
        point, inputs = self._unconstrained(self.first), self._some_inputs()
        with torch.no_grad():
            moved = summation.values_that_vary(point, inputs, list(self.layout.latents))
            if moved:
                raise ModelError(
                    f"The support of site '{min(moved)}' depends on a discrete site that is summed "
                    "out: give it one support for all values."
                )
            summation.plan(point, inputs)
        summation.prepare(point, inputs, self._row_shapes())
        return summation

    def _some_inputs(self) -> list[Tensor]:
        """Parameters, and the first rows of subsampled plates."""
        batch = next(subsampling.cover(self.runner.drawn))[1]
        return [*self.parameters.values(), *batch.values()]

    def _deterministics(self) -> list[str]:
        """Derived values; those that depend on a discrete site have one for each of its values."""
        names = self.layout.deterministics
        if not (self.summation and names):
            return list(names)
        with torch.no_grad():
            moved = self.summation.values_that_vary(
                self._unconstrained(self.first), self._some_inputs(), names
            )
        return [name for name in names if name not in moved]

    def _row_shapes(self) -> dict[str, torch.Size]:
        return {name: self.first.nodes[name]["log_prob"].shape for name in self.data}

    def _has_rows(self, trial: Trial) -> bool:
        """Whether each row of the data has a log likelihood, and the log joint is their sum."""
        if not (self.data and self.summation):
            return bool(self.data)
        with torch.no_grad():
            return all(self._is_sum_of_rows(z, trial.inputs) for z in trial.points)

    def _is_sum_of_rows(self, z: Tensor, inputs: Sequence[Tensor]) -> bool:
        """Whether the sum over discrete sites is one for each row, as it is in a mixture.

        It is not where rows share a discrete site, or sites of one row do.
        """
        trace = self._trace(self._from_vector(z), inputs)
        scales = {site["name"]: site["scale"] for site in checks.sites_with_density(trace)}
        try:
            found = self._log_likelihood(z, *inputs)
        except RuntimeError:  # rows and discrete values have no common shape
            return False
        total = sum((scales[name] * value).sum() for name, value in found.items())
        rest = [
            site["log_prob_sum"]
            for site in checks.sites_with_density(trace)
            if not (observes(site) or checks.is_enumerated(site))
        ]
        handler = self._from_vector(z)
        self._trace(handler, inputs)
        return agree((total + sum(rest) + handler.ladj,), (self._log_prob(z, *inputs),))

    def _facts(self) -> Facts:
        layout = self.layout
        observed = self._all_data()
        taken = {**dict.fromkeys(self.reported), **observed}
        constants = constants_of(self.runner.arguments(), taken)
        dims = {name: layout.dims[name] for name in self.reported}
        # One number may be observed at all rows of a plate.
        dims |= {n: layout.dims[n][len(layout.dims[n]) - t.dim() :] for n, t in observed.items()}
        dims |= {name: constant_dims(name, t, layout.plates) for name, t in constants.items()}
        return Facts(
            self.name,
            layout.sites,
            layout.slices,
            tuple(self.reported[len(layout.sites) :]),
            observed,
            constants,
            dims,
            layout.improper,
            self.runner.drawn,
            dict(self.runner.parameters.supports),
            {name: dims_of(self.first.nodes[name]) for name in layout.enumerated},
            tuple(part for name, part in layout.missing.items() if name in layout.sites),
            checks.masked_latents(self.first),
        )

    def _all_data(self) -> dict[str, Tensor]:
        """Observed data of all rows, where the first run saw a batch of them."""
        pieces = []
        for _, batch in subsampling.cover(self.runner.drawn):
            with torch.no_grad():
                inputs = [*self.parameters.values(), *batch.values()]
                trace, data = self.runner.trace(self._at_prior(), inputs)
            data_checks.check_observations(trace, data)
            pieces.append((batch, {name: value.detach() for name, value in data.items()}))
        return subsampling.assemble(pieces, self.runner.drawn, self.layout.dims)

    def _at_prior(self) -> ToVector:
        return ToVector({name: site["value"] for name, site in self.layout.latents.items()})

    def _points(self, inputs: list[Tensor]) -> Tensor:
        """A few points at which the model's own density is finite: prior draws, or near zero."""
        last = [self.first]

        def is_finite(z: Tensor) -> bool:
            last[0] = self._trace(self._from_vector(z), inputs)
            if self.summation:
                # Some values of a discrete site may be impossible.
                return bool(self._log_prob(z, *inputs).isfinite())
            sums = (site["log_prob_sum"] for site in checks.sites_with_density(last[0]))
            return all(bool(log_p.isfinite()) for log_p in sums)

        draws = [self._unconstrained(trace) for trace in self.traces]
        points = finite_points(itertools.chain(draws, nearby(draws[0])), is_finite)
        if points is None:
            raise ModelError(data_checks.where_not_finite(last[0], TRIES, self.runner.arguments()))
        return points

    def _check_unread(self, trial: Trial) -> None:
        """Refuse a density that reads values which are neither latent nor observed."""
        own = self.layout.missing
        for name, part in own.items():
            found = []
            for number in (part.unread, 1.0):
                self.layout.missing = {**own, name: replace(part, unread=number)}
                with torch.no_grad():
                    found.append(self._log_prob(trial.points[0], *trial.inputs))
            self.layout.missing = own
            if not agree(found[:1], found[1:]):
                raise ModelError(checks.masked_message(name, "values that are missing", part.name))

    def _unconstrained(self, trace: poutine.Trace) -> Tensor:
        sites = {name: trace.nodes[name] for name in self.layout.latents}
        found = {n: bijection_of(s["fn"]).inv(s["value"]) for n, s in sites.items()}
        return torch.cat([u.reshape(-1) for u in self.layout.latent_elements(found).values()])


def capture_runner(name: str, runner: Runner) -> GlobalTarget:
    """A model on other arguments than those of a fit."""
    with isolated_rng(0):
        return PyroCapture(runner, name).target()


def _sum_of_sites(trace: poutine.Trace) -> Tensor:
    terms = [site["log_prob_sum"] for site in checks.sites_with_density(trace)]
    total: Tensor = sum(terms[1:], terms[0])
    return total


def _warn_if_data_are_missing(runner: Runner, data: dict[str, Tensor], name: str) -> None:
    absent = [key for key, value in runner.arguments().items() if value is None]
    if absent and not data:
        warnings.warn(
            f"{name} observes nothing, and its argument '{absent[0]}' is None: this is a fit to "
            "the prior. Were the data forgotten?",
            stacklevel=4,
        )
