"""The log density of shared latents, with a bound over the latents of rows as likelihood."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi.flows.nets import Perceptron
from flowvi.guides.amortized import Amortised, SharedAmortised
from flowvi.guides.recipes import amortised
from flowvi.guides.registry import guide_names, make_guide
from flowvi.objectives.renyi_bound import Renyi
from flowvi.runtime import memory
from flowvi.runtime.arguments import check_choice, check_integer, check_type, optional
from flowvi.runtime.rng import isolated_rng
from flowvi.targets import Batch, LocalTarget, Target
from flowvi.targets.local.rows import split_batch

# Hidden units of the network that combines a row and theta.
MIXING = 64
# Least and largest number of draws for comparisons, and limit on the row latents they need.
FEWEST_DRAWS, MOST_DRAWS, NUMBERS = 30, 500, 2_000_000
# Number of draws for the verdict, its least value, and the limit on the row latents they need.
CHECKED, FEWEST_CHECKED, MOST_CHECKED = 1000, 100, 200_000_000


class NestedTarget(Target):
    r"""A log density over theta whose likelihood is a bound over the latents of rows.

    .. math::
        \log p(\theta) + \frac{N}{B} \sum_{n \in B} L_K(x_n \mid \theta), \qquad
        L_K = \log \frac{1}{K} \sum_k \frac{p(x_n, z_{nk} \mid \theta)}{q(z_{nk} \mid x_n, \theta)}

    Each L_K is below :math:`\log p(x_n \mid \theta)` in expectation, and N / B multiplies the
    bounds. The ELBO over theta of this density is therefore a lower bound on the evidence, unbiased
    under minibatches. The guide of a row is part of the target: `flowvi.fit` trains its parameters
    with the guide of theta.

    Args:
        target: A model with local latents and shared latents.
        inner: Guide of a row's latents: a name, or an amortised guide that keeps its parameters.
            The context of a given guide is that of the row, followed by theta if `sees_theta`.
        particles: Number of draws K of each row's latents.
        sees_theta: Whether the inner guide is q(z | x, theta) or q(z | x).
        batch_size: Number of rows of a step; all rows by default.

    Attributes:
        shared: The log density of theta alone.
        dtype: Precision of theta.

    Raises:
        ValueError: The model has no shared latents, or the guide does not suit the row latents.
    """

    stochastic = True

    def __init__(
        self,
        target: LocalTarget,
        inner: str | Amortised = "realnvp",
        particles: int = 8,
        sees_theta: bool = True,
        batch_size: int | None = None,
    ) -> None:
        check_type(
            "target", target, LocalTarget, "of a model with a local plate: from_pyro(..., local=)"
        )
        particles, batch_size = (
            check_integer("particles", particles),
            optional(check_integer, "batch_size", batch_size),
        )
        if target.shared is None:
            raise ValueError(
                f"{target.name} has no latents outside plate '{target.plate}': flowvi.fit(target) "
                "fits the latents of rows alone."
            )
        super().__init__()
        shared = target.shared
        self.target, self.shared, self.sees_theta = target, shared, sees_theta
        self.particles, self.size = particles, min(batch_size or target.rows, target.rows)
        self.name, self.dim, self.sites, self.slices = (
            target.name,
            shared.dim,
            shared.sites,
            shared.slices,
        )
        self.dims, self.coords, self.deterministics = (
            shared.dims,
            shared.coords,
            shared.deterministics,
        )
        self.observed, self.improper, self.messages = {}, shared.improper, shared.messages
        self.inner_name = inner if isinstance(inner, str) else "own"
        self.inner = _inner(target, inner, sees_theta)
        # Whether the bound is inside a weight of the bound over theta.
        self.weighted = False
        if self.size < target.rows:
            self.subsampled = {target.plate: (target.rows, self.size)}
        fewest = FEWEST_DRAWS * particles * target.dim
        some = max(self.size, NUMBERS // fewest)
        generator = torch.Generator().manual_seed(0)
        everything = torch.randperm(target.rows, generator=generator)
        # Guides are compared on the same rows.
        self._places = everything[: some if self.subsampled else None].sort().values
        if target.made is not None:
            self.made = partial(_rebuild, target.made, inner, particles, sees_theta, batch_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.shared.dtype

    @property
    def device(self) -> torch.device:
        return self.shared.device

    @property
    def within(self) -> Renyi:
        """The bound over the latents of a row.

        The score of the inner guide has mean zero if this bound is used alone, but not if
        the same draws are part of a weight of the outer bound.
        """
        return Renyi(0.0, self.particles, "total" if self.weighted else "dreg")

    def rows(self, theta: Tensor, batch: Batch, bound: Renyi | None = None) -> Tensor:
        """Bounds on the log likelihood of rows. (T, G) -> (T, B).

        Args:
            theta: Unconstrained values of the shared latents.
            batch: The rows.
            bound: Bound over the latents of a row; that of the fit by default.
        """
        seen = self.inner.context(batch)
        context = seen.expand(len(theta), *seen.shape)
        if self.sees_theta and isinstance(self.inner, SharedAmortised):
            context = self.inner.joint_context(seen, theta)
        elif self.sees_theta:
            shared = theta.to(seen.dtype).unsqueeze(1).expand(*context.shape[:-1], -1)
            context = torch.cat([context, shared], -1)

        def log_p(z: Tensor) -> Tensor:
            size = self._rows_at_once(len(theta), len(batch.places))
            parts = zip(z.split(size, -2), split_batch(batch, size), strict=True)
            found = [self.target.log_prob(some, part, theta) for some, part in parts]
            return found[0] if len(found) == 1 else torch.cat(found, -1)

        return (bound or self.within)(log_p, self.inner.guide, context).bound

    def log_prob(self, z: Tensor, batch: Any = None, bound: Renyi | None = None) -> Tensor:
        """Estimate the log density; unbiased on the natural scale. (*S, G) -> (*S).

        Args:
            z: Unconstrained values of the shared latents theta.
            batch: A `Batch` of rows, or a mapping from plate to indices; all rows by default.
            bound: Bound over the latents of a row; that of the fit by default.
        """
        if isinstance(batch, Mapping):
            (places,) = batch.values() if batch else [torch.arange(self.target.rows)]
            batch = self.target.batch(places.cpu())
        rows = self.target.batch() if batch is None else batch
        theta = z.reshape(-1, self.dim)
        # N / B multiplies the bounds, not the weights inside them.
        scale = self.target.rows / len(rows.places)
        total = sum(found.to(z.dtype).sum(-1) for found in self._in_pieces(theta, rows, bound))
        return (self.shared.log_prob(theta) + scale * total).reshape(z.shape[:-1])

    def every_row(self, theta: Tensor, batch: Batch, bound: Renyi | None = None) -> Tensor:
        """Bounds of many rows, in parts that fit in memory. (T, G) -> (T, B)."""
        return torch.cat(self._in_pieces(theta, batch, bound), -1)

    def compared(self, z: Tensor) -> Tensor:
        return self.log_prob(z, self.target.batch(self._places))

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        return self.shared.constrain(z)

    def unconstrain(self, values: Mapping[str, Any]) -> Tensor:
        return self.shared.unconstrain(values)

    def prior(self, n: int, seed: int) -> dict[str, np.ndarray]:
        return self.shared.prior(n, seed)

    def starts(self, generator: torch.Generator) -> Tensor:
        return self.shared.starts(generator)

    def begin(self, uses: Any = ((), ())) -> None:
        for target, seen in zip((self.shared, self.target), uses or ((), ()), strict=True):
            target.begin(seen)

    def uses(self) -> Any:
        return [self.shared.uses(), self.target.uses()]

    def own_state(self) -> dict[str, Tensor]:
        """Parameters of the model and the inner guide, and buffers of the inner guide."""
        buffers = {f"inner.{name}": b for name, b in self.inner.named_buffers()}
        return {**dict(self.named_parameters()), **buffers}

    def chunk(self) -> int:
        """Number of values of theta in one call, independent of `max_memory`.

        Draws of rows are made in parts of this size, and thus do not depend on `max_memory`.
        """
        return max(1, self._drawn_at_once // len(self._places))

    def at_once(self) -> int:
        """Number of draws of theta whose step fits in memory, for the rows of one step."""
        return max(
            1, self._step_cost.points_within(memory.evaluation_bytes(), memory.ANY) // self.size
        )

    def evaluation_draws(self, outer: int) -> int:
        """Number of draws for comparisons of guides, with `outer` draws of theta in a bound."""
        fit = NUMBERS // (len(self._places) * self.particles * self.target.dim)
        return max(FEWEST_DRAWS * outer, int(np.clip(fit, FEWEST_DRAWS, MOST_DRAWS)))

    def check_draws(self) -> int:
        """Number of draws for the check; zero if all rows would take too long."""
        each = self.target.rows * self.particles * self.target.dim
        draws = int(np.clip(MOST_CHECKED // (10 * each), FEWEST_CHECKED, CHECKED))
        return draws if draws * each <= MOST_CHECKED else 0

    def facts(self) -> dict[str, Any]:
        """JSON-able facts about the bound over the latents of rows."""
        return {"inner": self.inner_name, "particles": self.particles, "batch_size": self.size}

    def spec(self) -> dict[str, Any]:
        """Arguments that rebuild the inner guide."""
        mixes = isinstance(self.inner, SharedAmortised)
        return {"name": self.inner_name, "sees_theta": self.sees_theta, "mixes": mixes}

    def __repr__(self) -> str:
        rows = f"{self.target.rows} rows, K = {self.particles}"
        return f"NestedTarget({self.name}: D = {self.dim} shared; {rows})"

    # Pairs of a value of theta and a row, and their memory.

    @cached_property
    def _step_cost(self) -> memory.Cost:
        """Memory of an evaluation with gradients."""
        with torch.enable_grad():
            return self._cost(lambda theta, batch: self.rows(theta.requires_grad_(), batch))

    @cached_property
    def _drawn_at_once(self) -> int:
        """Number of pairs whose latents are drawn in one call."""
        with torch.no_grad():
            return self._cost(self.rows).points_within(memory.PIECE, memory.ANY)

    @cached_property
    def _density_cost(self) -> memory.Cost:
        """Memory of the density of a row at its draws, without gradients."""
        dim, dtype = self.target.dim, self.target.dtype

        def density(theta: Tensor, batch: Batch) -> Tensor:
            shape = (self.particles, 1, len(batch.places), dim)
            return self.target.log_prob(theta.new_zeros(shape).to(dtype), batch, theta)

        with torch.no_grad():
            return self._cost(density)

    def _cost(self, evaluate: Callable[[Tensor, Batch], object]) -> memory.Cost:
        """Memory of an evaluation: a constant part, and a part for each pair."""
        theta = self.shared.starts(torch.Generator(self.device).manual_seed(0))[:1].detach()

        def some(n: int) -> object:
            return evaluate(theta.clone(), self.target.batch(torch.arange(n) % self.target.rows))

        # The measurement must not count as a use of the model.
        seen = self.uses()
        with isolated_rng():
            found = memory.measure_cost(some)
        self.begin(seen)
        return found

    def _rows_at_once(self, thetas: int, rows: int) -> int:
        """Number of rows in one evaluation of the density, at draws that exist for all rows."""
        if torch.is_grad_enabled():
            return rows
        fits = self._density_cost.points_within(memory.evaluation_bytes(), memory.ANY)
        return max(1, min(rows, fits // thetas))

    def _in_pieces(self, theta: Tensor, batch: Batch, bound: Renyi | None) -> list[Tensor]:
        """Bounds of rows, (T, B') each; in one part if a gradient is needed."""
        many = len(batch.places)
        size = many if torch.is_grad_enabled() else max(1, self._drawn_at_once // len(theta))
        return [self.rows(theta, piece, bound) for piece in split_batch(batch, size)]


def inner_guide(target: LocalTarget, name: str, sees_theta: bool, mixes: bool) -> Amortised:
    """A fresh guide of a row's latents, by name.

    Args:
        target: The model.
        name: Name in `GUIDES` or `FLOWS`.
        sees_theta: Whether its context includes theta.
        mixes: Whether a network combines the row and theta; earlier versions had none.
    """
    assert target.shared is not None
    built: Amortised = amortised(target, check_choice("guide", name, sorted(guide_names())))
    if sees_theta:
        seen = built.context(target.batch([0])).shape[-1]
        width = seen + target.shared.dim
        guide = make_guide(name, target.dim, width)
        if mixes:
            mix = Perceptron(target.shared.dim, width, seen, MIXING)
            built = SharedAmortised(built.encoder, guide, mix)
        else:
            built = Amortised(built.encoder, guide)
    return built.to(dtype=target.dtype, device=target.device)


def _inner(target: LocalTarget, inner: str | Amortised, sees_theta: bool) -> Amortised:
    if isinstance(inner, str):
        return inner_guide(target, inner, sees_theta, True)
    check_type("inner", inner, Amortised, "the name of a guide, or a flowvi.Amortised")
    if inner.dim != target.dim:
        raise ValueError(
            f"The inner guide has D = {inner.dim}, but a row of {target.name} has D = {target.dim}."
        )
    return copy.deepcopy(inner).to(dtype=target.dtype, device=target.device)


def _rebuild(make: Any, inner: str | Amortised, *rest: Any) -> NestedTarget:
    """Create the target in another process, without the values of its parameters."""
    return NestedTarget(make(), inner, *rest)


def check_outer(target: NestedTarget, outer: int) -> None:
    """Raise a ValueError if a weight of theta would contain a part of the rows only."""
    if outer > 1 and target.subsampled:
        raise ValueError(
            f"With outer = {outer}, every weight of theta needs all {target.target.rows} rows: of "
            f"batches of {target.size} it would be no bound, because N / B does not commute with "
            "log-mean-exp, and it can exceed the evidence. Use outer=1, or leave out batch_size."
        )
