"""The density of latents that all rows share, with a bound over the latents of rows inside."""

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

# Hidden units of the network that mixes a row and theta.
MIXING = 64
# Draws by which guides are compared, and numbers of the latents of rows that these may take.
FEWEST_DRAWS, MOST_DRAWS, NUMBERS = 30, 500, 2_000_000
# Draws behind the verdict, and numbers of latents of rows beyond which there is none.
CHECKED, FEWEST_CHECKED, MOST_CHECKED = 1000, 100, 200_000_000


class NestedTarget(Target):
    r"""A log density over theta whose likelihood is itself a bound over the latents of rows.

    .. math::
        \log p(\theta) + \frac{N}{B} \sum_{n \in B} L_K(x_n \mid \theta), \qquad
        L_K = \log \frac{1}{K} \sum_k \frac{p(x_n, z_{nk} \mid \theta)}{q(z_{nk} \mid x_n, \theta)}

    Each L_K is below :math:`\log p(x_n \mid \theta)` in expectation, and the scale N / B stands
    outside of it: an ELBO over theta of this is a lower bound on the evidence, and unbiased
    under minibatches. The guide of a row is part of the target: its parameters are trained with
    the guide of theta, by `flowvi.fit`.

    Args:
        target: A model with local latents and latents that all rows share.
        inner: Guide of a row's latents: a name, or an amortised guide that goes on from where it
            is. The context of one of your own is that of the row, then theta where `sees_theta`.
        particles: Draws K of each row's latents.
        sees_theta: Whether the inner guide is q(z | x, theta) or q(z | x).
        batch_size: Rows of a step; all of them without.

    Attributes:
        shared: The log density of theta alone.
        dtype: Precision of theta.

    Raises:
        ValueError: The model has no shared latents, or the guide is one of other latents.
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
        # Whether the bound stands in a weight of the bound over theta, and not alone.
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
            self.made = partial(_made_again, target.made, inner, particles, sees_theta, batch_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.shared.dtype

    @property
    def device(self) -> torch.device:
        return self.shared.device

    @property
    def within(self) -> Renyi:
        """The bound over the latents of a row.

        The score of the inner guide has mean zero where this bound stands alone, and not where
        the same draws are in a weight of the outer bound.
        """
        return Renyi(0.0, self.particles, "total" if self.weighted else "dreg")

    def rows(self, theta: Tensor, batch: Batch, bound: Renyi | None = None) -> Tensor:
        """Bounds on the log likelihood of rows. (T, G) -> (T, B).

        Args:
            theta: Unconstrained values of the shared latents.
            batch: The rows.
            bound: Over the latents of a row; that of the fit without.
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
        """An estimate of the density, without bias on the natural scale. (*S, G) -> (*S).

        Args:
            z: Unconstrained values of the shared latents theta.
            batch: A `Batch` of rows, or plate -> their places; all rows without.
            bound: Over the latents of a row; that of the fit without.
        """
        if isinstance(batch, Mapping):
            (places,) = batch.values() if batch else [torch.arange(self.target.rows)]
            batch = self.target.batch(places.cpu())
        rows = self.target.batch() if batch is None else batch
        theta = z.reshape(-1, self.dim)
        # N / B multiplies the bounds, not the weights in them.
        scale = self.target.rows / len(rows.places)
        total = sum(found.to(z.dtype).sum(-1) for found in self._in_pieces(theta, rows, bound))
        return (self.shared.log_prob(theta) + scale * total).reshape(z.shape[:-1])

    def every_row(self, theta: Tensor, batch: Batch, bound: Renyi | None = None) -> Tensor:
        """Bounds of many rows, in pieces that fit memory. (T, G) -> (T, B)."""
        return torch.cat(list(self._in_pieces(theta, batch, bound)), -1)

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
        """Parameters of the model and the inner guide, and buffers of that."""
        buffers = {f"inner.{name}": b for name, b in self.inner.named_buffers()}
        return {**dict(self.named_parameters()), **buffers}

    def chunk(self) -> int:
        """How many values of theta to evaluate at a time: the same whatever `max_memory` is.

        The draws of rows do not depend on it: they are made in pieces of one size.
        """
        return max(1, self._drawn_at_once // len(self._places))

    def at_once(self) -> int:
        """How many draws of theta a step may evaluate at a time, of the rows of one step."""
        return max(
            1, self._step_cost.points_within(memory.evaluation_bytes(), memory.ANY) // self.size
        )

    def evaluation_draws(self, outer: int) -> int:
        """By how many draws guides are compared, where a bound over theta takes `outer` each."""
        fit = NUMBERS // (len(self._places) * self.particles * self.target.dim)
        return max(FEWEST_DRAWS * outer, int(np.clip(fit, FEWEST_DRAWS, MOST_DRAWS)))

    def check_draws(self) -> int:
        """By how many draws the result is judged; none where all rows would take too long."""
        each = self.target.rows * self.particles * self.target.dim
        draws = int(np.clip(MOST_CHECKED // (10 * each), FEWEST_CHECKED, CHECKED))
        return draws if draws * each <= MOST_CHECKED else 0

    def facts(self) -> dict[str, Any]:
        """JSON-able facts about the bound over the latents of rows."""
        return {"inner": self.inner_name, "particles": self.particles, "batch_size": self.size}

    def spec(self) -> dict[str, Any]:
        """What the inner guide is built again from."""
        mixes = isinstance(self.inner, SharedAmortised)
        return {"name": self.inner_name, "sees_theta": self.sees_theta, "mixes": mixes}

    def __repr__(self) -> str:
        rows = f"{self.target.rows} rows, K = {self.particles}"
        return f"NestedTarget({self.name}: D = {self.dim} shared; {rows})"

    # Pairs of a value of theta and a row, and the memory that they take.

    @cached_property
    def _step_cost(self) -> memory.Cost:
        """Memory of an evaluation with gradients."""
        with torch.enable_grad():
            return self._cost(lambda theta, batch: self.rows(theta.requires_grad_(), batch))

    @cached_property
    def _drawn_at_once(self) -> int:
        """How many pairs have their latents drawn at a time."""
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
        """Memory of an evaluation for any number of pairs, and for each of them."""
        theta = self.shared.starts(torch.Generator(self.device).manual_seed(0))[:1].detach()

        def some(n: int) -> object:
            return evaluate(theta.clone(), self.target.batch(torch.arange(n) % self.target.rows))

        # What is recorded of the model does not depend on when this is measured.
        seen = self.uses()
        with isolated_rng():
            found = memory.measure_cost(some)
        self.begin(seen)
        return found

    def _rows_at_once(self, thetas: int, rows: int) -> int:
        """How many rows to evaluate at a time, at the draws that were made for all of them."""
        if torch.is_grad_enabled():
            return rows
        fits = self._density_cost.points_within(memory.evaluation_bytes(), memory.ANY)
        return max(1, min(rows, fits // thetas))

    def _in_pieces(self, theta: Tensor, batch: Batch, bound: Renyi | None) -> list[Tensor]:
        """Bounds of rows, (T, B') each; in one piece where a gradient is wanted of all of them."""
        many = len(batch.places)
        size = many if torch.is_grad_enabled() else max(1, self._drawn_at_once // len(theta))
        return [self.rows(theta, piece, bound) for piece in split_batch(batch, size)]


def inner_guide(target: LocalTarget, name: str, sees_theta: bool, mixes: bool) -> Amortised:
    """A fresh guide of a row's latents, by name.

    Args:
        target: The model.
        name: Row of `GUIDES` or `FLOWS`.
        sees_theta: Whether it is given theta.
        mixes: Whether it follows products of the row and theta; earlier versions did not.
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


def _made_again(make: Any, inner: str | Amortised, *rest: Any) -> NestedTarget:
    """The same target in another process; its parameters come beside it."""
    return NestedTarget(make(), inner, *rest)


def check_outer(target: NestedTarget, outer: int) -> None:
    """Refuse weights of theta that hold some of the rows only."""
    if outer > 1 and target.subsampled:
        raise ValueError(
            f"With outer = {outer}, every weight of theta needs all {target.target.rows} rows: of "
            f"batches of {target.size} it would be no bound, because N / B does not commute with "
            "log-mean-exp, and it can exceed the evidence. Use outer=1, or leave out batch_size."
        )
