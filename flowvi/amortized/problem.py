"""A model and the data sets to come: what varies among them, and how to simulate them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowvi.amortized.covariates import Covariates, DrawnCovariates, ResampledRows, names_drawn
from flowvi.amortized.row_order import check_lags, is_part, moved, permutes
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.targets import GlobalTarget, ModelError
from flowvi.targets.labelling import labels_from
from flowvi.targets.pyro import checks
from flowvi.targets.pyro.from_pyro import replicable_runner
from flowvi.targets.pyro.naming import name_of
from flowvi.targets.pyro.runner import Runner

# Largest number of latents, and of rows with a latent each.
MOST_LATENTS, MOST_ROW_LATENTS = 256, 64
# Numbers of rows of the data sets to come, as multiples of the example's.
FEWER, MORE = 0.5, 2.0
# Captured models that are kept, one for each number of rows.
KEPT = 64
# Smallest share of simulated data sets that are finite.
FEWEST_FINITE = 0.5
FIXED = "fixed"


@dataclass(frozen=True)
class Simulated:
    """Simulated data sets of one number of rows.

    Attributes:
        z: Latent vectors, (n, D).
        data: Observed values by site, and arguments that vary, (n, *shape) each.
    """

    z: Tensor
    data: dict[str, Tensor]

    def part(self, index: Any, rows: int | None = None, by_row: tuple[str, ...] = ()) -> Simulated:
        """Some of the data sets, with the first rows alone if a number is given."""
        data = {k: v[index] for k, v in self.data.items()}
        data = {k: v[:, :rows] if k in by_row and rows else v for k, v in data.items()}
        return Simulated(self.z[index], data)


class Problem:
    """A Pyro model with example arguments.

    Args:
        model: The model.
        args: Its example arguments.
        kwargs: Its keyword arguments.
        rows: Least and largest number of rows of the data sets to come; a choice by default.
        covariates: Function that draws the arguments that vary; "fixed" where none does; by
            default rows of the example are resampled.
        dims: Names of axes that are in no plate, by variable.
        coords: Labels by dim. Those of the rows' plate label data sets of the example's size.

    Attributes:
        target: The model of the example.
        sites: Names of the observed sites.
        varying: Arguments that differ among data sets, and are not observed.
        data_leaves: Arguments that are observed; with the site whose values they are, or "".
        plate: Name of the rows' plate; empty without one.
        exchangeable: Whether the density does not depend on the order of the rows.
        by_row: Observed sites and arguments whose first axis is the rows.
        rows: Least and largest number of rows; equal where it is fixed.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: tuple[int, int] | None = None,
        covariates: Covariates | str | None = None,
        dims: Mapping[str, Sequence[str] | str] | None = None,
        coords: Mapping[str, Any] | None = None,
    ) -> None:
        checks.check_callable(model, name_of(model))
        self.model, self.name, self.notes = model, name_of(model), list[str]()
        with isolated_rng(0):
            self.runner = Runner(model, args, kwargs).in_precision(torch.float64)
            self.target = replicable_runner(self.runner)
            self.dims = dict(dims or {})
            self.coords = {dim: labels_from(given) for dim, given in (coords or {}).items()}
            self.target.name_axes(self.dims).label(self.coords)
            self.sites = list(self.target.observed)
            self._refuse()
            self.leaves = self.runner.leaves()
            self.data_leaves = self._observed_leaves()
            self.plate, self.size = self._rows()
            self.varying = self._varying(covariates)
            self._targets: OrderedDict[int, GlobalTarget] = OrderedDict()
            self._capture()
            self.exchangeable = permutes(self, with_latents=False)
            self.alike = self.exchangeable or permutes(self, with_latents=True)
            if covariates is None and not self.alike and self.varying:
                self.notes.append(
                    f"arguments {_named(self.varying)} are fixed: the order of the rows matters"
                )
                self.varying = []
                self._capture()
            check_lags(self)
            self.rows = self._sizes(rows)
            self.covariates: DrawnCovariates | ResampledRows
            like = {name: self.leaves[name] for name in self.varying}
            self.covariates = (
                DrawnCovariates(covariates, like) if callable(covariates) else ResampledRows(like)
            )

    @property
    def by_row(self) -> tuple[str, ...]:
        """Observed sites and varying arguments whose first axis is the rows."""
        if not self.plate:
            return ()
        leaves = [n for n in self.varying if self.leaves[n].shape[:1] == (self.size,)]
        return (*self.sites, *leaves)

    @property
    def resized(self) -> list[str]:
        """Arguments whose first axis is the rows."""
        named = [*self.varying, *self.data_leaves]
        return [n for n in named if self.plate and self.leaves[n].shape[:1] == (self.size,)]

    def target_of(self, rows: int) -> GlobalTarget:
        """The model of a number of rows, whose data and varying arguments can be replaced."""
        if rows in self._targets:
            self._targets.move_to_end(rows)
            return self._targets[rows]
        with isolated_rng(0):
            made = self._made(rows)
        self._compare(made, rows)
        self._targets[rows] = made
        while len(self._targets) > KEPT:
            self._targets.popitem(last=False)
        return made

    def named(self, target: GlobalTarget) -> GlobalTarget:
        """The same target with the names of axes, and with the labels that fit their sizes."""
        target.name_axes(self.dims)
        kept = {dim: len(self.target.coords[dim]) for dim in self.coords}
        sizes = target.dim_sizes()
        return target.label({d: self.coords[d] for d, size in kept.items() if sizes[d] == size})

    @property
    def draws_own_covariates(self) -> bool:
        """Whether a function of the user's draws the arguments that vary."""
        return isinstance(self.covariates, DrawnCovariates)

    def simulate(self, n: int, seed: int) -> Simulated:
        """Draw latents from the prior and data given them, for the largest number of rows.

        Raises:
            ModelError: A site cannot be simulated, or most data sets are not finite.
        """
        rows = self.rows[1]
        with isolated_rng(derive_seed(seed, 0)):
            arguments = self.covariates(n, rows)
        z, data = self.target_of(rows).joint(n, derive_seed(seed, 1), arguments)
        made = Simulated(z, {**data, **arguments})
        # What is not finite is in one row of the table at least.
        good = torch.stack([_finite(t) for t in (z, *data.values())]).all(0)
        if good.float().mean() < FEWEST_FINITE:
            bad = [name for name, t in data.items() if not _finite(t).all()] or ["a latent"]
            raise ModelError(
                f"Most data sets that {self.name} simulates are not finite (site '{bad[0]}'): "
                "its prior allows values that the simulation cannot take. Narrow the prior."
            )
        return made if bool(good.all()) else made.part(good)

    # The parts of the constructor.

    def _refuse(self) -> None:
        target = self.target
        if list(target.parameters()):
            raise ModelError(
                f"{self.name} has parameters of its own (pyro.param or a module): they have no "
                "prior to simulate from. Give them one, as in flowvi.bayesian, or fix them."
            )
        missing = [part.name for part in target._facts.missing]
        if missing:
            raise ModelError(
                f"Site '{missing[0]}' has missing values in the example: which are missing would "
                "differ among the data sets. Leave obs_mask out."
            )
        if target.masked:
            raise ModelError(next(iter(target.masked.values())))
        if target.dim > MOST_LATENTS:
            raise ModelError(
                f"{self.name} has {target.dim} latents; amortize takes up to {MOST_LATENTS}. Fit "
                "each data set by flowvi.fit, or give rows latents of their own with local=."
            )
        self.target.joint(2, 0)

    def _observed_leaves(self) -> dict[str, str]:
        """Arguments on which the observed values depend, with the site whose values they are."""
        found = {}
        for name, leaf in self.leaves.items():
            same = [
                site
                for site, value in self.target.observed.items()
                if value.data_ptr() == leaf.data_ptr() and value.shape == leaf.shape
            ]
            if same:
                found[name] = same[0]
            elif self._moves_data(name, leaf):
                found[name] = ""
        return found

    def _moves_data(self, name: str, leaf: Tensor) -> bool:
        args, kwargs = self.runner.with_leaves({name: moved(leaf)})
        try:
            data = self.data_of(args, kwargs)
        except Exception:  # the model does not run with it: its data are not known to depend on it
            return False
        held = self.target.observed
        return any(
            not torch.equal(data[site].nan_to_num(), held[site].nan_to_num()) for site in held
        )

    def data_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """The values that the model observes with other arguments, by site."""
        runner = Runner(self.model, args, kwargs, precision=self.runner.precision)
        with isolated_rng(0):
            return runner.prior(validate=False)[1]

    def _rows(self) -> tuple[str, int]:
        """The plate of the first axis of all observed values, and its size; empty without."""
        shapes = {site: value.shape for site, value in self.target.observed.items()}
        if not all(shapes.values()):
            return "", 1
        dims = {self.target.dims[site][0] for site in self.sites}
        sizes = {shape[0] for shape in shapes.values()}
        plate = dims.pop()
        if dims or len(sizes) > 1 or plate in {f"{site}_dim_0" for site in self.sites}:
            return "", 1
        size = sizes.pop()
        own = [name for name in self.target.sites if plate in self.target.dims[name]]
        if own and size > MOST_ROW_LATENTS:
            raise ModelError(
                f"Site '{own[0]}' has a value for each of the {size} rows of plate '{plate}': "
                "latents that grow with the data are not amortized over data sets. Use "
                f"from_pyro(model, ..., local='{plate}'), whose guide reads each row."
            )
        return plate, size

    def _varying(self, covariates: Covariates | str | None) -> list[str]:
        if callable(covariates):
            with isolated_rng(0):
                return names_drawn(covariates, self.size, self.leaves)
        if covariates is not None and covariates != FIXED:
            raise ValueError(f'covariates must be a function, "fixed" or None; got {covariates!r}.')
        if covariates == FIXED or not self.plate:
            return []
        return [
            name
            for name, leaf in self.leaves.items()
            if name not in self.data_leaves and leaf.shape[:1] == (self.size,)
        ]

    def _capture(self) -> None:
        """Capture the example; arguments that the model reads into Python stay fixed."""
        whole = [n for n in self.varying if self.leaves[n].is_floating_point()]
        for names in (self.varying, whole, []):
            self.varying = list(names)
            self._targets.clear()
            try:
                self._targets[self.size] = self._made(self.size)
                return
            except ModelError as error:
                if not names:
                    raise
                self.notes.append(f"arguments {_named(names)} cannot all vary: {error}")

    def _made(self, rows: int) -> GlobalTarget:
        runner = self.runner
        if rows != self.size:
            index = torch.arange(rows) % self.size
            args, kwargs = runner.with_leaves({n: self.leaves[n][index] for n in self.resized})
            runner = Runner(self.model, args, kwargs, precision=runner.precision)
        leaves = runner.leaves()
        made = replicable_runner(runner, {n: leaves[n].flip(0) for n in self.varying})
        # Memory is measured once, for all data sets of this number of rows.
        made.chunk()
        return self.named(made)

    def _compare(self, made: GlobalTarget, rows: int) -> None:
        for name, site in self.target.sites.items():
            shape = tuple(made.sites[name].shape) if name in made.sites else ()
            if shape != tuple(site.shape):
                raise ModelError(
                    f"Site '{name}' has shape {tuple(site.shape)} for {self.size} rows and {shape} "
                    f"for {rows}: a latent that grows with the data is not amortized over numbers "
                    f"of rows. Give data sets of {self.size} rows."
                )

    def _sizes(self, rows: tuple[int, int] | None) -> tuple[int, int]:
        if rows is not None:
            given = (rows, rows) if isinstance(rows, int) else tuple(rows)
            whole = len(given) == 2 and all(isinstance(n, int) and n > 0 for n in given)
            if not whole or given[0] > given[1]:
                raise ValueError(f"rows must be two numbers of rows, (least, most); got {rows!r}.")
            if not self.exchangeable and given != (self.size, self.size):
                self._explain_fixed(given)
            self.target_of(given[1])
            return given[0], given[1]
        if not self.exchangeable or (self.varying and not self._rows_vary()):
            return self.size, self.size
        least, most = max(1, int(FEWER * self.size)), int(MORE * self.size)
        try:
            self.target_of(most)
            if is_part(self, least, most):
                return least, most
        except (ModelError, RuntimeError, ValueError, IndexError) as error:
            self.notes.append(f"the number of rows is fixed at {self.size}: {error}")
        return self.size, self.size

    def _rows_vary(self) -> bool:
        """Whether all arguments of rows are among those that vary or are observed."""
        held = [n for n, t in self.leaves.items() if t.shape[:1] == (self.size,)]
        return all(name in self.varying or name in self.data_leaves for name in held)

    def _explain_fixed(self, rows: tuple[int, ...]) -> None:
        own = [n for n in self.target.sites if self.plate in self.target.dims[n]]
        if own:
            raise ModelError(
                f"Site '{own[0]}' has a value for each row of plate '{self.plate}': a latent that "
                f"grows with the data is not amortized over numbers of rows, and rows={rows} asks "
                "for several. Leave rows out."
            )
        raise ModelError(
            f"rows={rows} asks for data sets of several sizes, but the order of the rows of "
            f"{self.name} matters: put exchangeable rows in a plate, with their covariates as "
            "arguments."
        )


def _finite(t: Tensor) -> Tensor:
    """Whether all numbers of each draw are finite, (n)."""
    return t.isfinite().reshape(len(t), -1).all(-1)


def _named(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
