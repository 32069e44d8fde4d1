"""The result of `amortize`: a guide of the latents of any data set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from flowvi.amortized import reading
from flowvi.amortized.network import AtData, Network
from flowvi.amortized.novelty import Novelty, Unlike
from flowvi.amortized.problem import Problem
from flowvi.amortized.reading import DataSet, read
from flowvi.amortized.training import CALIBRATE, draw_size
from flowvi.draws.draws import Draws
from flowvi.draws.sampling import DRAWING, tabulate
from flowvi.fitting.fit import fit
from flowvi.fitting.result import Fit
from flowvi.runtime import memory
from flowvi.runtime.arguments import check_integer
from flowvi.runtime.display import Displayed, later
from flowvi.runtime.rng import derive_seed, isolated_rng
from flowvi.targets import GlobalTarget, from_pyro

if TYPE_CHECKING:
    from flowvi.amortized.table import Fits

# Draws of one call of the network.
PIECE = 10_000
# Draws whose mean and covariance a fit of one data set starts at.
START_DRAWS = 1000


@dataclass(repr=False)
class AmortizedGuide(Displayed):
    """A guide that reads a data set, for all data sets of one model.

    Attributes:
        problem: The model, and what varies among its data sets.
        network: Encoder of data sets, and conditional guide of the latents.
        novelty: Distances of simulated data sets, for the test whether one is like them.
        losses: Held-out loss at steps of the training, (looks, 2): step and loss.
        log: Decisions and their reasons.
        meta: JSON-able facts: guide, objective, steps, simulations, seconds, seed ...
    """

    problem: Problem
    network: Network
    novelty: Novelty
    losses: np.ndarray
    log: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.problem.name

    def draw(
        self, data: Any, n: int = 4000, seed: int = 0, max_memory: memory.MaxMemory = None
    ) -> Draws:
        """Draw from the guide of a data set, and evaluate the model's density at the draws.

        Args:
            data: The arguments of the model: a tuple, a dictionary or a table of columns by name,
                or an array where one argument is observed. A dictionary may name observed sites.
            n: Number of draws.
            seed: Seed of the draws; the global generators are not changed.
            max_memory: Memory limit, as in `Fit.draw`.

        Returns:
            Draws with weights, as of a fit. If the data set is unlike all simulated ones, their
            verdict is "do not trust", and says so.

        Raises:
            ValueError: The data set lacks an argument, or has values that are not finite, or of
                another shape.
        """
        return self._drawn(read(self.problem, data), n, seed, max_memory)

    def _drawn(
        self, data: DataSet, n: int, seed: int, max_memory: memory.MaxMemory = None
    ) -> Draws:
        n = check_integer("n", n)
        target, at, unlike = self._at(data)
        reasons = [r for r in (self._size_reason(data), unlike.reason) if r]
        meta: dict[str, Any] = {
            **{str(k): self.meta[k] for k in ("guide", "objective", "steps")},
            "model": self.name,
            "missed": reasons,
            "unlike": {"distance": unlike.distance, "p": unlike.p},
        }
        # All draws before any density, which may draw random numbers of its own.
        with (
            torch.no_grad(),
            isolated_rng(derive_seed(seed, DRAWING)),
            memory.memory_limit(max_memory),
        ):
            pieces = [at.sample((min(PIECE, n - i),)) for i in range(0, n, PIECE)]
            found = tabulate(target, n, [pieces], meta)
        return replace(found, guide=at)

    def _size_reason(self, data: DataSet) -> str:
        """The sentence on a number of rows that no simulated data set had; else empty."""
        least, most = self.problem.rows
        if least <= data.rows <= most or not self.problem.plate:
            return ""
        return (
            f"This data set has {data.rows} rows, and is unlike all simulated ones, which had "
            f"{least} to {most}. Amortize with rows=({min(least, data.rows)}, "
            f"{max(most, data.rows)}), or fit the model to it: guide.fit(data)."
        )

    def log_prob(self, data: Any, z: ArrayLike) -> np.ndarray:
        """Log density of the guide at unconstrained latents. (*S, D) -> (*S).

        Args:
            data: The data set, as for `draw`.
            z: Points of R^D, such as ``draws.z``.
        """
        _, at, _ = self._at(read(self.problem, data))
        with torch.no_grad():
            return at.log_prob(torch.as_tensor(np.asarray(z, dtype=np.float64))).numpy()

    def target(self, data: Any) -> GlobalTarget:
        """The log density of the model for a data set, as `from_pyro` makes it."""
        return reading.target_of(self.problem, read(self.problem, data))

    def unlike(self, data: Any) -> Unlike:
        """How far a data set is from the simulated ones."""
        return self._at(read(self.problem, data))[2]

    def _at(self, data: DataSet) -> tuple[GlobalTarget, AtData, Unlike]:
        with torch.no_grad():
            context = self.network.encoder(data.data)[0]
            unlike = self.novelty.judge(self.network.encoder.read(data.data)[0])
        return reading.target_of(self.problem, data), AtData(self.network, context), unlike

    def fit(self, data: Any, seed: int = 0, **settings: Any) -> Fit:
        """Fit the model to one data set, from the mean and covariance of the guide's draws.

        Args:
            data: The data set, as for `draw`.
            seed: Seed of all random numbers of the fit.
            **settings: Arguments of `flowvi.fit`, such as budget.
        """
        given = read(self.problem, data)
        draws = self._drawn(given, START_DRAWS, seed)
        target = draws.target
        if given.call is not None:
            args, kwargs = given.call
            own = from_pyro(self.problem.model, *args, **kwargs)
            assert isinstance(own, GlobalTarget)
            target = self.problem.named(own)
        assert isinstance(target, GlobalTarget)
        return fit(target, start=draws, seed=seed, **settings)

    def fit_many(
        self,
        data: Iterable[Any],
        n: int = 1000,
        escalate: bool = True,
        executor: Executor | None = None,
        progress: bool = True,
        file: str | os.PathLike[str] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Fits:
        """Judge the guide at many data sets, and fit those at which it is not trusted.

        Args:
            data: Data sets, each as for `draw`.
            n: Draws of each.
            escalate: Whether data sets whose draws are not trusted get a fit of their own, which
                starts from the guide, with NUTS at last.
            executor: Runs these fits in parallel, such as a `ProcessPoolExecutor`.
            progress: Whether to show the progress.
            file: File of what is finished; a later call with the same data goes on from it.
            seed: Seed of all draws and fits.
            **settings: Arguments of `flowvi.fit` for these fits, such as budget.

        Returns:
            A table with one line for each data set, whose draws are ``fits[i]``.
        """
        made: Fits = later("flowvi.amortized.many", "fit_many")(
            self, data, n, escalate, executor, progress, file, seed, settings
        )
        return made

    def refine(
        self,
        data: Iterable[Any],
        steps: int = 300,
        draws: int = 256,
        seed: int = 0,
        progress: bool = True,
    ) -> AmortizedGuide:
        """Train the guide further on real data sets, by the model's own density (wake-sleep).

        Draws of the guide at these data sets are weighted by the density, and the guide is made
        likelier at the weighted ones; simulated data sets go on beside them. It helps where data
        sets are alike, and lie where few simulated ones do.

        Args:
            data: Data sets, each as for `draw`.
            steps: Number of steps.
            draws: Draws of each of four data sets in a step.
            seed: Seed of all random numbers.
            progress: Whether to show the progress.

        Returns:
            A new guide, whose network is the better one: the refined one, if it has more effective
            draws at these data sets and its loss on simulated ones is not higher by 0.05 nats. The
            last line of its log has the figures.
        """
        made: AmortizedGuide = later("flowvi.amortized.refine", "refine")(
            self, data, steps, draws, seed, progress
        )
        return made

    def simulate(self, n: int, seed: int = 0) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """Draw latents from the prior, and a data set for each.

        Args:
            n: Number of data sets.
            seed: Their seed.

        Returns:
            Data sets as dictionaries of arrays, which `draw` takes, and the latent values, each
            (n, *shape).
        """
        problem = self.problem
        found, sets = problem.simulate(n, derive_seed(seed, CALIBRATE) % 2**32), []
        rng = np.random.default_rng(derive_seed(seed, CALIBRATE))
        by_row = problem.by_row
        for i in range(len(found.z)):
            rows = draw_size(problem, rng)
            sets.append(
                {
                    name: (t[i, :rows] if name in by_row else t[i]).numpy()
                    for name, t in found.data.items()
                }
            )
        target = problem.target_of(problem.rows[1])
        with torch.no_grad():
            values = target.constrain(found.z)
        return sets, {name: values[name].numpy() for name in target.sites}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the guide to a folder, without pickle; ``flowvi.load(folder, model)`` reads it."""
        path: Path = later("flowvi.amortized.storage", "save_guide")(self, folder)
        return path

    def plot(self) -> np.ndarray:
        """Draw the held-out loss over the steps of the training."""
        shown: np.ndarray = later("flowvi.plots", "plot_held_out")(self.losses)
        return shown

    def __str__(self) -> str:
        problem, meta = self.problem, self.meta
        least, most = problem.rows
        rows = f"{least} rows" if least == most else f"{least} to {most} rows"
        read_from = [f"{problem.sites and ', '.join(problem.sites)}"]
        if problem.varying:
            read_from.append(f"given {', '.join(problem.varying)}")
        lines = [
            f"{self.name}: {meta.get('guide')} guide of {problem.target.dim} latents, "
            f"{meta.get('steps')} steps, {meta.get('simulations'):,} simulated data sets, "
            f"{meta.get('seconds', 0.0):.1f} s",
            f"  reads {' '.join(read_from)}"
            + (f", {rows}" if problem.plate else "")
            + f" ({meta.get('encoder')})",
            *(f"  {line}" for line in self.log),
        ]
        return "\n".join(lines)


def check_sets(data: Iterable[Any]) -> Sequence[Any]:
    """Data sets as a sequence, or an error where a single one was given."""
    if isinstance(data, dict):
        raise TypeError("fit_many takes a list of data sets; for one, use guide.draw(data).")
    return list(data)
