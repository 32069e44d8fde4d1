"""The prior of the latents that all rows share, as a target of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.local.row_functions import RowFunctionsOfModel, both, only_row
from flowvi.targets.pyro import checks
from flowvi.targets.pyro.handlers import FromVector, ToVector
from flowvi.targets.pyro.layout import Layout
from flowvi.targets.pyro.rerun import make_rerun
from flowvi.targets.pyro.runner import Runner
from flowvi.targets.recording.capture import Trial, capture
from flowvi.targets.recording.program import CompiledDensity
from flowvi.targets.schema import Facts, Functions
from flowvi.targets.vectors import split


class SharedPrior:
    """Functions of theta (G), the latents outside the plate, and of the model's parameters.

    Args:
        functions: Those of one row of the model.
        layout: Where each site lies in theta.
    """

    def __init__(self, functions: RowFunctionsOfModel, layout: Layout) -> None:
        self.functions, self.sites, self.layout = functions, functions.sites, layout

    def log_prob(self, theta: Tensor, *own: Tensor) -> Tensor:
        """Log prior with its Jacobian, ()."""
        handler = self._from_theta(theta)
        z = self.sites.zero().to(theta)
        trace = self._run(both(self.functions.from_z(z), handler), own)
        terms = [
            s["log_prob_sum"]
            for s in checks.sites_with_density(trace)
            if not self.sites.is_local(s)
        ]
        return sum(terms[1:], terms[0]) + handler.ladj

    def values(self, theta: Tensor, *own: Tensor) -> dict[str, Tensor]:
        """Latents and deterministics outside the plate, by name."""
        inputs = [theta, *own, *only_row(self.sites.first_row)]
        trace, _ = self.functions.trace(self.sites.zero(), inputs)
        names = [*self.layout.sites, *self.sites.common_deterministics]
        return {n: torch.as_tensor(trace.nodes[n]["value"]) for n in names}

    def inverse(self, flat: Tensor, *own: Tensor) -> Tensor:
        """Theta of flattened values of the latents, (G)."""
        handler = ToVector(split(flat, self.layout.sites, self.layout.dtypes))
        self._run(both(handler, self.functions.from_z(self.sites.zero())), own)
        return torch.cat([handler.pieces[name] for name in self.layout.sites])

    def ladj(self, theta: Tensor) -> Tensor:
        """The log Jacobian of the map from theta to the values of the latents, ()."""
        handler = self._from_theta(theta)
        own = self.functions.own
        self._run(both(self.functions.from_z(self.sites.zero()), handler), own)
        return handler.ladj

    def target(
        self, name: str, thetas: Sequence[Tensor], capture_again: Callable[[Runner], GlobalTarget]
    ) -> GlobalTarget:
        """The prior as a target.

        Args:
            name: Name of the model.
            thetas: Points of finite density.
            capture_again: Captures the model with all its latents in one vector, on other
                arguments.
        """
        runner, own = self.functions.rows.runner, self.functions.own
        trial = Trial(torch.stack([theta.detach() for theta in thetas]), own)
        batched = capture(self.log_prob, trial, name, double=False)
        deterministics = self.sites.common_deterministics
        facts = Facts(
            name,
            self.layout.sites,
            self.layout.slices,
            deterministics,
            dims={n: self.layout.dims[n] for n in [*self.layout.sites, *deterministics]},
            improper=self.layout.improper,
        )
        # There are no draws of the latents of rows: other rows draw their own.
        rerun = make_rerun(runner, self.layout, capture_again)
        functions = Functions(self.values, self.inverse, rerun=rerun)
        density = CompiledDensity(batched, frozen=not own)
        return GlobalTarget(facts, density, functions, trial, runner.parameters.leaves)

    def _from_theta(self, theta: Tensor) -> FromVector:
        layout = self.layout
        return FromVector(theta, layout.slices, layout.shapes, layout.dtypes)

    def _run(self, handler: Any, own: Sequence[Tensor]) -> poutine.Trace:
        return self.functions.run(handler, self.sites.first_row, own)
