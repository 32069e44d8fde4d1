"""A model with one latent vector a row of the data, as the log densities of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flowvi.targets.global_target import GlobalTarget
from flowvi.targets.labelling import labels_from
from flowvi.targets.local.mapping import mapped
from flowvi.targets.local.program import RowPrograms
from flowvi.targets.local.rows import NOWHERE, Batch, Call
from flowvi.targets.local.schema import LocalFacts, RowFunctions, RowSimulator
from flowvi.targets.recording.batched import Batched
from flowvi.targets.schema import ModelError
from flowvi.targets.simulating import as_observed
from flowvi.targets.target import Target
from flowvi.targets.vectors import flattened


class LocalTarget(Target):
    r"""The log densities of the rows of a plate, each with a latent vector z_n of its own.

    .. math:: \log p(x_n, z_n \mid \theta) + \log|\det \partial / \partial z_n|

    They are not scaled: a bound on the evidence of all N rows is N times a mean over
    rows, and importance weights are those of one row. Made by `from_pyro` and
    `from_density` with `local=`. Parameters of the model (`pyro.module`, `pyro.param`)
    are parameters of the target and are trained in a fit.

    Attributes:
        name: Name of the model.
        plate: Name of the plate.
        dim: Length D of the latent vector of a row.
        rows: Number of rows N.
        sites: Local latent sites, of one row.
        shared: The log density of the latents theta that all rows share, or None.
        coords: Labels of the rows, by the name of the plate.
        messages: Pyro's record of each local latent site in one run of one row; empty for
            plain densities.

    Args:
        facts: Names and shapes.
        functions: Of one row.
        shared: The latents that all rows share.
        own: Parameters of the model.
    """

    def __init__(
        self,
        facts: LocalFacts,
        functions: RowFunctions,
        shared: GlobalTarget | None = None,
        own: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.plate, self.sites = facts.name, facts.plate, facts.sites
        self.slices, self.dims = facts.slices, facts.dims
        self.coords: dict[str, list[Any]] = {}
        self.deterministics, self.observed = facts.deterministics, facts.observed
        self.arguments, self.rows = facts.rows, facts.rows.size
        self.dim = max(s.stop for s in facts.slices.values())
        self.has_parts = facts.parts
        self.columns, self.messages = facts.columns, facts.messages
        self.shared = shared
        self._functions = functions
        self._terms = functions.terms
        together = functions.together
        self._programs = None if together is None else RowPrograms(together)
        self.register_own(own, facts.parameters)

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the densities are evaluated."""
        return self._terms.dtype

    @property
    def device(self) -> torch.device:
        """Where the densities are evaluated."""
        held = [*self.model_parameters, *self._terms.buffers()]
        return held[0].device if held else torch.device("cpu")

    def begin(self, uses: Any = ()) -> None:
        if self._programs is not None:
            self._programs.begin(uses)

    def uses(self) -> Any:
        return [] if self._programs is None else list(self._programs.programs)

    def batch(self, index: Tensor | Sequence[int] | None = None) -> Batch:
        """Rows of the data that the model was captured with; all of them by default."""
        if index is None:
            index = torch.arange(self.rows)
        index = torch.as_tensor(index)
        outside = (index < 0) | (index >= self.rows)
        if index.is_floating_point() or index.dim() != 1 or outside.any():
            raise ValueError(
                f"Rows of {self.name} are whole numbers from 0 to {self.rows - 1}; got "
                f"{(index[outside] if index.dim() == 1 and outside.any() else index).tolist()}."
            )
        return self.arguments.batch(index).to(self.device)

    def as_batch(self, data: Any) -> Batch:
        """Rows as people give them: a `Batch`, a tensor or a tuple of tensors of any N.

        Raises:
            ValueError: They are not like those of the model, or none.
        """
        if isinstance(data, Batch):
            return data.to(self.device)
        tensors = tuple(
            torch.as_tensor(t) for t in (data if isinstance(data, list | tuple) else [data])
        )
        like = self.arguments.batch([0]).data
        shapes = [tuple(t.shape[1:]) for t in tensors]
        expected = [tuple(t.shape[1:]) for t in like]
        if shapes != expected or len({t.shape[0] for t in tensors}) != 1:
            raise ValueError(
                f"Rows for {self.name} need tensors of shapes "
                f"{', '.join(str(('N', *s)) for s in expected)}; got "
                f"{', '.join(str(tuple(t.shape)) for t in tensors)}."
            )
        if not len(tensors[0]):
            raise ValueError(f"Plate '{self.plate}' has size 0: the data has no rows.")
        data = tuple(t.to(e.dtype) for t, e in zip(tensors, like, strict=True))
        return Batch(torch.full((len(data[0]),), NOWHERE), data).to(self.device)

    def log_prob(self, z: Tensor, batch: Any = None, theta: Tensor | None = None) -> Tensor:
        """Log density of rows and their latent vectors. (*S, B, D) -> (*S, B).

        Args:
            z: Latent vectors.
            batch: The rows: a `Batch`, or their data; all rows by default.
            theta: Latents that the rows share, (G) or (*T, G), where S = (*K, *T).
        """
        return self.terms(z, batch, theta).sum(-1)

    def terms(self, z: Tensor, batch: Any = None, theta: Tensor | None = None) -> Tensor:
        """Log likelihood, and log prior of z with its Jacobian. (*S, B, D) -> (*S, B, 2).

        Where discrete latents are summed out the first is the whole density and the second 0.
        """
        out: Tensor = self._mapped(self._terms, z, batch, theta, self._programs)
        return out.to(z.dtype)

    def log_prior(self, z: Tensor, batch: Any = None) -> dict[str, Tensor]:
        """Log prior density of the latents of each row, without Jacobian. (*S, B, D) -> (*S, B).

        By the name of the latent site, or "latents" if there are several, whose sum it is. Empty
        for plain densities, and where discrete latents are summed out.
        """
        if not self.has_parts or self._functions.latents is None or self.shared is not None:
            return {}
        _, ladjs = self.latents(z, batch)
        total = self.terms(z, batch)[..., 1]
        for ladj in ladjs.values():
            total = total - ladj.to(total.dtype).reshape(*total.shape, -1).sum(-1)
        return {next(iter(self.sites)) if len(self.sites) == 1 else "latents": total}

    def terms_alone(self, z: Tensor, batch: Batch) -> Tensor:
        """The terms of rows without latents that they share, by the function of one row."""
        out: Tensor = self._mapped(self._terms, z, batch, None)
        return out

    def constrain(
        self, z: Tensor, batch: Any = None, theta: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Values of latent and deterministic sites. (*S, B, D) -> (*S, B, *shape) by name."""
        out: dict[str, Tensor] = self._mapped(self._functions.values, z, batch, theta)
        return out

    def latents(self, z: Tensor, batch: Any = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of the latent sites, and the log Jacobians of the maps to them.

        Returns:
            Values (*S, B, *shape), and log|det d value / d z| (*S, B, *batch shape), by site.

        Raises:
            ModelError: The target is no Pyro model.
        """
        if self._functions.latents is None:
            raise ModelError(f"{self.name} is a plain density; it has no Pyro sites.")
        values, ladjs = self._mapped(self._functions.latents(), z, batch, None)
        return values, ladjs

    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The rows in a call of the model: their data, and the size of the plate.

        Raises:
            ModelError: The rows are not where they were when the model was captured.
        """
        if self._functions.called is None:
            raise ModelError(f"{self.name} is a plain density; it is not called.")
        return self._functions.called(args, kwargs)

    def unconstrain(
        self, values: Mapping[str, Any], batch: Any = None, theta: Tensor | None = None
    ) -> Tensor:
        """Latent vectors of values of all latent sites. Each (*S, B, *shape) -> (*S, B, D).

        Raises:
            ValueError: A site is missing.
        """
        flat = flattened(values, self.sites, self.dtype, self.device)
        out: Tensor = self._mapped(self._functions.inverse, flat, batch, theta)
        return out

    def prior(self, n: int, seed: int = 0, theta: Tensor | None = None) -> dict[str, np.ndarray]:
        """Draw n new rows, latents and data: name -> (n, *shape).

        Data that the model does not observe are those of its first rows.
        """
        batch = self.batch(torch.arange(n) % self.rows)
        return as_observed(self._simulated()(None, batch, theta, seed), self.observations(batch))

    def label(self, coords: Mapping[str, Sequence[Any]]) -> LocalTarget:
        """Give labels to the rows, by the name of their plate; returns the target itself."""
        for dim, given in coords.items():
            labels = labels_from(given)
            if dim != self.plate:
                raise ValueError(f"No dim named '{dim}'; the rows are in '{self.plate}'.")
            if len(labels) != self.rows:
                raise ValueError(
                    f"dim '{dim}' has size {self.rows}; got {len(labels)} labels for it."
                )
            self.coords[dim] = labels
        return self

    def observations(self, batch: Any = None) -> dict[str, Tensor]:
        """Observed values of rows, by site: (B, *shape) each. Empty for a plain density."""
        found = self._functions.observed
        return {} if found is None else found(self._rows(batch))

    def replaced(self, batch: Batch, values: Mapping[str, np.ndarray]) -> Batch:
        """Rows with other values at all observed sites, (B, *shape) each.

        Raises:
            ModelError: A site observes something that the model computes from its arguments.
        """
        data = list(batch.data)
        for name in self.observed:
            if name not in self.columns:
                raise ModelError(
                    f"Site '{name}' observes none of the model's arguments as they are: its data "
                    "cannot be replaced. Pass them as an argument of their own."
                )
            old = data[self.columns[name]]
            data[self.columns[name]] = torch.as_tensor(values[name]).to(old)
        return Batch(batch.places, tuple(data))

    def predictive(  # type: ignore[override]
        self, z: Tensor, batch: Any = None, theta: Tensor | None = None, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """Simulate the data of rows given their latent vectors. (*S, B, D) -> (*S, B, *shape)."""
        rows = self._rows(batch)
        lead, many = z.shape[:-1], z.shape[:-2].numel()
        repeated = Batch(rows.places.repeat(many), tuple(_repeated(t, many) for t in rows.data))
        with torch.no_grad():
            values = self.constrain(z, rows, theta)
            flat = {k: values[k].reshape(-1, *self.sites[k].shape) for k in self.sites}
            found = self._simulated()(flat, repeated, theta, seed)
        found = as_observed(found, self.observations(rows))
        return {k: v.reshape(*lead, *v.shape[1:]) for k, v in found.items()}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {s.stop - s.start}" for name, s in self.slices.items())
        shared = "" if self.shared is None else f"; shared: {self.shared.dim}"
        what = f"D = {self.dim} for each of {self.rows} rows; {sizes}{shared}"
        return f"LocalTarget({self.name}: {what})"

    def _simulated(self) -> RowSimulator:
        if self._functions.simulate is None:
            raise ModelError(f"{self.name} is a plain density; it cannot simulate data.")
        return self._functions.simulate

    def _rows(self, batch: Any) -> Batch:
        return self.batch() if batch is None else self.as_batch(batch)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        if self._programs is not None:
            self._programs.clear()
        return super()._apply(fn, recurse)

    def _mapped(
        self,
        function: Batched,
        z: Tensor,
        batch: Any,
        theta: Tensor | None,
        programs: RowPrograms | None = None,
    ) -> Any:
        rows = batch if isinstance(batch, Batch) else self._rows(batch)
        self._check(z, rows, theta)
        lead = z.shape[:-2]
        common = torch.Size() if theta is None else theta.shape[:-1]
        many = lead[: len(lead) - len(common)].numel()
        z = z.reshape(many, common.numel(), *z.shape[-2:]).to(function.dtype)
        shared = [] if theta is None else [theta.reshape(-1, theta.shape[-1]).to(function.dtype)]
        cast = [t.to(function.dtype) if t.is_floating_point() else t for t in rows.data]
        alone = partial(mapped, function, z, shared, self.model_parameters, cast)
        out = (
            alone() if programs is None else programs(alone, z, shared, self.model_parameters, cast)
        )

        def shaped(t: Tensor) -> Tensor:
            return t.reshape(*lead, *t.shape[2:])

        return tree_map(shaped, out)

    def _check(self, z: Tensor, rows: Batch, theta: Tensor | None) -> None:
        if z.dim() < 2 or z.shape[-1] != self.dim or z.shape[-2] != len(rows.places):
            raise ValueError(
                f"z must have shape (*S, B, D) with B = {len(rows.places)} rows and D = {self.dim} "
                f"for {self.name}; got {tuple(z.shape)}."
            )
        wanted = 0 if self.shared is None else self.shared.dim
        came = 0 if theta is None else theta.shape[-1]
        if wanted != came:
            raise ValueError(
                f"{self.name} has {wanted} unconstrained coordinates that all rows share; theta "
                f"has {came}."
            )


def _repeated(t: Tensor, many: int) -> Tensor:
    return t.repeat(many, *[1] * (t.dim() - 1))
