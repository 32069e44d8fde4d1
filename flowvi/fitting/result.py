"""Results of a fit: of global latents, of latents of rows, and of both."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi.draws.draws import Draws, scored
from flowvi.draws.row_bounds import RowBounds, row_bounds
from flowvi.draws.row_sampling import BOUNDS, DRAWING, row_draws
from flowvi.draws.sampling import draw, in_pieces, tabulate
from flowvi.guides.guide import Guide
from flowvi.initialization.gaussian import Gaussian
from flowvi.objectives.nested import Nested
from flowvi.objectives.renyi_bound import Renyi
from flowvi.runtime import memory
from flowvi.runtime.rng import own_randomness, stream
from flowvi.targets import Batch, LocalTarget, Target
from flowvi.targets.precision import spelled
from flowvi.training.nested import NUMBERS


@dataclass
class RowFit:
    """The result of a fit of local latents.

    Attributes:
        target: The log densities of rows; parameters of the model are trained.
        guide: A density for every row.
        history: Per epoch: bound, validation, divergence, lr, beta, skipped, seconds.
        log: What was chosen, and why.
        meta: JSON-able facts: guide, objective, epochs, batch_size, seed, seconds ...
    """

    target: LocalTarget
    guide: Guide
    history: dict[str, np.ndarray]
    log: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def iw_bound(
        self,
        data: Any = None,
        particles: int = 5000,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        progress: bool = False,
        max_memory: memory.MaxMemory = None,
    ) -> RowBounds:
        """Importance-weighted bounds of rows, in pieces that fit memory.

        Args:
            data: Rows, as the model was given them; those that it was fitted to without.
            particles: Number of draws K for each row.
            seed: Seed of the draws; the caller's generators are left alone.
            rows: Places of some of the rows that it was fitted to, in place of data.
            progress: Show a bar, if the error stream is a terminal.
            max_memory: As for `Fit.draw`.
        """
        batch = self._rows(data, rows)
        seed = stream(seed, BOUNDS)
        with memory.limited(max_memory):
            return row_bounds(self.target, self.guide, batch, particles, seed, progress)

    def draw(
        self,
        n: int = 1000,
        data: Any = None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        max_memory: memory.MaxMemory = None,
    ) -> Draws:
        """Draw the latents of rows.

        Args:
            n: Draws for each row.
            data: Rows, as the model was given them; those that it was fitted to without.
            seed: Seed of the draws; the caller's generators are left alone.
            rows: Places of some of the rows that it was fitted to, in place of data.
            max_memory: As for `Fit.draw`.
        """
        batch = self._rows(data, rows)
        seed = stream(seed, DRAWING)
        with memory.limited(max_memory):
            return row_draws(self.target, self.guide, batch, n, seed, self.meta)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fit to a folder, without pickle; `flowvi.load` reads it back."""
        from flowvi.fitting.fit_folder import save_rows

        return save_rows(self, folder)

    def __str__(self) -> str:
        words = "{name}: {guide} guide, {objective}, {epochs} epochs, {seconds:.1f} s, {precision}"
        facts = {"precision": spelled(self.target.dtype), **self.meta}
        head = words.format(name=self.target.name, **facts)
        return "\n".join([head, *(f"  {line}" for line in self.log)])

    def _rows(self, data: Any, rows: Sequence[int] | None) -> Batch:
        if data is not None and rows is not None:
            raise ValueError("Give data or rows, not both: rows are places in the fitted data.")
        return self.target.batch(rows) if data is None else self.target.as_batch(data)


BUILD, TRAIN, DRAW, BEGIN = range(4)


@dataclass
class NestedFit:
    """The result of a nested fit.

    Attributes:
        density: The density over theta, with the inner guide.
        guide: The guide of theta.
        particles: Draws K of each row's latents.
        history: Bound at each step.
        meta: JSON-able facts: model, guide, inner, particles, outer, batch_size, steps, seed ...
        log: What was decided, and why.
    """

    density: Nested
    guide: Guide
    particles: int
    history: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def draw(self, n: int = 1000, particles: int | None = None, seed: int = 0) -> Draws:
        """Draw theta, and evaluate the bound of all rows there.

        `log_p` is log p(theta) plus the log of an unbiased estimate of the likelihood, from
        K draws of each row: weights p / q estimate the evidence without bias, their mean
        logarithm is the ELBO outside of the IW bound inside, and `bounds` and `diagnose` hold.

        Args:
            n: Draws of theta.
            particles: Draws K of each row's latents; as many as in the fit without.
            seed: Of all draws.
        """
        target = self.density.target
        assert target.shared is not None
        bound = Renyi(0.0, particles or self.particles, "total")
        with torch.no_grad(), own_randomness(stream(seed, DRAW)):
            theta, log_q = self.guide.sample((n,))
            log_p = target.shared.log_prob(theta) + self._rows(theta, target.batch(), bound).sum(-1)
            values = target.shared.constrain(theta)
        shared = copy.copy(target.shared)
        shared.observed = target.observations()
        return Draws(
            _array(theta)[None],
            *scored(_array(log_p)[None], _array(log_q)[None]),
            {name: _array(value)[None] for name, value in values.items()},
            shared,
            {**self.meta, "particles": particles or self.particles},
        )

    def predictive_bound(
        self, data: Any, n: int = 100, particles: int | None = None, seed: int = 0
    ) -> np.ndarray:
        r"""Lower bounds on the log predictive density of rows, averaged over theta, (rows).

        .. math:: \log \tfrac{1}{M} \sum_m p_K(x \mid \theta_m), \qquad \theta_m \sim q

        Args:
            data: Rows, as the model was given them.
            n: Draws M of theta.
            particles: Draws K of each row's latents.
            seed: Of all draws.
        """
        bound = Renyi(0.0, particles or self.particles, "total")
        with torch.no_grad(), own_randomness(stream(seed, DRAW)):
            theta, _ = self.guide.sample((n,))
            rows = self._rows(theta, self.density.target.as_batch(data), bound)
        return _array(torch.logsumexp(rows.double(), 0) - math.log(n))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write both guides and the model's own parameters; `flowvi.load` reads them back."""
        from flowvi.fitting.fit_folder import save_nested

        return save_nested(self, folder)

    def __str__(self) -> str:
        words = "{model}: {guide} guide of theta, {inner} of rows, {steps} steps, K = {particles}"
        return "\n".join([words.format(**self.meta), *(f"  {line}" for line in self.log)])

    def _rows(self, theta: Tensor, batch: Batch, bound: Renyi) -> Tensor:
        """Bounds of many rows in pieces that fit memory, (T, B)."""
        size = max(1, NUMBERS // (bound.particles * len(theta) * self.density.target.dim))
        pieces = [
            Batch(places, tuple(t[start : start + size] for t in batch.data))
            for start, places in _split(batch.places, size)
        ]
        return torch.cat([self.density.rows(theta, piece, bound) for piece in pieces], -1)


def _array(t: Tensor) -> np.ndarray:
    found: np.ndarray = t.cpu().numpy()
    return found


def _split(places: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(places), size):
        yield first, places[first : first + size]


# The stream of random numbers of `draw_start`.
START = 1_000_000


@dataclass
class Fit:
    """The result of a fit.

    Attributes:
        target: What was approximated.
        guides: One guide for each restart.
        bounds: The bound of each guide on common fresh draws.
        history: Per step of all restarts: bound, grad_norm, lr, skipped, restart.
        log: What was chosen, and why.
        meta: JSON-able facts: guide, objective, steps, particles, lr, seed, seconds ...
        chains: Draws of Markov chains in the space of the best guide, where nothing else
            was to be trusted.
        start: The Gaussian that the best restart began with; None for a loaded fit.
    """

    target: Target
    guides: list[Guide]
    bounds: list[float]
    history: dict[str, np.ndarray]
    log: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    chains: Draws | None = None
    start: Gaussian | None = None

    @property
    def guide(self) -> Guide:
        """The guide with the best bound."""
        return self.guides[int(np.argmax(self.bounds))]

    def draw(self, n: int = 4000, seed: int = 0, max_memory: memory.MaxMemory = None) -> Draws:
        """Draw from every restart's guide and evaluate the target there.

        Where the fit ended in Markov chains their draws are returned, which have no
        weights; those of the guide are in their attribute `weighted`.

        Args:
            n: Draws from each guide, or at most from each chain.
            seed: Seed of the draws; the caller's generators are left alone.
            max_memory: What this may take, in bytes or as in "2GB"; FLOWVI_MAX_MEMORY, or 1 GB,
                by default. A table that is larger lies in a temporary file. The draws do
                not depend on it, and densities to rounding.
        """
        with memory.limited(max_memory):
            drawn = draw(self.target, self.guides, n, seed, self.meta)
        if self.chains is None:
            return drawn
        return replace(self.chains.thinned(n), weighted=drawn)

    def draw_start(self, n: int = 1000, seed: int = 0) -> Draws:
        """Draw from the Gaussian that the fit began with, to see what the guide adds.

        Args:
            n: Number of draws.
            seed: Seed of the draws; the caller's generators are left alone.

        Raises:
            ValueError: The fit was loaded, and a saved fit does not hold its start.
        """
        if self.start is None:
            raise ValueError("This fit was loaded: its Gaussian start was not saved.")
        with torch.no_grad(), own_randomness(stream(seed, START)):
            pieces = in_pieces(self.start.draw, n)
            return tabulate(self.target, n, [pieces], {"guide": "Gaussian start"})

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fit to a folder, without pickle; `flowvi.load` reads it back."""
        from flowvi.fitting.fit_folder import save_fit

        return save_fit(self, folder)

    def __str__(self) -> str:
        words = "{name}: {guide} guide, {objective}, {steps} steps, {seconds:.1f} s, {precision}"
        facts = {"precision": spelled(self.target.dtype), **self.meta}
        head = words.format(name=self.target.name, **facts)
        return "\n".join([head, *(f"  {line}" for line in self.log)])
