"""Results of fits: guides, history, and draws."""

from __future__ import annotations

import copy
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flowvi.draws.draws import Draws
from flowvi.draws.prefixes import PrefixTable, prefix_table
from flowvi.draws.row_bounds import RowBounds, row_bounds
from flowvi.draws.row_sampling import BOUNDS, DRAWING, row_draws
from flowvi.draws.sampling import draw, in_pieces, tabulate
from flowvi.fitting.fit_folder import NESTED, ROWS, Contents, all_latents, save
from flowvi.fitting.identity import latents
from flowvi.guides.guide import Guide
from flowvi.guides.prefixes import depth_of, prefix_of
from flowvi.initialization.gaussian import GaussianApproximation
from flowvi.objectives.nested import NestedTarget
from flowvi.objectives.renyi_bound import Renyi
from flowvi.runtime import memory
from flowvi.runtime.display import Displayed
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.targets import Batch, LocalTarget, Target
from flowvi.targets.precision import dtype_name

# Random streams: for `draw_start`, and for draws of a nested fit.
START, NESTED_DRAWS = 1_000_000, 2
# Findings on the draws of a whole guide.
OF_ALL_LAYERS = ("check", "bridge")


class AnyFit(Displayed, ABC):
    """Base class of all fits. Abstract.

    Attributes:
        target: The log density, with its trained parameters.
        history: Columns with one number for each step or epoch.
        log: Decisions and their reasons.
        meta: JSON-able facts.
    """

    target: Any
    history: dict[str, np.ndarray]
    log: list[str]
    meta: dict[str, Any]

    # Format of the first line of `str(fit)`, filled from `meta`.
    HEAD: ClassVar[str]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fit to a folder, without pickle; `flowvi.load` reads it back."""
        return save(self.contents(), folder)

    @abstractmethod
    def contents(self) -> Contents:
        """The contents that `save` writes."""

    def __str__(self) -> str:
        facts = {"name": self.target.name, "precision": dtype_name(self.target.dtype), **self.meta}
        return "\n".join([self.HEAD.format(**facts), *(f"  {line}" for line in self.log)])


@dataclass(repr=False)
class Fit(AnyFit):
    """The result of a fit.

    Attributes:
        target: The approximated log density.
        guides: One guide for each restart.
        bounds: The bound of each guide on common fresh draws.
        history: Per step of all restarts: bound, grad_norm, lr, skipped, restart.
        log: Decisions and their reasons.
        meta: JSON-able facts: guide, objective, steps, particles, lr, seed, seconds ...
        chains: Draws of Markov chains in the space of the best guide, if no guide was
            trusted.
        start: The initial Gaussian of the best restart; None for a loaded fit.
    """

    target: Target
    guides: list[Guide]
    bounds: list[float]
    history: dict[str, np.ndarray]
    log: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    chains: Draws | None = None
    start: GaussianApproximation | None = None

    HEAD = "{name}: {guide} guide, {objective}, {steps} steps, {seconds:.1f} s, {precision}"

    @property
    def guide(self) -> Guide:
        """The guide with the best bound."""
        return self.guides[int(np.argmax(self.bounds))]

    def draw(
        self,
        n: int = 4000,
        seed: int = 0,
        max_memory: memory.MaxMemory = None,
        layers: int | None = None,
    ) -> Draws:
        """Draw from the guide of every restart, and evaluate the target at the draws.

        If the fit ended with Markov chains, their draws are returned, without weights.
        Their attribute `weighted` holds the draws of the guide.

        Args:
            n: Number of draws from each guide, or largest number from each chain.
            seed: Seed of the draws; the global generators are not changed.
            max_memory: Memory limit, in bytes or as in "2GB"; FLOWVI_MAX_MEMORY, or 1 GB, by
                default. A larger table is stored in a temporary file. The draws do not
                depend on it, and their densities only to rounding.
            layers: Number of layers to draw with, from 0, of a guide of `Prefixes`; all by
                default. Fewer are quicker and less accurate: see `prefixes`.

        Raises:
            ValueError: The guide was not made for prefixes, or has fewer layers.
        """
        guides, meta = self.guides, self.meta
        if layers is not None:
            whole = layers == depth_of(self.guide)
            guides = [prefix_of(guide, layers) for guide in guides]
            # The check of the fit is of all layers.
            kept = {k: v for k, v in meta.items() if whole or k not in OF_ALL_LAYERS}
            meta = {**kept, "layers": layers}
        with memory.memory_limit(max_memory):
            drawn = draw(self.target, guides, n, seed, meta)
        if self.chains is None or layers is not None:
            return drawn
        return replace(self.chains.thinned(n), weighted=drawn)

    def prefixes(self, n: int = 4000, seed: int = 0) -> PrefixTable:
        """The bound of every prefix of a guide of `Prefixes`, and the time of its draws.

        Args:
            n: Number of draws of each.
            seed: Seed of the draws, the same for all.

        Raises:
            ValueError: The guide was not made for prefixes.
        """
        return prefix_table(self.guides, lambda layers: self.draw(n, seed, layers=layers))

    def draw_start(self, n: int = 1000, seed: int = 0) -> Draws:
        """Draw from the initial Gaussian of the fit, for a comparison with the guide.

        Args:
            n: Number of draws.
            seed: Seed of the draws; the global generators are not changed.

        Raises:
            ValueError: The fit was loaded; a saved fit does not contain its start.
        """
        if self.start is None:
            raise ValueError("This fit was loaded: its Gaussian start was not saved.")
        with torch.no_grad(), isolated_rng(derive_seed(seed, START)):
            pieces = in_pieces(self.start.draw, n)
            return tabulate(self.target, n, [pieces], {"guide": "Gaussian start"})

    def contents(self) -> Contents:
        return Contents(
            self.guides,
            self.target.own_state(),
            self.history,
            latents(self.target),
            self.log,
            self.meta,
            bounds=self.bounds,
            chains=self.chains,
        )


@dataclass(repr=False)
class NestedFit(Fit):
    """The result of a fit with shared latents and latents of each row.

    Attributes:
        target: The density over the shared latents theta, with the inner guide.
        guides: The guide of theta.
    """

    target: NestedTarget

    HEAD = "{name}: {guide} guide of theta, {inner} of rows, {steps} steps, K = {particles}"

    @property
    def density(self) -> NestedTarget:
        """The target: the density over theta, with the inner guide."""
        return self.target

    @property
    def particles(self) -> int:
        """Number of draws K of each row's latents."""
        return self.target.particles

    def draw(  # type: ignore[override]
        self,
        n: int = 1000,
        particles: int | None = None,
        seed: int = 0,
        max_memory: memory.MaxMemory = None,
        layers: int | None = None,
    ) -> Draws:
        """Draw theta, and evaluate the bound of all rows at the draws.

        `log_p` is log p(theta) plus the log of an unbiased estimate of the likelihood from K
        draws of each row. The weights p / q thus estimate the evidence without bias, and the mean
        log weight is the ELBO over theta of the inner IW bound. `bounds` and `diagnose` apply.

        Args:
            n: Number of draws of theta.
            particles: Number of draws K of each row's latents; that of the fit by default.
            seed: Seed of all draws.
            max_memory: As for `Fit.draw`.
            layers: As for `Fit.draw`.
        """
        guide = self.guide if layers is None else prefix_of(self.guide, layers)
        with memory.memory_limit(max_memory):
            return draw_nested(
                self.target, guide, n, particles, derive_seed(seed, NESTED_DRAWS), self.meta
            )

    def prefixes(self, n: int = 1000, seed: int = 0) -> PrefixTable:
        return prefix_table(self.guides, lambda layers: self.draw(n, seed=seed, layers=layers))

    def predictive_bound(
        self, data: Any, n: int = 100, particles: int | None = None, seed: int = 0
    ) -> np.ndarray:
        r"""Lower bounds on the log predictive density of rows, averaged over theta, (rows).

        .. math:: \log \tfrac{1}{M} \sum_m p_K(x \mid \theta_m), \qquad \theta_m \sim q

        Args:
            data: Rows, in the form that the model takes.
            n: Number of draws M of theta.
            particles: Number of draws K of each row's latents.
            seed: Seed of all draws.
        """
        bound = Renyi(0.0, particles or self.particles, "total")
        with torch.no_grad(), isolated_rng(derive_seed(seed, NESTED_DRAWS)):
            theta, _ = self.guide.sample((n,))
            rows = self.target.every_row(theta, self.target.target.as_batch(data), bound)
        found: np.ndarray = torch.logsumexp(rows.double(), 0).sub(math.log(n)).cpu().numpy()
        return found

    def contents(self) -> Contents:
        rows = self.target.target
        return (
            super()
            .contents()
            ._replace(
                guides=[self.guide, self.target.inner],
                own=dict(rows.named_parameters()),
                latents=all_latents(rows),
                kind=NESTED,
            )
        )


def draw_nested(
    target: NestedTarget,
    guide: Guide,
    n: int,
    particles: int | None,
    seed: int,
    meta: dict[str, Any],
) -> Draws:
    """Draw theta, evaluate the bound of all rows, and return a table of the shared latents.

    Args:
        target: The density over theta.
        guide: The guide of theta.
        n: Number of draws.
        particles: Number of draws of each row's latents; that of the target by default.
        seed: Seed of all draws.
        meta: JSON-able facts about the fit.
    """
    bound = Renyi(0.0, particles or target.particles, "total")
    facts = {**meta, "particles": bound.particles}
    with torch.no_grad(), isolated_rng(seed):
        theta, log_q = guide.sample((n,))
        parts = theta.split(target.chunk())
        log_p = torch.cat([target.log_prob(part, None, bound) for part in parts])
        shared = copy.copy(target.shared)
        shared.observed = target.target.observations()
        table = tabulate(shared, n, [[(theta, log_q)]], facts)
    values = log_p.double().cpu().numpy()[None]
    inside = np.isfinite(values) & np.isfinite(table.log_p)
    return replace(table, log_p=np.where(inside, values, -np.inf))


@dataclass(repr=False)
class RowFit(AnyFit):
    """The result of a fit of local latents.

    Attributes:
        target: The log densities of rows, with the model's trained parameters.
        guide: A density for every row.
        history: Per epoch: bound, validation, divergence, lr, beta, skipped, seconds.
        log: Decisions and their reasons.
        meta: JSON-able facts: guide, objective, epochs, batch_size, seed, seconds ...
    """

    target: LocalTarget
    guide: Guide
    history: dict[str, np.ndarray]
    log: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    HEAD = "{name}: {guide} guide, {objective}, {epochs} epochs, {seconds:.1f} s, {precision}"

    def iw_bound(
        self,
        data: Any = None,
        particles: int = 5000,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        progress: bool = False,
        max_memory: memory.MaxMemory = None,
        layers: int | None = None,
    ) -> RowBounds:
        """Importance-weighted bounds of rows, in parts that fit in memory.

        Args:
            data: Rows, in the form that the model takes; the rows of the fit by default.
            particles: Number of draws K for each row.
            seed: Seed of the draws; the global generators are not changed.
            rows: Indices of rows of the fit, in place of data.
            progress: Whether to show the progress: one bar in a terminal or a notebook, and a line
                every 10 seconds elsewhere.
            max_memory: As for `Fit.draw`.
            layers: As for `Fit.draw`.
        """
        batch, guide = self._rows(data, rows), self._at_depth(layers)
        seed = derive_seed(seed, BOUNDS)
        with memory.memory_limit(max_memory):
            return row_bounds(self.target, guide, batch, particles, seed, progress)

    def draw(
        self,
        n: int = 1000,
        data: Any = None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        max_memory: memory.MaxMemory = None,
        layers: int | None = None,
    ) -> Draws:
        """Draw the latents of rows.

        Args:
            n: Number of draws for each row.
            data: Rows, in the form that the model takes; the rows of the fit by default.
            seed: Seed of the draws; the global generators are not changed.
            rows: Indices of rows of the fit, in place of data.
            max_memory: As for `Fit.draw`.
            layers: As for `Fit.draw`.
        """
        batch, guide = self._rows(data, rows), self._at_depth(layers)
        seed = derive_seed(seed, DRAWING)
        with memory.memory_limit(max_memory):
            return row_draws(self.target, guide, batch, n, seed, self.meta)

    def contents(self) -> Contents:
        own, sites = self.target.own_state(), latents(self.target)
        return Contents([self.guide], own, self.history, sites, self.log, self.meta, ROWS)

    def _at_depth(self, layers: int | None) -> Guide:
        return self.guide if layers is None else prefix_of(self.guide, layers)

    def _rows(self, data: Any, rows: Sequence[int] | None) -> Batch:
        if data is not None and rows is not None:
            raise ValueError("Give data or rows, not both: rows are places in the fitted data.")
        return self.target.batch(rows) if data is None else self.target.as_batch(data)
