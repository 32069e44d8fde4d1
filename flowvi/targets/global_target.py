"""A model captured as a log density on R^D, with the names, shapes and dims of its values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from flowvi.runtime import memory
from flowvi.targets import subsampling
from flowvi.targets.labelling import labels_from, renamed
from flowvi.targets.recording.batched import Batched
from flowvi.targets.recording.capture import Trial, capture_values
from flowvi.targets.recording.program import CompiledDensity
from flowvi.targets.recording.sliced import SlicedDensity, sliced
from flowvi.targets.schema import Facts, Functions, ModelError
from flowvi.targets.simulating import SimulatingTarget
from flowvi.targets.vectors import flattened


class GlobalTarget(SimulatingTarget):
    r"""A log density on R^D: the log joint plus the log Jacobian of the map to the supports.

    .. math:: \log p(x, \theta(z)) + \log|\det \partial \theta / \partial z|

    Made by `from_pyro` and `from_density`. Parameters that the model itself
    has (`pyro.param`, `pyro.module`) are parameters of the target and are
    trained in a fit. Its precision is that of the model, whatever it is cast to.

    Args:
        facts: Names and shapes.
        density: The log density.
        functions: Its values, their inverse, and so on.
        trial: A few points of finite density, to check against.
        own: Parameters of the model, by name; all functions take them behind z.
        data: Observed values that `observing` may replace; all functions take them behind those.
        arguments: Tensors among the arguments that it may replace; all functions take them last.
    """

    def __init__(
        self,
        facts: Facts,
        density: CompiledDensity,
        functions: Functions,
        trial: Trial,
        own: Mapping[str, nn.Parameter] | None = None,
        data: Mapping[str, Tensor] | None = None,
        arguments: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.name = facts.name
        self.sites = facts.sites
        self.slices = facts.slices
        self.deterministics = facts.deterministics
        self.observed = facts.observed
        self.constants = facts.constants
        self.dims = facts.dims
        self.coords = {part.dim: part.labels({}) for part in facts.missing}
        self.improper = facts.improper
        self.masked = facts.masked
        self.subsampled = facts.subsampled
        self.dim = trial.points.shape[-1]
        self.density = density
        self._facts = facts
        self.messages = functions.messages
        self._functions = functions
        self._trial = trial
        self._maps: dict[str, Batched] = {}
        self._cost: memory.Cost | None = None
        self._data = dict(data or {})
        self._arguments = dict(arguments or {})
        self._sliced: SlicedDensity | None = None
        self._is_sliced: bool | None = None
        self.register_own(own, facts.parameters)

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the density is evaluated."""
        return self.density.batched.dtype

    @property
    def device(self) -> torch.device:
        """Where the density is evaluated."""
        return self._trial.points.device

    def log_prob(self, z: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """Evaluate the log density, Jacobian included. (*S, D) -> (*S).

        Args:
            z: Points of R^D.
            batch: Plate -> indices (B,), for an unbiased estimate from those rows; all without.
        """
        self._check(z)
        if batch is not None and self.subsampled:
            return self.density(z, *self._behind, *self._indices(batch)).to(z.dtype)
        rows = self.sum_of_rows
        if rows is not None and z.numel() and not is_functorch_wrapped_tensor(z):
            return rows(z, self._of_whole).to(z.dtype)
        return self._of_whole(z)

    def _of_whole(self, z: Tensor) -> Tensor:
        """The log density by its graph of all rows, or of one batch after the other."""
        if not self.subsampled:
            return self.density(z, *self._behind).to(z.dtype)
        parts = [
            weight * self.density(z, *self._behind, *self._indices(batch))
            for weight, batch in self.cover()
        ]
        total = torch.stack(parts).sum(0)
        # Weights have both signs: inf - inf would be NaN.
        nowhere = torch.stack(parts).isinf().any(0)
        return torch.where(nowhere, -torch.inf, total).to(z.dtype)

    @property
    def sum_of_rows(self) -> SlicedDensity | None:
        """The density as a sum over many rows of data; None where it is none, or has few."""
        if self._is_sliced is None:
            plates = list(self.subsampled.values())
            able = self.density.lowers and not self._behind and len(plates) <= 1
            if able:
                batched, points = self.density.batched, self._trial.points
                self._sliced = sliced(batched, points, self._inputs(), (*plates, None)[0])
            self._is_sliced = self._sliced is not None
        return self._sliced

    def some_rows(self, n: int, seed: int) -> GlobalTarget:
        """The density of the prior and some rows of the data, drawn without replacement.

        Args:
            n: Number of rows.
            seed: Seed of the choice.
        """
        rows = self.sum_of_rows
        if rows is None:
            raise ModelError(f"{self.name} is no sum over rows of data.")
        generator = torch.Generator(self.device).manual_seed(seed)
        order = torch.randperm(rows.count, generator=generator, device=self.device)
        new = copy.copy(self)
        new._sliced = rows.subset(order[:n])
        return new

    def plain(self, z: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        rows = [] if batch is None else self._indices(batch)
        return self.density.batched(z, *self._behind, *rows)

    def cover(self) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Batches and weights whose weighted densities add up to that of all rows."""
        return subsampling.cover(self.subsampled, self.device)

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Map points to the values of latent and deterministic sites. (*S, D) -> (*S, *shape)."""
        self._check(z)
        out: dict[str, Tensor] = self._map("values")(z, *self._inputs())
        return out

    def latents(self, z: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Map points to the values of the latent sites, and the log Jacobians of these maps.

        Returns:
            Values (*S, *shape), and log|det d value / d z| (*S, *batch shape), by site.

        Raises:
            ModelError: The target is no Pyro model.
        """
        self._check(z)
        if self._functions.latents is None:
            raise ModelError(f"{self.name} is a plain density; it has no Pyro sites.")
        values, ladjs = self._map("latents")(z, *self._inputs())
        return values, ladjs

    def unconstrain(self, values: Mapping[str, Any]) -> Tensor:
        """Map values of the latent sites to points. Each (*S, *shape) -> (*S, D).

        Raises:
            ValueError: A site is missing or a shape does not fit.
        """
        flat = flattened(values, self.sites, self.dtype, self.device)
        z: Tensor = self._map("inverse")(flat, *self._inputs())
        return z

    def log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        """Pointwise log likelihood of every observed site. (*S, D) -> (*S, *rows).

        Empty where the model has no observed sites, or sums out discrete ones
        that several rows share.
        """
        self._check(z)
        if self._functions.likelihood is None:
            return {}
        return self._of_all_rows("likelihood", z, self.dims)

    def log_prior(self, z: Tensor) -> dict[str, Tensor]:
        """Log prior density of every latent site given its parents. (*S, D) -> (*S, *batch shape).

        It is the density of the values in their own supports, without Jacobian. Empty for plain
        densities, and where a prior depends on a discrete site that is summed out.
        """
        self._check(z)
        if self._functions.prior is None:
            return {}
        found: dict[str, Tensor] = self._map("prior")(z, *self._inputs())
        return found

    def probabilities(self, z: Tensor) -> dict[str, Tensor]:
        """Probabilities of the values of discrete sites, given the data and the latents.

        What Pyro's `infer_discrete` draws from, for each site by itself: its values in the order
        of `enumerate_support`. Over draws of the posterior their mean is P(value | data).

        Args:
            z: Points of R^D, (*S, D).

        Returns:
            Discrete site -> (*S, *shape of the site, K), which add up to 1 over the last axis;
            empty where the model has no discrete sites.
        """
        self._check(z)
        if self._functions.discrete is None:
            return {}
        return self._of_all_rows("discrete", z, self._facts.discrete)

    def violation(self, z: Tensor) -> tuple[str, str]:
        """The site a parameter of which leaves its constraint at a point (D), and a sentence on it.

        Both are empty where there is none, and for plain densities.
        """
        return ("", "") if self._functions.violation is None else self._functions.violation(z)

    def observing(
        self, data: Mapping[str, Any], arguments: Mapping[str, Any] | None = None
    ) -> GlobalTarget:
        """The same target with other data, sharing what was captured; one made by `replicable`.

        Args:
            data: Observed site -> values, of the shape and type that it has.
            arguments: The same for the tensors among the arguments that vary.
        """
        for held, given in ((self._data, data), (self._arguments, arguments or {})):
            if set(held) ^ set(given) or not data:
                raise ValueError(
                    f"observing needs values for {', '.join(held) or 'no site'}; got "
                    f"{', '.join(given) or 'none'}."
                )
        new = copy.copy(self)
        new.made = None
        new._data = _alike("Site '{}' observes values", self._data, data)
        new._arguments = _alike("Argument '{}' has values", self._arguments, arguments or {})
        new.observed = {**self.observed, **new._data}
        known = {name.rpartition(".")[2]: t for name, t in new._arguments.items()}
        new.constants = {name: known.get(name, t) for name, t in self.constants.items()}
        new.coords = dict(self.coords)
        return new

    def joint(
        self, n: int, seed: int, arguments: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw latent vectors from the prior, and data given them.

        Args:
            n: Number of draws.
            seed: Their seed.
            arguments: Tensors among the arguments of each draw, (n, *shape); those of the model
                without.

        Returns:
            Vectors (n, D), and data by observed site, (n, *shape) each.

        Raises:
            ModelError: The model is a plain density, has an improper prior, or a site does not
                say how to draw from it.
        """
        if self._functions.joint is None:
            raise ModelError(f"{self.name} is a plain density; it has no prior to draw from.")
        if self.improper:
            raise ModelError(f"The prior of '{self.improper[0]}' is improper: it has no draws.")
        return self._functions.joint(n, seed, arguments or {})

    def label(self, coords: Mapping[str, Sequence[Any]]) -> GlobalTarget:
        """Give labels to dims; returns the target itself.

        Args:
            coords: Labels by dim: a list, an index of pandas, or a column of categories.

        Raises:
            ValueError: There is no such dim, or it has another size.
        """
        sizes = self.dim_sizes()
        for dim, given in coords.items():
            labels = labels_from(given)
            if dim not in sizes:
                raise ValueError(
                    f"No dim named '{dim}'; {self.name} has {', '.join(sizes)}. An axis without a "
                    "plate gets a name by dims, as in from_pyro(..., dims={'beta': ['coef']})."
                )
            if len(labels) != sizes[dim]:
                raise ValueError(
                    f"dim '{dim}' has size {sizes[dim]}; got {len(labels)} labels for it."
                )
            self.coords[dim] = labels
        for part in self._facts.missing:
            if part.dim not in coords:
                self.coords[part.dim] = part.labels(self.coords)
        return self

    def name_axes(self, dims: Mapping[str, Sequence[str] | str]) -> GlobalTarget:
        """Name the axes of variables that are in no plate; returns the target itself.

        Args:
            dims: Names by variable: of all its axes, or of those without a plate. Variables that
                share a name share its labels.

        Raises:
            ValueError: The names do not fit the variables, or each other.
        """
        shapes = {name: tuple(value.shape) for name, value in self._some_values().items()}
        self.dims = renamed(self.dims, {**dict.fromkeys(self.dims, ()), **shapes}, dims)
        return self

    def starts(self, generator: torch.Generator) -> Tensor:
        """Points to start from: draws from the prior where there are any, zero, random ones.

        Returns:
            Points of R^D, (P, D).
        """
        some = torch.randn(2, self.dim, generator=generator, dtype=self.dtype, device=self.device)
        return torch.cat([self._trial.points.to(self.dtype)[:2], 0 * some[:1], 0.5 * some])

    def begin(self, uses: Any = ()) -> None:
        self.density.begin(uses)

    def uses(self) -> Any:
        return self.density.uses()

    def chunk(self) -> int:
        """How many points to evaluate at a time, with gradients, so that memory is limited.

        The memory of a point is measured at the first call. The limit is `max_memory` of the
        function that asks, FLOWVI_MAX_MEMORY, or 1 GB.
        """
        if self.sum_of_rows is not None:
            return memory.MOST
        fixed, each = self._measured()
        return memory.Cost(fixed, each * len(list(self.cover()))).points_within(
            memory.evaluation_bytes()
        )

    def at_once(self) -> int:
        return self._measured().points_within(memory.evaluation_bytes(), memory.ANY)

    def _measured(self) -> memory.Cost:
        if self._cost is None:
            self._cost = memory.measure_cost(self._value_and_score)
        return self._cost

    def __repr__(self) -> str:
        return f"Target({self.name}: D = {self.dim}; {self._facts.sizes()})"

    def __deepcopy__(self, memo: dict[int, Any]) -> GlobalTarget:
        if self._count:
            raise TypeError(
                f"{self.name} has parameters of its own, which it shares with the model: a copy "
                "would not follow them. Capture the model again with from_pyro."
            )
        new = copy.copy(self)
        new.coords = dict(self.coords)
        return new

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # The precision of a recorded graph is fixed; only the device may change.
        def move(t: Tensor) -> Tensor:
            return t.to(fn(t.new_empty(0)).device)

        self._sliced, self._is_sliced = None, None
        return super()._apply(move, recurse)

    @property
    def _behind(self) -> list[Tensor]:
        """The model's own parameters, or their replacements, and data that are inputs."""
        return [*self.model_parameters, *self._data.values(), *self._arguments.values()]

    def _map(self, which: str) -> Batched:
        """The batched form of one of the target's functions, made when first asked for."""
        if which not in self._maps:
            function, points = getattr(self._functions, which), self._trial.points
            if which == "inverse":
                values = self.constrain(points)
                columns = [values[name].reshape(len(points), -1) for name in self.sites]
                points = torch.cat([c.to(points.dtype) for c in columns], -1)
            trial = Trial(points, self._trial.inputs, self._trial.others)
            self._maps[which] = capture_values(function, trial, self.density.batched)
        return self._maps[which]

    def _of_all_rows(
        self, which: str, z: Tensor, dims: Mapping[str, tuple[str, ...]]
    ) -> dict[str, Tensor]:
        """A function whose values belong to rows, put together where plates are subsampled."""
        function = self._map(which)
        if not self.subsampled:
            out: dict[str, Tensor] = function(z, *self._behind)
            return out
        pieces = ((b, function(z, *self._behind, *self._indices(b))) for _, b in self.cover())
        return subsampling.assemble(pieces, self.subsampled, dims, z.dim() - 1)

    def _inputs(self) -> list[Tensor]:
        """Arguments of the functions after z; rows are the first ones of subsampled plates."""
        first = self._indices(next(self.cover())[1]) if self.subsampled else []
        return [*self._behind, *first]

    def _indices(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        for name, (_, size) in self.subsampled.items():
            if name not in batch or len(batch[name]) != size:
                raise ValueError(f"batch needs {size} indices for plate '{name}'.")
        return [batch[name] for name in self.subsampled]

    def dim_sizes(self) -> dict[str, int]:
        shapes = [(self.dims[name], value.shape) for name, value in self._some_values().items()]
        return {d: n for dims, shape in shapes for d, n in zip(dims, shape, strict=False)}

    def _some_values(self) -> dict[str, Tensor]:
        """One value of every variable, and the data."""
        return self.constrain(self._trial.points[0]) | self.observed | self.constants

    def _value_and_score(self, n: int) -> object:
        """Evaluate some points without recording a program."""
        z = self._trial.points[:1].to(self.dtype).expand(n, -1).clone().requires_grad_()
        with torch.enable_grad():
            log_p = self.density.batched(z, *self._inputs())
            return log_p, torch.autograd.grad(log_p.sum(), z, allow_unused=True)

    def _check(self, z: Tensor) -> None:
        if z.shape[-1] != self.dim:
            raise ValueError(
                f"z has {z.shape[-1]} columns but {self.name} has D = {self.dim} "
                f"({self._facts.sizes()})."
            )


def _alike(words: str, held: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Given values in the types of those that are held, or an error where a shape differs."""
    new = {name: torch.as_tensor(given[name]).to(t) for name, t in held.items()}
    for name, like in held.items():
        if new[name].shape != like.shape:
            raise ValueError(
                f"{words.format(name)} of shape {tuple(like.shape)}; got {tuple(new[name].shape)}."
            )
    return new
